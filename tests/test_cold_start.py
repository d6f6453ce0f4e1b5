"""The careless expert, supervised training, and the question that a policy of ours must be taught."""

import argparse
import json
import os
import re

import pytest
import torch

from games import levels
from cold_start import cold_start, make_cold_start
from support.demonstrations import expert_episodes, play_expert, write_messages
from engines.torch_engine import TorchEngine
from support.policies import load_policy, make_chat, tiny_model, train_tokenizer
from rollout import SYSTEM, ChatFormat, flaw_rates, play
from helpers import lay_out, make_batch, sampled_logprobs
from support.batches import forward, make_question
from support.warmup import supervise, teach_words

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.parametrize("env", ["alfworld", pytest.param("scienceworld", marks=pytest.mark.long)])
def test_careless_experts_still_win_and_their_slips_change_nothing_for_good(env, pool):
    games = [levels.generated_game("train", s) for s in range(20)]
    if env == "scienceworld":
        every = levels.level_games("scienceworld", "L2", "train", task_types=["short"])
        games = [every[i] for i in range(0, len(every), 29)]
    careful = {g.name: len(turns) for g, turns, _ in play_expert(games, pool)}
    results = list(play_expert(games, pool, sloppy=0.6, seed=1))
    assert all(won for *_, won in results)
    assert sum(len(turns) for _, turns, _ in results) > 1.3 * sum(careful.values())
    again = list(play_expert(games, pool, sloppy=0.6, seed=1))
    assert [[t[1] for t in turns] for _, turns, _ in results] == [[t[1] for t in turns] for _, turns, _ in again]


@pytest.mark.parametrize("env, kind, types, name", [
    ("alfworld", "generated", None, "tiny-reads"), ("alfworld", "official", None, "tiny-official-careless"),
    ("scienceworld", "simulator", ["short"], "tiny-scienceworld")])
def test_default_runs_start_from_the_shipped_policy_of_their_games(env, kind, types, name):
    args = argparse.Namespace(env=env, games=kind, level="L1", cold_start="auto", task_types=types)
    folder = make_cold_start(args, games=None, pool=None)  # nothing is played, nothing trained
    assert os.path.samefile(folder, os.path.join(ROOT, "policies", name))
    assert load_policy(folder)[0].num_parameters() < 2_000_000


def test_slips_that_are_shown_are_not_learnt(pool):
    """Only the expert's own commands are scored; what a careful expert says in the same games, as slips change nothing for good."""
    games = [levels.generated_game("train", s) for s in range(12)]
    texts = [text for _, turns, _ in play_expert(games, pool, sloppy=0.6, seed=1) for turn in turns for text in turn[:2]]
    chat = ChatFormat(train_tokenizer(texts), SYSTEM["alfworld"])
    made = lambda **how: expert_episodes(games, pool, chat, 50, progress=False, seed=1, **how)
    heard = lambda e: chat.tokenizer.decode([t for t, scored in zip(e.tokens, e.sampled) if scored])
    careful, learnt, shown = made(), made(sloppy=0.6), made(sloppy=0.6, learn_slips=False)
    assert [e.tokens for e in learnt] == [e.tokens for e in shown]
    assert [heard(e) for e in shown] == [heard(e) for e in careful]
    assert all(len(heard(a)) > len(heard(b)) for a, b in zip(learnt, shown))


def test_copies_of_an_episode_name_other_boxes_rooms_and_animals_and_stay_true_to_themselves(pool):
    games = [g for g in levels.list_games("scienceworld", "train", task_types=["find-animal"])][:3]
    texts = [text for _, turns, _ in play_expert(games, pool) for observation, command, *_ in turns for text in (observation, command)]
    chat = ChatFormat(train_tokenizer(texts), SYSTEM["scienceworld"])
    episodes = expert_episodes(games, pool, chat, progress=False, copies=6)
    assert len(episodes) == 18
    asked = []
    for episode in episodes:
        text = chat.tokenizer.decode(episode.tokens)
        box, room = re.search(r"move it to the (\w+) box in the ([a-z ]+)\.", text).groups()
        commands = [step.action for step in episode.steps]
        animal, = [re.sub("^(egg|baby) | egg$", "", c.removeprefix("focus on ")) for c in commands if c.startswith("focus")]
        assert animal in text.split("<action>focus on")[0]
        assert commands[-1].endswith(f" to {box} box") and f"teleport to {room}" in commands
        assert f"{box} box (containing" in text and chat.tokenizer.decode(episode.tokens[episode.steps[-1].start:]).count(f"{box} box") == 1
        asked.append((box, room, animal))
    assert all(len(set(asked[i:i + 6])) >= 4 for i in (0, 6, 12)), asked


def test_supervised_training_learns_the_experts_tokens_and_padding_does_not_count(tokenizer, chat, pool):
    games = [levels.generated_game("train", s) for s in range(8)]
    episodes = expert_episodes(games, pool, chat, progress=False)
    model = tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=0)

    def loss():
        with torch.no_grad():
            total = [torch.log_softmax(model(input_ids=torch.tensor([e.tokens])).logits[0], -1) for e in episodes]
        return -torch.cat([lp[t - 1, e.tokens[t]][None] for lp, e in zip(total, episodes)
                           for t, s in enumerate(e.sampled) if s]).mean().item()

    before = loss()
    cold_start(model, episodes, epochs=60, batch=4, lr=1e-2, progress=False)
    assert loss() < 0.35 * before
    stopped = tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=0)
    cold_start(stopped, episodes, epochs=60, batch=4, lr=1e-2, progress=False, stop=1)
    assert not torch.equal(stopped.lm_head.weight, model.lm_head.weight)


def test_teaching_the_question_leaves_the_actions_alone(model, chat, episodes):
    """The verdicts become likely; the policy's own tokens stay as likely as they were, or nearly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    whole = make_batch(episodes, torch.zeros(len(episodes)))
    first, last = supervise(model, optimizer, lambda generator: whole, make_question(chat), updates=40)
    assert first > 3.0 and last < 1.0
    batch = lay_out(episodes)
    assert sampled_logprobs(model, batch, 1.0, 8192).mean() > batch.old_logprobs.mean() - 0.1


def test_the_words_are_taught_in_their_own_rows_alone(model, chat, episodes):
    """L_cls falls to a guess between the two words; no other weight moves by a bit. Who knows the words, or may not
    change them, is left alone. (Without it the default policy's generative arm wrote verdicts in place of actions.)"""
    question, whole = make_question(chat), make_batch(episodes, torch.zeros(len(episodes)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    verdicts = lambda: -forward(model, whole.sequences, whole.sampled, branches=whole.branches(question))["verdicts"].mean()
    assert verdicts() > 3.0
    assert 0 < teach_words(model, lambda generator: whole, question) < 100
    assert verdicts() < 1.2
    rows = [chat.tokenizer.convert_tokens_to_ids(word) for word in ("bad", "good")]
    for name, p in model.named_parameters():
        changed = (p != before[name]).nonzero()
        assert set(changed[:, 0].tolist()) == set(rows) if name == "lm_head.weight" else len(changed) == 0, name
    assert teach_words(model, lambda generator: whole, question) == 0
    model.lm_head.weight.requires_grad_(False)
    assert teach_words(model, lambda generator: whole, question, enough=0.0) == 0


def test_the_default_policy_survives_the_generative_warm_up(pool):
    """Regression: after the warm-up of `--classifier generative` 70% of tiny-reads' answers were malformed."""
    model, tokenizer = load_policy(os.path.join(ROOT, "policies", "tiny-reads"))
    chat, _ = make_chat(tokenizer, "alfworld", os.path.join(ROOT, "policies", "tiny-reads"))
    engine, question = TorchEngine(model, chat.eos, max_new_tokens=24), make_question(chat)
    episodes, _ = play(engine, pool, chat, [levels.generated_game("train", s) for s in range(8)], 4, 20, seed=0)

    def draw(generator):
        chosen = torch.randperm(len(episodes), generator=generator)[:16].tolist()
        return make_batch([episodes[i] for i in chosen], torch.zeros(16))

    teach_words(model, draw, question)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    _, last = supervise(model, optimizer, draw, question, updates=40)
    after, _ = play(engine, pool, chat, [levels.generated_game("train", s) for s in range(8, 12)], 4, 20, seed=1)
    assert last < 1.0 and flaw_rates(after)["malformed"] < 0.1


def test_the_chat_dataset_is_what_other_trainers_read(pool, tmp_path):
    """A line an episode, roles in turn; rendered by a chat template it is what our own episodes are made of."""
    path = str(tmp_path / "expert.jsonl")
    games = [levels.generated_game("train", s) for s in range(3)]
    assert write_messages(games, pool, "SYSTEM", path) == 3
    lines = [json.loads(line) for line in open(path)]
    for game, line in zip(games, lines):
        roles = [m["role"] for m in line["messages"]]
        assert line["game"] == game.name and roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)
        assert "Your task is to" in line["messages"][1]["content"] and line["messages"][2]["content"].startswith("<action>")

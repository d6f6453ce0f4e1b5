"""RLVMR's tags: the format, what the expert's turns are tagged with, and how a policy comes to know them."""

import json
import os
import subprocess
import sys

import pytest
import torch

import cold_start
from credit import tag_rewards
from games import levels
from games.experts import kind, things
from games.game import Observation
from games.players import play_expert
from rollout import SYSTEM_INSTRUCT, TAGS, ChatFormat, play, system_prompt
from support.demonstrations import expert_episodes, said, write_messages
from support.policies import (add_tags, check_tags, load_policy, make_chat, save_policy, tiny_model,
                              train_tokenizer)
from support.tags import thoughts
from test_rollout import Scripted


@pytest.fixture(scope="module")
def tagged_chat():
    system = system_prompt("alfworld", True, True)
    texts = [system, "find mug, move it to cabinet. no mug at cabinet 1. go to"] * 10
    return ChatFormat(train_tokenizer(texts, 400, tags=True), system, tags=True)


def houses(count, task_type=None):
    games = [levels.generated_game("train", seed) for seed in range(60)]
    return [g for g in games if task_type is None or g.task_type == task_type][:count]


# ------------------------------------------------------------------------------------------------- the format

def test_exactly_one_tag_opens_an_answer_and_then_comes_the_action(tagged_chat, chat):
    def parse(text, chat=tagged_chat):
        return chat.parse(chat.tokenizer.encode(text, add_special_tokens=False))
    for tag in TAGS:
        assert parse(f"<{tag}>no mug.</{tag}><action>look</action><|im_end|>") == ("look", tag)
    assert parse("<monitor>a\nb</monitor>\n <action> go to bed 1 </action>") == ("go to bed 1", "monitor")
    bad = ["<action>look</action>", "<think>so</think><action>look</action>",
           "<monitor>so<action>look</action>",
           "<action>look</action><monitor>so</monitor>", "Well, <monitor>so</monitor><action>look</action>",
           "<monitor>so</explore><action>look</action>", "<monitor>so</monitor>", "<monitor>so</monitor> go",
           "<monitor>so</monitor><explore>and</explore><action>look</action>",
           "<monitor>so</monitor><action>look</action><explore>and</explore>",
           "<monitor><explore>so</explore></monitor><action>look</action>",
           "<monitor>so</monitor><action>look</action><action>look</action>"]
    assert [parse(text) for text in bad] == [(None, None)] * len(bad)
    assert parse("<action>look</action>", chat) == ("look", None)  # runs without tags
    assert parse("<monitor>so</monitor><action>look</action>", chat) == ("look", None)


def test_an_answer_without_its_tag_is_malformed_only_in_runs_with_tags(tagged_chat, pool):
    game = houses(1)[0]
    plain = ChatFormat(tagged_chat.tokenizer, tagged_chat.system)
    answers = ["<action>look</action><|im_end|>", "<monitor>so</monitor><action>look</action><|im_end|>"]
    (episode,), _ = play(Scripted(tagged_chat, answers), pool, tagged_chat, [game], 1, max_steps=2)
    found = [(s.malformed, s.action, s.tag) for s in episode.steps]
    assert found == [(True, None, None), (False, "look", "monitor")]
    (episode,), _ = play(Scripted(plain, answers), pool, plain, [game], 1, max_steps=2)
    assert [(s.malformed, s.action, s.tag) for s in episode.steps] == [(False, "look", None)] * 2


def test_prompts_of_tagged_runs_name_the_tags_and_those_of_others_do_not():
    for env in levels.ENVS:
        for short in (True, False):
            plain, tagged = system_prompt(env, short, False), system_prompt(env, short, True)
            assert all(f"<{tag}>" in tagged and f"<{tag}>" not in plain for tag in TAGS)
            assert "<action>" in tagged and "<think>" not in tagged and tagged != plain
        assert system_prompt(env, False) == SYSTEM_INSTRUCT[env]


# ------------------------------------------------------------------------------------------ the expert's tags

def test_a_tagged_demonstration_plays_back_in_the_real_engine_and_pays(tagged_chat, pool):
    """A careless expert's answers, given to `play` as a policy's would be: the same tags and actions come out
    of the tokens, the flaws are those of the world, the episode is won, and every planning, explore and
    reflection pays."""
    games, seen = houses(12), set()
    for game, turns, won in play_expert(games, pool, sloppy=0.4, seed=3):
        openings = thoughts("alfworld", turns)
        answers = [said(tag, text, turn[1]) + "<|im_end|>" for (tag, text), turn in zip(openings, turns)]
        engine = Scripted(tagged_chat, answers)
        (episode,), _ = play(engine, pool, tagged_chat, [game], 1, len(turns), max_context=10**5)
        assert [s.tag for s in episode.steps] == [tag for tag, _ in openings] and won and episode.won
        assert [s.action for s in episode.steps] == [command for _, command, *_ in turns]
        assert [s.inadmissible for s in episode.steps] == [not after.accepted for _, _, _, after, *_ in turns]
        assert not any(s.malformed for s in episode.steps)
        paid = {"planning": 1, "explore": 1, "reflection": 1, "monitor": 0}
        assert tag_rewards(episode) == [paid[s.tag] for s in episode.steps]
        assert [s.tag for s in episode.steps].count("planning") == 1 and episode.steps[0].tag == "planning"
        for last, step in zip(episode.steps, episode.steps[1:]):
            failed = last.inadmissible or last.no_effect
            assert (step.tag == "reflection") == (failed and step.action != last.action)
        seen |= {s.tag for s in episode.steps}
    assert seen == set(TAGS)


def test_what_the_tags_say_is_what_was_seen(pool):
    for _, turns, _ in play_expert(houses(20), pool, sloppy=0.3, seed=1):
        here, inside = None, []
        for (observation, command, *_), (tag, text) in zip(turns, thoughts("alfworld", turns)):
            if observation.startswith(("You arrive", "You open")):
                here, inside = observation.split(".")[0].split(" ", 3)[-1], things(observation)
            if text.endswith(" is here."):
                assert text.removesuffix(" is here.") in inside
            if text.startswith("no "):
                assert tag in ("explore", "monitor")
                assert text.split()[1] not in {kind(name) for name in inside}
            if text.endswith("is closed."):
                assert text in observation.replace("The ", "")


def test_the_thoughts_of_one_house_word_for_word(pool):
    """The book lies in the fourth place where the expert looks."""
    (_, turns, _), = play_expert([levels.generated_game("train", 0)], pool)
    found = zip(thoughts("alfworld", turns), turns)
    assert [(f"{tag}: {text}", command) for (tag, text), (_, command, *_) in found] == [
        ("planning: find book, move it to shelf.", "go to bed 1"),
        ("explore: no book at bed 1.", "go to cabinet 1"),
        ("explore: cabinet 1 is closed.", "open cabinet 1"),
        ("explore: no book at cabinet 1.", "go to desk 1"),
        ("explore: no book at desk 1.", "go to drawer 1"),
        ("explore: drawer 1 is closed.", "open drawer 1"),
        ("monitor: book 1 is here.", "take book 1 from drawer 1"),
        ("monitor: You pick up the book 1 from the drawer 1.", "go to shelf 1"),
        ("monitor: You arrive at shelf 1.", "move book 1 to shelf 1")]


def test_after_a_failure_that_is_repeated_nothing_is_reflected_on():
    """The third turn does what has just failed once more: that is no reflection; the fourth is one."""
    texts = ["You see a desk 1.\n\nYour task is to: put some book on bed."] + ["Nothing happens."] * 3
    commands = ["go to bed 1", "open bed 1", "open bed 1", "go to desk 1"]
    came = [(True, True), (True, False), (False, False), (False, False)]  # accepted, effect
    turns = [(text, command, Observation(text, [], 0, 0.0, False, False, *flags), None)
             for text, command, flags in zip(texts, commands, came)]
    assert thoughts("alfworld", turns) == [
        ("planning", "find book, move it to bed."), ("reflection", "go to bed 1 changed nothing."),
        ("monitor", "Nothing happens."), ("reflection", "open bed 1 is not possible.")]


def test_in_scienceworld_the_plan_is_the_task_and_copies_rename_the_thoughts_too(pool):
    games = levels.list_games("scienceworld", "train", task_types=["find-animal"])[:2]
    texts = [text for _, turns, _ in play_expert(games, pool) for turn in turns for text in turn[:2]]
    system = system_prompt("scienceworld", True, True)
    chat = ChatFormat(train_tokenizer(texts + [system], tags=True), system, tags=True)
    episodes = expert_episodes(games, pool, chat, progress=False, sloppy=0.3, seed=2, copies=4)
    assert len(episodes) == 8
    for episode in episodes:
        text = chat.tokenizer.decode(episode.tokens)
        plan = text.split("<planning>")[-1].split("</planning>")[0]  # the prompt names the tag, too
        assert f"Your task is to {plan}" in text and plan.startswith("find a(n) animal. First, focus")
        assert [s.tag for s in episode.steps][0] == "planning"
        assert "explore" in [s.tag for s in episode.steps[:4]] and episode.steps[-1].tag == "monitor"
        for step in episode.steps:
            assert chat.parse(episode.tokens[step.start:step.end]) == (step.action, step.tag)
    assert len({chat.tokenizer.decode(e.tokens).split("Then, ")[1].split(".")[0] for e in episodes}) > 2


def test_the_tagged_chat_dataset(pool, tmp_path):
    path = str(tmp_path / "tagged.jsonl")
    assert write_messages(houses(2), pool, "SYSTEM", path, sloppy=0.3, tags=True) == 2
    for line in open(path):
        answers = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        assert answers[0].startswith("<planning>find ")
        assert all(a.startswith(tuple(f"<{t}>" for t in TAGS)) and a.endswith("</action>") for a in answers)


# ------------------------------------------------------------------------------ policies that know the tags

def test_a_policy_made_without_tags_is_given_them_and_is_otherwise_what_it_was(tmp_path):
    texts = [system_prompt("alfworld"), "go to cabinet 1"] * 10
    tokenizer = train_tokenizer(texts, 400)
    model = tiny_model(tokenizer, hidden=32, layers=1, heads=2, feed_forward=64).eval()
    ids = torch.tensor([tokenizer.encode("<|im_start|>go to cabinet 1")])
    before = model(input_ids=ids).logits
    save_policy(str(tmp_path / "plain"), model, tokenizer, prompt="short")
    with pytest.raises(ValueError, match=r"was not: python cold_start.py --tags"):
        check_tags(str(tmp_path / "plain"))
    known = len(tokenizer)
    add_tags(model, tokenizer)
    assert len(tokenizer) == known + 8 and model.config.vocab_size % 8 == 0
    assert torch.equal(model(input_ids=ids).logits[..., :known], before[..., :known])
    save_policy(str(tmp_path / "tags"), model, tokenizer, prompt="short", tags=True)
    check_tags(str(tmp_path / "tags"))
    loaded, again = load_policy(str(tmp_path / "tags"))
    chat, tiny = make_chat(again, "alfworld", str(tmp_path / "tags"))
    answer = "<explore>go</explore><action>go to cabinet 1</action><|im_end|>"
    assert chat.tags and tiny and chat.system == system_prompt("alfworld", True, True)
    assert chat.parse(again.encode(answer)) == ("go to cabinet 1", "explore")
    assert all(len(again.encode(f"<{tag}>")) == 1 for tag in TAGS)
    assert again.decode(again.encode(answer)) == answer
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("init", [[], ["--init", "policies/tiny"]])
def test_cold_start_with_tags_ends_in_a_policy_that_is_noted_to_know_them(init, tmp_path, monkeypatch):
    out = str(tmp_path / "policy")
    flags = "--tags --sloppy 0.3 --games generated --episodes 12 --epochs 1 --batch 4 --workers 1".split()
    monkeypatch.setattr(sys, "argv", ["cold_start.py", "--out", out, *flags, *init])
    cold_start.main()
    check_tags(out)
    model, tokenizer = load_policy(out)
    chat, tiny = make_chat(tokenizer, "alfworld", out)
    assert tiny and chat.tags and model.config.vocab_size >= len(tokenizer)
    assert len(tokenizer.encode("<reflection>", add_special_tokens=False)) == 1


def test_training_with_tags_keeps_them_and_a_policy_without_is_refused_in_a_line(tmp_path, tagged_chat):
    """Answers may be as long as tagged ones are, and the checkpoint is noted to know the tags: else an
    evaluation would ask for none, or cut them off."""
    model = tiny_model(tagged_chat.tokenizer, hidden=32, layers=1, heads=2, feed_forward=64)
    start, run = str(tmp_path / "start"), str(tmp_path / "run")
    save_policy(start, model, tagged_chat.tokenizer, prompt="short", tags=True)

    def train(model):
        flags = ("--credit rlvmr --games generated --iterations 1 --tasks 2 --group-size 2 --updates 1 "
                 "--max-steps 2 --eval-games 0 --classifier none --workers 1").split()
        return subprocess.run([sys.executable, "train.py", "--model", model, "--out", run, *flags], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    refused = train("policies/tiny")
    assert refused.returncode != 0 and "Traceback" not in refused.stdout
    last = refused.stdout.strip().split("\n")[-1]
    assert last.startswith("train.py: --credit rlvmr needs a policy that was taught tags, and policies/tiny")
    done = train(start)
    assert done.returncode == 0, done.stdout
    check_tags(os.path.join(run, "checkpoint-000001"))
    with open(os.path.join(run, "config.json")) as file:
        assert json.load(file)["max_new_tokens"] == 64

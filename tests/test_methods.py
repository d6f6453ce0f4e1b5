"""Every credit rule and every form of the classifier, on both environments: two iterations of a whole run each.

What train.py does from its flags to its last checkpoint, in this process; shared between the runs are the workers and the
loaded weights. Nothing is claimed of what two iterations learn, only that each does learn, from what it should.
"""

import copy
import functools
import json
import math
import os
import sys

import pytest
import torch

import train
from credit import CREDIT
from games import levels
from rollout import FLAWS, SYSTEM, ChatFormat, play
from support import run as running, setup as building
from support.logs import metrics_of
from support.policies import SHIPPED, add_tags, load_policy, save_policy, trainable
from test_rollout import Scripted

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--iterations", "2", "--tasks", "2", "--group-size", "2", "--eval-games", "0", "--workers", "1", "--updates", "1",
         "--warmup-updates", "0", "--warmup", "0", "--kl-coef", "0", "--save-every", "5", "--device", "cpu"]
OF = {"alfworld": ["--games", "generated", "--task-types", "1", "--max-steps", "4"],
      "scienceworld": ["--task-types", "short", "--max-steps", "4"]}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """{env: folder} of the shipped policies, as if cold starts had taught them tags and instructions."""
    folders = {}
    for env, kind in (("alfworld", "generated"), ("scienceworld", "simulator")):
        model, tokenizer = load_policy(os.path.join(ROOT, "policies", SHIPPED[kind]))
        add_tags(model, tokenizer, 0)
        folders[env] = str(tmp_path_factory.mktemp(env) / "taught")
        save_policy(folders[env], model, tokenizer, prompt="short", tags=True, correct=True)
    return folders


@pytest.fixture
def run_of(monkeypatch, pool, tmp_path):
    """A function: from flags to (the rows of metrics.jsonl, the run)."""
    class Shared:
        """The test session's workers, which no run closes."""
        __enter__, __exit__ = lambda self: pool, lambda *_: None
        __getattr__ = lambda self, name: getattr(pool, name)

    monkeypatch.setattr(building, "EnvPool", lambda workers: Shared())
    monkeypatch.setattr(building, "trainable", lambda *a: copy.deepcopy(loaded(*a)))
    monkeypatch.setattr(running, "draw", lambda *_: None)

    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(tmp_path / "run"), *flags])
        args = train.parse_arguments()
        run = building.setup(args)
        run.start = copy.deepcopy(run.model.state_dict())
        running.prepare(run, train.LABELS[args.labels], train.weigh)
        train.train(args, run)
        with open(os.path.join(args.out, "metrics.jsonl")) as file:
            return [json.loads(line) for line in file][-2:], run
    return start


loaded = functools.lru_cache(trainable)


def moved(run):
    """How far the weights went, the largest of all."""
    return max((a - b).abs().max().item() for a, b in zip(run.model.state_dict().values(), run.start.values()))


def on_both(names, quick):
    """Parameters (name, env); all but the `quick` ones, (env, name), only with --long."""
    late = lambda name, env: [] if (env, name) in quick else [pytest.mark.long]
    return [pytest.param(name, env, marks=late(name, env)) for name in names for env in levels.ENVS]


@pytest.mark.parametrize("rule, env", on_both(CREDIT, [("scienceworld", "gigpo")] + [("alfworld", rule) for rule in CREDIT]))
def test_every_credit_rule_trains(rule, env, run_of, taught):
    """GRPO alone under each rule: finite, and it moves the policy where there is anything to learn from."""
    tagged = ["--model", taught[env]] if rule == "rlvmr" else []
    rows, run = run_of("--env", env, *OF[env], "--classifier", "none", "--credit", rule, *tagged)
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("loss", "policy_loss", "kl", "grad_norm", "entropy"))
        assert row["skipped"] == 0 and 0 < row["steps"] <= run.args.max_steps
    # Labels are a signal of their own. The policy here knows no tags: under rlvmr all of its answers are malformed, as bad as
    # one another. Rules that look at single steps may find a signal where the outcomes are equal; GRPO may not.
    some = rule != "rlvmr" and (rows[0]["groups_without_signal"] < 1 or rule == "adca")
    if some or rule == "grpo":
        assert (rows[0]["grad_norm_grpo"] > 1e-3) == some
    assert not some or moved(run) > 1e-5


@pytest.mark.parametrize("form, env", on_both(["generative", "value", "both"],
                                             [("scienceworld", "both"), ("alfworld", "both")]))
def test_every_form_of_the_classifier_trains(form, env, run_of):
    """Its loss is there and its gradient reaches the policy, with or without a signal from the outcome."""
    rows, run = run_of("--env", env, *OF[env], "--classifier", form)
    losses = {"generative": ["generative_loss"], "value": ["value_loss"]}
    wanted = losses.get(form, ["generative_loss", "value_loss"])
    assert all(math.isfinite(row[name]) for row in rows for name in wanted if name in row or row is rows[0])
    assert not {"generative_loss", "value_loss"} - set(wanted) & set(rows[0])
    assert rows[0]["grad_norm_classifier"] > 0 and moved(run) > 1e-5
    counted = [name for name in rows[0] if name.startswith("count_")]
    assert {name.split("_")[1] for name in counted} == {name.removesuffix("_loss") for name in wanted}


def test_an_episode_without_a_single_command_has_the_score_that_it_began_with(pool, tokenizer):
    """It had none, and the iteration's metrics ended in a traceback (seen with a policy whose answers were all malformed)."""
    game, = levels.list_games("scienceworld", "train", task_types=["find-non-living-thing"], count=1)
    chat = ChatFormat(tokenizer, SYSTEM["scienceworld"])
    (episode,), _ = play(Scripted(chat, ["I think so.<|im_end|>"]), pool, chat, [game], 1, max_steps=2, max_context=10**5)
    assert episode.score == pool.reset([game])[0].score is not None
    assert metrics_of([episode], [{}])["score"] == episode.score


def test_instructions_come_into_the_prompt_of_the_next_iteration_and_a_resumed_run_has_them(run_of, taught, capsys):
    """A policy whose answers are all malformed (it lacks the tags that its prompt asks for): one switch, one line, the
    prompt from the second iteration on; the checkpoint and a resumed run know of it."""
    rows, run = run_of(*OF["alfworld"], "--classifier", "none", "--correct", "0.9", "--model", taught["alfworld"])
    assert [row["correct_malformed"] for row in rows] == [1, 1] and rows[0]["malformed"] > 0.9
    assert [row[f"correct_{name}"] for row in rows for name in FLAWS[1:]] == [0] * 8
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("correct ")]
    assert len(said) == 1 and said[0].endswith("says from now on: Write exactly one command.")
    with open(os.path.join(run.args.out, "samples", "iteration-000002.txt")) as file:
        assert "Write exactly one command." in file.read()
    checkpoint = os.path.join(run.args.out, "checkpoint-000002")
    with open(os.path.join(checkpoint, "notes.json")) as file:
        assert json.load(file)["corrections"] == ["malformed"]
    again, run = run_of("--resume", run.args.out)
    assert run.done == 2 and run.chat.corrections == ("malformed",)


def test_a_value_head_that_a_cold_start_trained_is_where_rl_begins(run_of, tmp_path, capsys):
    from support.checkpoints import write_trainer
    model, tokenizer = load_policy(os.path.join(ROOT, "policies", "tiny"))
    head, folder = torch.nn.Linear(model.config.hidden_size, 1), str(tmp_path / "judge")
    save_policy(folder, model, tokenizer, extras=write_trainer(head), prompt="short", critic="both")
    begun = []
    original = building.load_head
    building.load_head = lambda folder, mine, layer: [original(folder, mine, layer), begun.append(copy.deepcopy(mine))][0]
    try:
        rows, run = run_of(*OF["alfworld"], "--classifier", "value", "--model", folder)
    finally:
        building.load_head = original
    assert torch.equal(begun[0].weight, head.weight) and not torch.equal(run.value_head.weight, head.weight)
    assert "classifier, its value head trained before, labels by flaws" in capsys.readouterr().out


@pytest.mark.parametrize("critic, updates", [("both", 0), ("generative", 0), ("value", 40), ("none", 40)])
def test_the_warm_up_is_for_policies_that_were_never_taught_the_question(critic, updates, run_of, tmp_path, monkeypatch):
    model, tokenizer = load_policy(os.path.join(ROOT, "policies", "tiny"))
    save_policy(str(tmp_path / "judge"), model, tokenizer, prompt="short", critic=critic)
    monkeypatch.setattr(sys, "argv", ["train.py", "--games", "generated", "--device", "cpu", "--out", str(tmp_path / "run"),
                                      "--model", str(tmp_path / "judge"), "--classifier", "none"])
    assert building.setup(train.parse_arguments()).args.warmup_updates == updates

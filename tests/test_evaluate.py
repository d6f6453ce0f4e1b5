"""The evaluation: intervals, paired comparison, the scale's two ends, the commands."""

import json
import os
import subprocess
import sys

import pytest
import torch

from games import levels

from games.game import Game
import rollout
from engines import torch_engine
from games.pool import EnvPool
from evaluate import bootstrap, compare, evaluate, reference_result, summarize, wilson

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_evaluation_does_not_depend_on_the_number_of_workers(model, chat):
    games = levels.list_games("alfworld", "valid_unseen", "generated", count=5)
    engine, results = torch_engine.TorchEngine(model, chat.eos, max_new_tokens=4), []
    for workers in (1, 3):
        with EnvPool(workers) as pool:
            result, episodes = evaluate(engine, pool, chat, games, max_steps=3)
            results.append((result, [e.tokens for e in episodes]))
    assert results[0] == results[1] and results[0][0]["games"] == 5


def test_wilson_against_its_defining_equation():
    """The bounds p solve (phat - p)^2 = z^2 p (1 - p) / n."""
    for won, n in ((1, 10), (60, 200), (199, 200)):
        for p in wilson(won, n):
            assert (won / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-6)


def test_summary_by_hand():
    game = lambda task: Game("alfworld", "train", "x", task, 0)
    step = lambda **flaws: rollout.Step(0, 1, "look", **flaws)
    episodes = [rollout.Episode(game("a"), 0, steps=[step(), step(repeated=True, inadmissible=True)], won=True),
                rollout.Episode(game("b"), 0, steps=[step(repeated=True), step()])]
    result = summarize(episodes)
    assert (result["success"], result["steps"], result["repeated"], result["inadmissible"]) == (0.5, 2.0, 0.5, 0.25)
    assert result["tasks"]["a"]["won"] == 1 and result["tasks"]["b"]["success"] == 0.0


def scored(name, won, score, task="a"):
    return rollout.Episode(Game("scienceworld", "test", name, task, 0), 0, steps=[rollout.Step(0, 1, "wait")], won=won,
                           score=score)


def test_scores_by_hand():
    result = summarize([scored("1", True, 100), scored("2", False, -100), scored("3", False, 20, "b")])
    assert result["score"] == pytest.approx(40.0) and result["fatal"] == 1  # a fatal -100 counts as 0
    assert result["tasks"]["a"]["score"] == 50.0 and result["tasks"]["b"]["score"] == 20.0
    assert result["score_low"] == 0.0 and result["score_high"] == 100.0


def test_bootstrap_against_the_exact_distribution():
    """Resampling two of (0, 1): the mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4; of (0,)*9 + (1,) x 10: binomial."""
    assert bootstrap([0, 1]) == (0.0, 1.0)
    low, high = bootstrap([0] * 50 + [1] * 50)
    # Binomial(100, 1/2) / 100: its 2.5% and 97.5% quantiles are 0.40 and 0.60
    assert low == pytest.approx(0.40, abs=0.011) and high == pytest.approx(0.60, abs=0.011)


def test_comparison_by_hand():
    """Ten games: both win 3, A alone 1, B alone 5, neither 1. p = 2 * (1 + 6) / 2**6."""
    a = summarize([scored(str(i), i < 4, 100 if i < 4 else 10) for i in range(10)])
    b = summarize([scored(str(i), i < 3 or 4 <= i < 9, 100 if i < 3 or 4 <= i < 9 else -100) for i in range(10)])
    found = compare(a, b)
    assert (found["only_a"], found["only_b"], found["games"]) == (1, 5, 10)
    assert found["p"] == pytest.approx(2 * 7 / 64) and found["difference"] == pytest.approx(0.4)
    assert found["score_difference"] == pytest.approx(80 - 46)
    assert found["low"] < 0.4 < found["high"] and compare(b, a)["difference"] == pytest.approx(-0.4)
    with pytest.raises(ValueError, match="not of the same games"):
        compare(a, summarize([scored("other", True, 100)]))


@pytest.mark.parametrize("env", ["alfworld", pytest.param("scienceworld", marks=pytest.mark.long)])
def test_the_scale_s_two_ends(env):
    """The expert wins everything, the random agent next to nothing, whatever the number of workers."""
    if env == "alfworld":
        games = levels.list_games(env, "valid_unseen", "generated", count=12)
    else:
        games = levels.level_games(env, "L1", "test", task_types=["short"])
        games = [games[i * len(games) // 5] for i in range(5)]
    results = []
    for workers in (1, 2):
        with EnvPool(workers) as pool:
            results.append([reference_result("expert", games, pool, 25), reference_result("random", games, pool, 6)])
    assert results[0] == results[1]
    expert, luck = results[0]
    assert expert["success"] == 1.0 and luck["success"] <= 0.2
    # ScienceWorld's list of valid actions holds some that its parser then refuses ("look in sewer").
    assert luck["inadmissible"] <= {"alfworld": 0.0, "scienceworld": 0.4}[env] and luck["malformed"] == 0.0
    assert luck["no_effect"] > 0.0 or env == "scienceworld"


def command(*arguments):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "--workers", "1", *arguments], text=True,
                          cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def test_compare_takes_checkpoints_and_saved_results(tmp_path):
    shared = ["--games", "generated", "--count", "4", "--max-steps", "3"]
    code, out, _ = command("--model", "policies/tiny", "--json", *shared)
    saved = tmp_path / "a.json"
    saved.write_text(out)
    assert code == 0 and len(json.loads(out)["played"]) == 4
    code, out, error = command("--compare", str(saved), "policies/tiny", *shared)
    assert code == 0 and "McNemar p = 1" in out and "success +0.0 points" in out, error


def test_a_checkpoint_is_evaluated_as_it_was_trained(model, tokenizer, tmp_path):
    """Regression: evaluate.py sampled in float32, at temperature 1, with the PyTorch engine, whatever a run had used."""
    from types import SimpleNamespace
    from support.policies import save_policy
    from support.setup import PLAYED, player
    played = dict(engine="torch", precision="bfloat16", temperature=0.7, max_new_tokens=7, max_context=99, show_actions=True)
    save_policy(str(tmp_path / "trained"), model, tokenizer, prompt="short", played=played)
    save_policy(str(tmp_path / "plain"), model, tokenizer, prompt="short")
    asked = lambda **given: SimpleNamespace(env="alfworld", device="cpu", shard=False, **{**dict.fromkeys(PLAYED), **given})
    args = asked()
    engine, _ = player(args, str(tmp_path / "trained"))
    assert {name: getattr(args, name) for name in PLAYED} == played
    assert engine.temperature == 0.7 and engine.max_new_tokens == 7
    ids = torch.tensor([[5, 6, 7]])
    half = engine.model.get_decoder()(input_ids=ids).last_hidden_state
    assert (half - model.get_decoder()(input_ids=ids).last_hidden_state).abs().max() > 1e-4  # bfloat16 arithmetic
    args = asked(temperature=0.0, precision="float32")  # what the user says counts first
    engine, _ = player(args, str(tmp_path / "trained"))
    assert engine.temperature == 0.0 and args.precision == "float32" and args.max_context == 99
    args = asked()  # nothing noted: train.py's defaults
    engine, _ = player(args, str(tmp_path / "plain"))
    assert (engine.temperature, engine.max_new_tokens, args.max_context) == (1.0, 24, 2048)


@pytest.mark.parametrize("arguments, message", [
    (["--model", "/no/such/folder"], "is not a checkpoint that transformers can load"),
    (["--split", "test"], "unknown split 'test': choose from train, valid_seen, valid_unseen"),
    (["--env", "scienceworld", "--games", "official"], "is ALFWorld's"),
    (["--task-types", "7"], "unknown task type '7' of alfworld"),
    (["--level", "L2", "--task-types", "1"], "none of the chosen --task-types is tested at level L2"),
    (["--env", "scienceworld", "--agent", "expert", "--task-types", "fly"], "unknown task type 'fly' of scienceworld"),
    (["--max-steps", "0"], "--max-steps must be at least 1"),
    (["--compare", "/no/a.json", "/no/b.json"], "No such file"),
])
def test_bad_input_is_one_clear_line(arguments, message):
    code, out, error = command(*arguments)
    assert code != 0 and message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1

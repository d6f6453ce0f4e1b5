"""experiments/: the table of runs is one that train.py accepts, rows come from finished runs only, analysis by hand."""

import copy
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import helpers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import train  # noqa: E402
from experiments import analyse, classifier_alone, prediction, run  # noqa: E402
from support.batches import sampled_logprobs  # noqa: E402


@pytest.mark.parametrize("experiment", run.EXPERIMENTS)
def test_every_arm_is_one_that_train_accepts(experiment, monkeypatch):
    _, arms, seeds = run.EXPERIMENTS[experiment]
    for arm in arms:
        monkeypatch.setattr(sys, "argv", ["train.py", *run.command_of(experiment, arm, seeds[0], 1)])
        assert train.parse_arguments().seed == seeds[0]


def make_run(folder, iterations, done, won, evaluated=True):
    """A run's folder as train.py writes it, with two games; not evaluated: as with --eval-games 0."""
    result = {"success": 0.5, "low": 0.1, "high": 0.9, "inadmissible": 0.25, "repeated": 0.5, "no_effect": 0.0,
              "played": {"b": {"won": won, "score": None, "steps": 3}, "a": {"won": True, "score": None, "steps": 4}},
              "bad_games": []}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"iterations": iterations}, file)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
        file.write(json.dumps({"iteration": 0} | ({"eval_L1": result} if evaluated else {})) + "\n")
        for i in range(1, done + 1):
            last = {"eval_L1": {**result, "success": 0.75}} if evaluated and i == iterations else {}
            file.write(json.dumps({"iteration": i, "success": 0.1 * i, "inadmissible": 0.4, "repeated": 0.1 * i,
                                   "seconds_play": 30.0, "seconds_update": 30.0, "accuracy_value_good_won": 0.5, **last}) + "\n")
    return folder


def test_only_a_finished_run_has_a_row(tmp_path):
    assert run.row_of(str(tmp_path / "none")) is None
    assert run.row_of(make_run(str(tmp_path / "half"), 2, 1, True)) is None
    row = run.row_of(make_run(str(tmp_path / "whole"), 2, 2, False), experiment="default", arm="none", seed=0)
    assert row["minutes"] == 2.0 and len(row["training"]) == 2 and row["training"][0]["accuracy_value_good_won"] == 0.5
    assert row["before"]["L1"]["won_by_game"] == "10" and row["before"]["L1"]["steps_by_game"] == [4, 3]


def test_a_run_whose_row_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    results, runs = str(tmp_path / "results.jsonl"), str(tmp_path / "runs")
    commands = []

    def pretend(command, **_):  # what train.py would leave behind
        commands.append(command[2:])
        folder = command[command.index("--resume" if "--resume" in command else "--out") + 1]
        make_run(folder, 2, 2 if "--resume" in command else 1, True)
        return type("Done", (), {"returncode": 0 if "--resume" in command else 1})

    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    monkeypatch.setattr(run.subprocess, "run", pretend)
    monkeypatch.setattr(sys, "argv", ["run.py", "default", "--arms", "none", "--seeds", "7", "--results", results, "--runs", runs])
    for expected in ("FAILED", "2.0 minutes", "done before"):  # killed, resumed, there
        with pytest.raises(SystemExit) as stopped:
            run.main()
        assert expected in capsys.readouterr().out
        assert stopped.value.code == (1 if expected == "FAILED" else 0)
    assert [("--resume" in command) for command in commands] == [False, True]
    rows = run.read_rows(results)
    assert [(row["arm"], row["seed"], row["commit"]) for row in rows] == [("none", 7, "abc1234")]


def test_a_start_that_is_not_there_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", "smollm2", "--arms", "none", "--results", str(tmp_path / "r"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit):
        run.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cache-smollm2-start-2" in said and "smollm2_start.sh" in said and not os.listdir(tmp_path)


def test_differences_are_paired_by_seed():
    arms = {"none": {0: {"x": 10.0}, 1: {"x": 30.0}, 2: {"x": 99.0}}, "value": {1: {"x": 33.0}, 0: {"x": 12.0}}}
    assert analyse.paired(arms["value"], arms["none"], "x") == [2.0, 3.0]
    mean, half = analyse.mean_and_half([2.0, 3.0])
    assert mean == 2.5 and abs(half - 12.7062 * 0.5) < 1e-3  # t(0.975, 1) * (sqrt(0.5) / sqrt(2))
    text = analyse.table(arms, ["x"], "none")
    assert "| value - none | 2 pairs | 2.5 ± 6.4 |" in text and "10.0 / 30.0 / 99.0" in text


def test_ratios_over_training_are_paired_by_seed():
    def row(arm, seed, leak, own):
        return {"experiment": "x", "arm": arm, "seed": seed,
                "coupling": [{"iteration": when, "leak_plain_repeated": leak, "own_plain_repeated": own * (1 + when / 32),
                              "leak_adam_repeated": 9.0, "own_adam_repeated": 9.0} for when in (0, 32)]}

    rows = [row("none", 0, 0.1, -0.1), row("none", 1, 0.3, -0.2), row("value", 1, 0.2, -0.4), row("value", 0, 0.1, -0.1)]
    text = analyse.coupling_table(rows, "x", "none", kinds=("repeated",))
    assert "| repeated | none | 0 | 2 | +0.20 (-1.07, +1.47) | -0.15 (-0.79, +0.49) | +1.33" in text  # 0.2 / 0.15
    assert "| repeated | value | 32 | 2 | +0.15" in text and "| value - none | 32 | 2 pairs | -0.05" in text
    assert analyse.coupling_table([{"experiment": "x", "arm": "none", "seed": 0}], "x", "none") == ""
    # Through Adam: other columns of the rows, and leak + own in the ratio's place. None: 100 - 300, 100 - 302; t(0.975, 1) = 12.706
    for row, own in zip(rows, (-300.0, -302.0, -304.0, -306.0)):
        row["coupling"][-1] |= {"leak_adam_repeated": 100.0, "own_adam_repeated": own}
        del row["coupling"][0]["leak_adam_repeated"]  # as before its first update
    text = analyse.coupling_table(rows, "x", "none", ("repeated",), "adam")
    assert "| net |" in text and "| none | 0 |" not in text
    assert "| repeated | none | 32 | 2 | +100 (+100, +100) | -301 (-314, -288) | -201 (-214, -188) |" in text
    assert "| value - none | 32 | 2 pairs | +0 (+0, +0) | -4 (-29, +21) | -4 (-29, +21) |" in text  # -6 and -2, by seed
    for row in rows:
        row["date"] = "2026-11-24"  # made by the rule that was repaired
    assert analyse.coupling_table(rows, "x", "none", ("repeated",), "adam") == ""
    assert "| repeated | none | 32 | 2 |" in analyse.coupling_table(rows, "x", "none", ("repeated",))


def test_flaws_per_episode_are_share_times_steps_and_paired_by_seed():
    def row(arm, seed, share, steps):
        one = {"inadmissible": share, "repeated": 0.0, "no_effect": 0.0, "revisited": 0.0, "malformed": 0.0, "success": 0.5}
        return {"experiment": "classifier", "arm": arm, "seed": seed, "training": [one],
                "before": {"L1": one | {"inadmissible": 0.5, "steps": 20.0}}, "after": {"L1": one | {"steps": steps}}}

    rows = [row("none", 0, 0.5, 10.0), row("none", 1, 0.5, 14.0), row("value", 1, 0.75, 16.0)]
    text = analyse.per_episode(rows, "classifier")
    assert "| none | inadmissible | 10.00 ± 0.00 | 6.00 ± 12.71 | -4.00 ± 12.71 |" in text  # 5 and 7; t(0.975, 1) = 12.706
    assert "| value | inadmissible | 10.00 | 12.00 | 2.00 |" in text
    assert "| value - none, 1 pairs | inadmissible |  |  | 5.00 |" in text and "| (steps) |  |  | 2.00 |" in text


def test_a_picture_of_runs_that_were_not_evaluated_shows_their_success_in_training(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from matplotlib.collections import PathCollection
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    one = lambda success: {"inadmissible": 0.2, "repeated": 0.1, "success": success}
    rows = [{"experiment": "smollm2", "arm": arm, "seed": seed, "before": {}, "after": {}, "training": [one(start + gain), one(start + gain + 0.2)]}
            for arm, gain in (("none", 0.0), ("value", 0.3)) for seed, start in enumerate((0.1, 0.25))]
    analyse.draw(rows, "smollm2", analyse.by_arm(rows, "smollm2"), "none", str(tmp_path / "runs.png"))
    (figure,), dots = drawn, lambda axis: [[round(float(y), 6) for _, y in marks.get_offsets()]
                                           for marks in axis.collections if isinstance(marks, PathCollection)]
    assert dots(figure.axes[1]) == [[20.0, 35.0], [50.0, 65.0]]
    assert dots(figure.axes[2]) == [[30.0, 30.0], [0.0, 0.0]]  # paired by seed
    assert all("in training" in figure.axes[k].get_title() for k in (0, 1)) and (tmp_path / "runs.png").stat().st_size > 1000


def test_gains_are_paired_by_game_over_all_levels():
    won = lambda before, after: {"before": {k: {"won_by_game": v} for k, v in before.items()},
                                 "after": {k: {"won_by_game": v} for k, v in after.items()}}
    rows = [{"experiment": "official", "arm": "value", "seed": 0, **won({"L0": "0000", "L1": "1111"}, {"L0": "1111", "L1": "1111"})},
            {"experiment": "official", "arm": "none", "seed": 1, **won({"L0": "01" * 50}, {"L0": "10" * 50, "L1": "1"})},
            {"experiment": "official", "arm": "none", "seed": 0, **won({"L0": "0" * 9}, {"L0": "1" * 9})}]
    lines = analyse.by_game(rows, "official").splitlines()[2:]
    assert lines[0] == "| none | 0 | 9 | 0.0 | 100.0 | +100.0 (+100.0, +100.0) |"  # no game differs in its gain: no width
    assert lines[1].startswith("| none | 1 | 100 | 50.0 | 50.0 | +0.0 (-")  # every game changes: wide, though the shares are the same
    low, high = (float(x) for x in lines[1].split("(")[1].split(")")[0].split(","))
    assert abs(low + 19.6) < 2 and abs(high - 19.6) < 2  # normal theory: 1.96 * 100 / sqrt(100)
    assert lines[2].startswith("| value | 0 | 8 | 50.0 | 100.0 | +50.0 (")
    assert analyse.by_game([{**rows[0], "before": {}}], "official") == ""
    uneven = won({"L0": "000", "L1": "1"}, {"L0": "11", "L1": "11"})  # as many in all, but a game was left out of each
    assert analyse.by_game([{**rows[0], **uneven}], "official") == ""


def test_what_a_run_ends_with_is_evaluated_once(tmp_path, monkeypatch):
    asked = []

    def pretend(command, stdout, **_):
        asked.append(command[2:])
        model = command[command.index("--model") + 1]
        won = {"start": [False, False], "run/checkpoint-000009": [False, True]}[model.removeprefix(f"{tmp_path}/")]
        stdout.write(json.dumps({"success": sum(won) / 2, "played": {
            name: {"won": w, "score": None, "steps": 2} for name, w in zip("ab", won)}}))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(run.subprocess, "run", pretend)
    monkeypatch.setitem(run.ENDS, "x", [f"--games generated --level {level} --count 2" for level in ("L1", "L2")])
    for name in ("run/checkpoint-000008", "run/checkpoint-000009", "x"):
        os.makedirs(tmp_path / name)
    args = type("Args", (), {"runs": str(tmp_path), "workers": 1})
    for _ in range(2):
        found = run.ends("x", str(tmp_path / "run"), ["--env", "alfworld", "--model", str(tmp_path / "start")], args)
        for level in ("L1", "L2"):
            assert found["before"][level]["won_by_game"] == "00" and found["after"][level]["won_by_game"] == "01"
    assert len(asked) == 4 and [one[3] for one in asked] == ["L1", "L1", "L2", "L2"]  # each of them once


def test_evaluations_can_come_later(tmp_path, monkeypatch, capsys):
    """--ends-later: a row of the training alone; without it the same run gets a row with its evaluations, is not trained again, and
    counts once."""
    results, runs, trained = str(tmp_path / "results.jsonl"), str(tmp_path / "runs"), []

    def pretend(command, **_):
        trained.append("--resume" not in command)
        make_run(command[command.index("--resume" if "--resume" in command else "--out") + 1], 2, 2, False, evaluated=False)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    monkeypatch.setattr(run.subprocess, "run", pretend)
    monkeypatch.setattr(run, "ends", lambda *_: {"before": {"L1": {"success": 0.25}}, "after": {"L1": {"success": 0.5}}})
    arguments = ["run.py", "parts", "--arms", "flawed", "--seeds", "7", "--results", results, "--runs", runs]
    for more, expected in ((["--ends-later"], "2.0 minutes"), (["--ends-later"], "done before"), ([], "L1 50.0%"), ([], "done before")):
        monkeypatch.setattr(sys, "argv", arguments + more)
        with pytest.raises(SystemExit) as stopped:
            run.main()
        assert expected in capsys.readouterr().out and stopped.value.code == 0
    assert sum(trained) == 1
    before, after = run.read_rows(results)
    assert not before["after"] and after["after"]["L1"]["success"] == 0.5 and run.read_runs(results) == [after]
    assert {**after, "before": {}, "after": {}} == {**before, "before": {}, "after": {}}


def test_prediction_points_by_hand(tmp_path, monkeypatch):
    """Leak and own correction come from the right runs' iteration 0 or the right file, what became of a flaw is
    counted per episode (share x steps), rare kinds are left out, other arms count nowhere."""
    def row(arm, seed, leak, after):
        shares = {kind: 0.0 for kind in prediction.FLAWS}
        return {"experiment": "classifier", "arm": arm, "seed": seed,
                "coupling": [{"iteration": 0, "leak_plain_repeated": leak, "own_plain_repeated": -0.5,
                              "leak_plain_malformed": 1.0, "own_plain_malformed": 1.0},
                             {"iteration": 16, "leak_plain_repeated": 9.0, "own_plain_repeated": 9.0}],
                "before": {"L1": {**shares, "steps": 20.0, "repeated": 0.25, "malformed": 0.001}},
                "after": {"L1": {**shares, "steps": 10.0, "repeated": after, "malformed": 0.5}}}
    rows = [row("none", 0, 0.1, 0.5), row("none", 1, 0.3, 0.25), row("value", 0, 7.0, 0.9)]
    starts = [("reads", None, "classifier", "none"), ("not run", None, "default", "none")]
    (name, kind, cells, grown), = prediction.points(rows, starts)
    assert (name, kind, grown) == ("reads", "repeated", [1.0, 0.5])  # 5 times and 2.5 an episode, of 5
    assert [cell["net"] for cell in cells] == pytest.approx([-0.4, -0.2])
    monkeypatch.setattr(prediction, "HERE", str(tmp_path))
    draws = [{"plain": {"repeated": {"leak": 0.2, "own": 0.0, "net": 0.2}}}, {"games": []}]  # one had no gradient
    (tmp_path / "draws.jsonl").write_text("".join(json.dumps(draw) + "\n" for draw in draws))
    (*_, cells, _), = prediction.points(rows, [("file", "draws.jsonl", "classifier", "value")])
    assert [cell["net"] for cell in cells] == [0.2]


def test_the_spread_of_the_rank_correlation_knows_what_is_uncertain():
    """Where draws and runs agree resampling changes nothing; where they do not, it does, unless one start's draws move all
    of its flaws together."""
    sure = [("a", str(i), [{"net": x}] * 3, [y] * 3) for i, (x, y) in enumerate([(0, 3), (1, 2), (2, 1), (3, 0), (4, 4)])]
    value, within, among = prediction.correlation(sure, "net")
    assert value == pytest.approx(0.0) and within == pytest.approx((0.0, 0.0))
    assert among[0] == pytest.approx(-among[1]) and among[1] == pytest.approx(0.8822, abs=1e-3)  # tanh(1.96 / sqrt 2)
    together = [("a", str(i), [{"net": x}, {"net": x + 6}], [y, y]) for i, (x, y) in enumerate([(0, 0), (1, 1), (2, 2), (3, 3)])]
    assert prediction.correlation(together, "net")[1] == pytest.approx((1.0, 1.0))
    unsure = [(str(i), "flaw", [{"net": x}, {"net": x + 6}], [y, y]) for i, (x, y) in enumerate([(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])]
    value, (low, high), _ = prediction.correlation(unsure, "net")
    assert value == pytest.approx(1.0) and low < 0.3 < high


def test_arms_are_drawn_back_to_one_distance(model, episodes):
    """Classification alone is compared at equal KL: whichever policy went further is moved back until it is within 2% of
    the other's, along the straight line, on which its start does not move; and one that is there already stays."""
    args, start = SimpleNamespace(temperature=1.0, micro_tokens=8192), copy.deepcopy(model)
    batch = helpers.make_batch(episodes, helpers.advantages_of(episodes))
    batch.ref_logprobs = sampled_logprobs(start, batch, 1.0, 8192)
    assert classifier_alone.distance(args, start, batch) == 0.0
    torch.manual_seed(0)
    far = [(p + 0.1 * torch.randn_like(p)).detach() for p in model.parameters()]
    whole = None
    for part in (1.0, 0.5, 0.01):
        for p, f in zip(model.parameters(), far):
            p.data.copy_(f)
        whole = whole or classifier_alone.distance(args, model, batch)
        kl, share = classifier_alone.draw_back(args, model, start, batch, part * whole)
        assert kl == pytest.approx(part * whole, rel=0.02)
        assert kl == pytest.approx(classifier_alone.distance(args, model, batch))
        assert share == 1.0 if part == 1.0 else 0 < share < 1
        for p, f, s in zip(model.parameters(), far, start.parameters()):
            assert torch.allclose(p, s + share * (f - s), atol=1e-6)


def test_drawing_back_finds_a_distance_that_rises_steeply_at_the_end(monkeypatch):
    """KL as the tenth power of the way: steps that take it for the square overshoot the end and come back no more, as
    they did in five of forty pairs (docs/coupling.md, (ii))."""
    start, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    start.weight.data.fill_(0.0)
    monkeypatch.setattr(classifier_alone, "distance", lambda args, model, batch: model.weight.item() ** 10)
    for target in (0.9, 0.5, 0.1):
        model.weight.data.fill_(1.0)
        kl, share = classifier_alone.draw_back(None, model, start, None, target)
        assert kl == pytest.approx(target, rel=0.02) and model.weight.item() == pytest.approx(share)
        assert share == pytest.approx(target ** 0.1, rel=0.003)


def test_first_attempts_by_hand():
    """Of the half of the steps that are no repeat 60% are inadmissible."""
    result = {"success": 0.5, "inadmissible": 0.7, "repeated": 0.5, "no_effect": 0.0, "flawed": 0.8, "inadmissible_anew": 0.3}
    found = analyse.outcomes({"training": [{"inadmissible": 0.5, "repeated": 0.2, "success": 0.0}], "before": {}, "after": {"L1": result}})
    assert found["any flaw, L1 after"] == pytest.approx(80.0) and found["inadmissible of no repeats, L1 after"] == pytest.approx(60.0)

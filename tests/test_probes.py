"""Watching a run: what train.py --probes --coupling-every logs, and that it leaves the run as it is."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from games import levels
from support import coupling_dynamics, curves, policies, probes
from support.setup import ADAMW

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--games", "generated", "--iterations", "3", "--tasks", "2", "--group-size", "6", "--max-steps", "10",
         "--eval-games", "1", "--save-every", "1", "--workers", "1", "--classifier", "both", "--seed", "2",
         "--warmup-updates", "1"]  # too few for teach_words, which they could not make good
WATCHED = ("probe_", "leak_", "own_")


def start(*arguments):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *map(str, arguments)], text=True,
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows_of(folder, watched):
    """The lines of metrics.jsonl without clocks: what the watching adds, or all else."""
    wanted = lambda key: key.startswith(WATCHED) == watched and not key.startswith(("seconds", "worker"))
    return [{k: v for k, v in row.items() if wanted(k)} for row in curves.read_metrics(folder)]


@pytest.mark.long
def test_a_watched_run_is_the_same_run_bit_for_bit_and_resumes(tmp_path):
    """With and without; killed after the second iteration and resumed. The shipped policy, which wins now and
    then: a policy that never wins has no gradient to split."""
    plain, watched, killed, file = (tmp_path / name for name in ("plain", "watched", "killed", "probes"))
    run = start(*SMALL, "--out", plain)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    watch = ["--probes", file, "--coupling-every", "1"]
    run = start(*SMALL, *watch, "--out", watched)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert rows_of(watched, False) == rows_of(plain, False) and not any(rows_of(plain, True))
    a, b = (policies.load_policy(str(f / "checkpoint-000003"))[0].state_dict() for f in (plain, watched))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(f / "checkpoint-000003" / "trainer.pt", weights_only=True) for f in (plain, watched))
    assert all(torch.equal(a["optimizer"]["state"][i]["exp_avg"], one["exp_avg"])
               for i, one in b["optimizer"]["state"].items())

    rows = rows_of(watched, True)
    assert all(row["probe_margin"] == pytest.approx(row["probe_good"] - row["probe_flawed"]) for row in rows)
    split = [i for i, row in enumerate(rows) if "leak_plain_flawed" in row]  # not where each group ends alike
    assert split and all(rows[i]["own_plain_flawed"] != 0 for i in split)
    assert all(("leak_adam_flawed" in rows[i]) == (i > 0) for i in split)  # no moments before a step
    assert rows[0]["probe_good"] != rows[3]["probe_good"]

    run = start(*SMALL, *watch, "--out", killed)
    for line in run.stdout:
        if line.lstrip().startswith("2/3"):
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    run = start("--resume", killed)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert rows_of(killed, True) == rows and rows_of(killed, False) == rows_of(plain, False)


def test_no_iteration_plays_the_games_of_the_split_update():
    args = SimpleNamespace(seed=0, tasks=6)
    run = SimpleNamespace(args=args, games=levels.level_games("alfworld", "L1", "train", "generated"))
    games, seed = coupling_dynamics.games_apart(run)
    names = {game.name for game in games}
    assert len(names) == 8 and (games, seed) == coupling_dynamics.games_apart(run)
    for iteration in range(33):
        assert not names & {game.name for game in levels.sample_games(run.games, 16, iteration)}


def test_log_probabilities_of_probes_are_the_model_s_own(model, chat, pool):
    """Against plain logits, at a temperature, whatever the size of a micro-batch."""
    games = [levels.generated_game("valid_unseen", seed) for seed in range(12)]
    seen = probes.encode(probes.make_probes(games, pool, 15, count=10), chat)
    found = probes.probe_logprobs(model, seen, temperature=0.7, micro_tokens=600)
    for probe, value in zip(seen, found):
        logits = torch.log_softmax(model(input_ids=torch.tensor([probe.tokens])).logits[0].double() / 0.7, -1)
        expected = sum(logits[t - 1, probe.tokens[t]] for t, counts in enumerate(probe.mask) if counts)
        assert value.item() == pytest.approx(expected.item(), abs=1e-3)
    assert torch.allclose(found, probes.probe_logprobs(model, seen, 0.7, 10**6), atol=1e-4)


def test_moments_of_a_run_lose_their_bias_and_are_0_of_frozen_weights(model):
    """Under a constant gradient g the estimate is g^2, however few steps were made."""
    frozen, *trained = model.parameters()
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, **ADAMW)
    run = SimpleNamespace(model=model, optimizer=optimizer)
    assert coupling_dynamics.moments(run) is None
    for _ in range(3):
        for p in trained:
            p.grad = torch.full_like(p, 0.3)
        run.optimizer.step()
    first, *others = coupling_dynamics.moments(run)([torch.full_like(p, 0.3 * p.requires_grad) for p in model.parameters()])
    assert not first.any() and all(torch.allclose(v, torch.full_like(v, 0.09)) for v in others)


@pytest.mark.parametrize("arguments, message", [
    (["--probes", os.path.join(ROOT, "README.md")], "not a file of probes"),
    (["--probes", "/proc/nowhere/probes.jsonl"], "--probes /proc/nowhere/probes.jsonl: "),
    (["--coupling-every", "1", "--precision", "bfloat16"], "do not go with a policy in bfloat16"),
])
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    run = start(*SMALL, "--out", tmp_path / "run", *arguments)
    output = run.communicate()[0]
    assert run.returncode == 1 and message in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_curves_have_a_panel_more_where_a_run_was_watched(tmp_path, monkeypatch):
    titles = []

    def draw(*rows):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(curves.plt, "close", lambda figure: titles.append(
            [axis.get_title() for axis in figure.axes if axis.get_visible()]))
        curves.draw([str(tmp_path)], str(tmp_path / "curves.png"))
        return titles[-1]

    row = {"iteration": 1, "success": 0.5, "inadmissible": 0.1}
    assert len(draw(row)) == 4
    assert len(draw(row, {**row, "probe_good": -1.0, "probe_flawed": -2.0, "probe_margin": 1.0})) == 5
    everything = draw({**row, "probe_good": -1.0, "leak_plain_flawed": 0.1, "own_adam_flawed": -0.1})
    assert len(everything) == 7 and any("through Adam" in title for title in everything)

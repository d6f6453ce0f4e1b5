"""The loop as a user runs it: what it writes, resumed against uninterrupted, bad input."""

import glob
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--games", "generated", "--iterations", "4", "--tasks", "2", "--group-size", "2", "--max-steps", "4",
         "--eval-games", "3", "--save-every", "2", "--workers", "1", "--classifier", "both", "--updates", "2", "--warmup-updates", "2", "--epo",
         "0.01"]


@pytest.fixture(scope="module")
def small_policy(tokenizer, tmp_path_factory):
    from support import policies
    folder = str(tmp_path_factory.mktemp("policy") / "small")
    model = policies.tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=0)
    policies.save_policy(folder, model, tokenizer, prompt="short", note="random weights, for tests")
    return folder


def start(*arguments):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            # a shell's background jobs ignore Ctrl-C, and so would what they start
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.fixture(scope="module")
def whole_run(small_policy, tmp_path_factory):
    """(folder, what it printed) of an uninterrupted run."""
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    run = start("--model", small_policy, "--out", out, *SMALL)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    return out, output


def metrics(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "worker"))} for row in rows]


def test_a_killed_run_resumes_to_the_same_numbers(small_policy, whole_run, tmp_path):
    """kill -9 right after the third iteration's line, one iteration past a checkpoint; then --resume."""
    whole, killed = whole_run[0], str(tmp_path / "killed")
    for name in ("config.json", "metrics.jsonl", "curves.png", "checkpoint-000004/trainer.pt", "samples/iteration-000004.txt"):
        assert os.path.getsize(os.path.join(whole, name)) > 0
    with open(os.path.join(whole, "config.json")) as file:
        config = json.load(file)
    assert config["machine"]["torch"] == torch.__version__ and config["machine"]["cores"] == os.cpu_count()
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(whole))

    run = start("--model", small_policy, "--out", killed, *SMALL)
    for line in run.stdout:
        if line.lstrip().startswith("3/4"):
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert "checkpoint-000002" in os.listdir(killed) and "checkpoint-000004" not in os.listdir(killed)
    run = start("--resume", killed)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert metrics(killed) == metrics(whole)
    from support.policies import load_policy
    a, b = (load_policy(os.path.join(f, "checkpoint-000004"))[0].state_dict() for f in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    start_weights = load_policy(small_policy)[0].state_dict()
    assert any(not torch.equal(a[name], start_weights[name]) for name in a)  # something was learnt at all


@pytest.mark.long
def test_limits_of_steps_by_task_go_through_a_whole_run(tmp_path):
    """Two tasks of ScienceWorld, 40 and 30 steps: played, written down, resumed, evaluated, reported."""
    out = str(tmp_path / "run")
    run = start("--env", "scienceworld", "--model", os.path.join(ROOT, "policies", "tiny-scienceworld"), "--task-types", "find-plant", "boil",
                "--iterations", "1", "--tasks", "2", "--group-size", "2", "--updates", "1", "--eval-games", "4", "--warmup-updates", "0",
                "--workers", "1", "--out", out)
    output = run.communicate()[0]
    assert run.returncode == 0 and "30 to 40 steps by task" in output, output
    with open(os.path.join(out, "config.json")) as file:
        config = json.load(file)
    assert config["max_steps"] == {"boil": 40, "find-plant": 30}
    for name, game in metrics(out)[-1]["eval_L1"]["played"].items():
        assert game["steps"] <= config["max_steps"]["boil" if "boil" in name else "find-plant"]
    with open(os.path.join(out, "config.json"), "w") as file:
        json.dump({**config, "iterations": 2}, file)
    run = start("--resume", out)
    assert run.communicate() and run.returncode == 0 and metrics(out)[-1]["iteration"] == 2
    with open(os.path.join(out, "report.html")) as file:
        assert "boil 40, find-plant 30" in file.read()


@pytest.mark.long
def test_runs_killed_at_random_moments_resume_to_the_same_numbers(small_policy, tmp_path):
    """kill -9 wherever it comes: in start-up, play, an update, a write. A LoRA run, so that its resuming is covered too."""
    options = ["--model", small_policy, *SMALL, "--save-every", "1", "--lora-rank", "2"]
    whole, rng = str(tmp_path / "whole"), random.Random(0)
    begin = time.time()
    assert start("--out", whole, *options).communicate() and os.path.exists(os.path.join(whole, "checkpoint-000004"))
    seconds = time.time() - begin
    resumed = 0
    for i in range(5):
        killed = str(tmp_path / f"killed-{i}")
        run = start("--out", killed, *options)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        run.kill()
        run.communicate()
        if not os.path.exists(os.path.join(killed, "config.json")):
            continue  # nothing had begun
        run = start("--resume", killed)
        output = run.communicate()[0]
        assert run.returncode == 0, output
        assert metrics(killed) == metrics(whole), f"killed run {i}"
        resumed += 1
    assert resumed > 0


def test_a_dead_engine_is_restarted_once_and_then_ends_the_run(monkeypatch):
    """The second engine gets the present weights before it plays."""
    from types import SimpleNamespace
    from support import run as running
    calls = []

    class Engine:
        def __init__(self, lives):
            self.lives = lives

        def load(self, weights):
            calls.append(("load", sorted(weights)))

    def play(engine, *_):
        engine.lives -= 1
        if engine.lives < 0:
            raise RuntimeError("engine core died")
        return "episodes", {}

    monkeypatch.setattr(running, "play", play)
    monkeypatch.setattr(running, "make_engine", lambda *_: calls.append("made") or Engine(1))
    args = SimpleNamespace(engine="vllm", precision="float32", device="cpu", out="runs/x", group_size=2, max_steps=1,
                              max_context=9, show_actions=False)
    run = SimpleNamespace(args=args, engine=Engine(1), pool=None, chat=None, model=torch.nn.Linear(1, 1), folder="",
                          engine_restarts=0)
    monkeypatch.setattr(running, "gather_object", lambda found: found)
    assert running.play_or_restart(run, [], 0) == ("episodes", {}) and calls == []
    assert running.play_or_restart(run, [], 0) == ("episodes", {}) and calls == ["made", ("load", ["bias", "weight"])]
    with pytest.raises(SystemExit, match="vLLM failed again .* --resume runs/x"):
        running.play_or_restart(run, [], 0)


def test_ctrl_c_says_how_to_go_on(small_policy, tmp_path):
    out = str(tmp_path / "run")
    run = start("--model", small_policy, "--out", out, *SMALL, "--iterations", "50", "--save-every", "1")
    for line in run.stdout:
        if line.lstrip().startswith("2/50"):
            break
    run.send_signal(signal.SIGINT)
    output = run.communicate()[0]
    assert run.returncode != 0 and f"Go on from the last checkpoint with: python train.py --resume {out}" in output
    assert "Traceback" not in output and not any(n.endswith(".partial") for n in os.listdir(out))


def test_a_full_disk_is_one_clear_line_and_loses_nothing(small_policy, tmp_path):
    """A real one: the run's folder on a file system of one megabyte, where we may mount one."""
    out = tmp_path / "disk"
    out.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(out)], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        run = start("--model", small_policy, "--out", str(out / "run"), *SMALL, "--save-every", "1", "--iterations", "8")
        output = run.communicate()[0]
        assert run.returncode != 0 and "cannot write to --out" in output and "--resume" in output, output
        assert "Traceback" not in output and not any(n.endswith(".partial") for n in os.listdir(out / "run"))
    finally:
        subprocess.run(["umount", "-l", str(out)])


def test_metrics_have_what_the_readme_promises(whole_run):
    out, output = whole_run
    head = output.splitlines()[:6]
    assert [line.split()[0] for line in head] == ["games", "model", "engine", "update", "loss", "output"]
    assert all("(--" in line for line in head)  # each with the flag that changes it
    rows = metrics(out)
    assert rows[0]["eval_L1"]["games"] == 3 and rows[4]["eval_L0"]["games"] == 3
    wanted = {"success", "reward", "malformed", "inadmissible", "no_effect", "repeated", "groups_without_signal",
              "policy_loss", "generative_loss", "value_loss", "kl", "clip_fraction", "entropy", "tokens"}
    assert all(wanted - {"generative_loss"} <= set(row) for row in rows[1:])
    assert all(0 <= row["accuracy_value_bad_lost"] <= 1 and row["count_value_bad_lost"] > 0 for row in rows[1:])
    assert {"grad_norm_grpo", "grad_norm_classifier"} <= set(rows[1]) and "grad_norm_grpo" not in rows[2]
    assert all(row["engine_gap"] < 1e-4 for row in rows[1:])


@pytest.mark.parametrize("arguments, message", [
    (["--model", "/no/such/folder"], "is not a checkpoint that transformers can load"),
    (["--resume", "/no/such/run"], "no config.json of a run"),
    (["--group-size", "1"], "--group-size must be at least 2"),
    (["--updates", "99"], "--updates 99 leaves no whole group"),
    (["--temperature", "0"], "--temperature must be positive"),
    (["--iterations", "0"], "--iterations must be at least 1"),
    (["--max-context", "60"], "--max-context 60 is too small"),
    (["--out", "/proc/nowhere"], "cannot write to --out /proc/nowhere"),
    (["--env", "scienceworld"], "--games generated is ALFWorld's"),
    (["--level", "L2", "--task-types", "5", "6"], "none of the chosen --task-types is trained at level L2"),
    (["--task-types", "fly"], "unknown task type 'fly'"),
    (["--lora-rank", "-1"], "--lora-rank must not be negative"),
    (["--norms-every", "0"], "--norms-every must be at least 1"),
    (["--lr", "0"], "--lr must be positive"),
    (["--coupling-every", "-1"], "--coupling-every must not be negative"),
    (["--kl-coef", "-1"], "--kl-coef must not be negative"),
    (["--device", "nonsense"], "--device nonsense cannot be used here"),
    (["--out", "HOLDS-A-RUN"], "there is a run in it: go on with --resume"),
    (["--resume", "CHECKPOINT"], "no config.json of a run in there; did you mean --resume"),
    (["--tis-clip", "0"], "--tis-clip must be positive"),
    (["--labels", "critic"], "--labels critic needs --critic-url and --critic-model"),
    (["--control", "stop-gradient", "--classifier", "generative"], "has no head of its own to learn"),
    (["--control", "shuffled"], "add --classifier value"),
    (["--head-layer", "9", "--classifier", "value"], "hidden states are numbered 0 to 2"),
    (["--credit", "rlvmr"], "needs a policy that was taught tags"),
    (["--model", "no-template"], "has no chat template: use an instruction-tuned model"),
    (["--model", "torn"], "is not a checkpoint that transformers can load"),
    pytest.param(["--engine", "vllm"], "--engine vllm needs vLLM", marks=pytest.mark.skipif(
        importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")),
])
def test_bad_input_is_one_clear_line(arguments, message, small_policy, whole_run, tmp_path, monkeypatch, capsys):
    """In this process, since importing torch twenty times takes two minutes; what is no SystemExit fails the test."""
    there = {"HOLDS-A-RUN": whole_run[0], "CHECKPOINT": os.path.join(whole_run[0], "checkpoint-000004")}
    arguments = [there.get(one, one) for one in arguments]
    before = sorted((path, os.path.getmtime(path)) for path in glob.glob(os.path.join(whole_run[0], "**"), recursive=True))
    if "--out" not in arguments and "--resume" not in arguments:
        arguments = ["--out", str(tmp_path / "run"), *arguments]
    if "--model" not in arguments:
        arguments = ["--model", small_policy, *arguments]
    if arguments[-1] in ("no-template", "torn"):
        broken = str(tmp_path / arguments[-1])
        shutil.copytree(small_policy, broken)
        if arguments[-1] == "torn":
            os.truncate(os.path.join(broken, "model.safetensors"), 1000)
        else:
            os.remove(os.path.join(broken, "chat_template.jinja"))
        arguments = [*arguments[:-1], broken]
    monkeypatch.setattr(sys, "argv", ["train.py", "--games", "generated", "--workers", "1", "--eval-games", "0", *arguments])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code != 0 and message in f"{stopped.value.code}{capsys.readouterr().err}"
    assert before == sorted((path, os.path.getmtime(path)) for path in glob.glob(os.path.join(whole_run[0], "**"), recursive=True))


def test_bad_input_is_one_clear_line_on_the_screen_too():
    run = start("--model", "/no/such/folder")
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output
    assert output.splitlines()[-1].startswith("train.py: /no/such/folder is not a checkpoint that transformers can load")


def test_checkpoints_appear_complete_or_not_at_all(tokenizer, model, tmp_path, monkeypatch):
    """A write that fails half-way leaves the old folder as it was."""
    from support import policies
    folder = str(tmp_path / "policy")
    policies.save_policy(folder, model, tokenizer, version=1)
    before = sorted(os.listdir(folder))

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError):
        policies.save_policy(folder, model, tokenizer, version=2)
    assert sorted(os.listdir(folder)) == before
    with open(os.path.join(folder, "notes.json")) as file:
        assert json.load(file) == {"version": 1}


def test_the_oracle_s_labels_are_trained_on_and_counted_in_all_four_cells(tmp_path):
    """The shipped policy wins some and loses some: whatever the label source, both outcomes show both classes."""
    out = str(tmp_path / "run")
    run = start("--games", "generated", "--iterations", "1", "--tasks", "4", "--group-size", "4", "--eval-games", "0", "--workers",
                "1", "--warmup-updates", "0", "--labels", "oracle", "--credit", "adca", "--classifier", "value", "--out", out)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    row = metrics(out)[1]
    assert all(row[f"count_value_{label}_{outcome}"] > 0 for label in ("good", "bad") for outcome in ("won", "lost"))

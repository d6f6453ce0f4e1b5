"""Two processes through accelerate: the same gradients as one, and a run from end to end."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from support.batches import make_question
from support import policies
from helpers import advantages_of, make_batch, micro_batches, update

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHILD = """
import pickle, sys, torch
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from accelerate import Accelerator
from support.processes import shard, whole
from helpers import update
accelerator = Accelerator(cpu=True)
with open(sys.argv[1], "rb") as file:
    model, head, batch, question = pickle.load(file)
if sys.argv[3] == "sharded":
    shard(model)
    assert all(p.to_local().numel() <= p.numel() // 2 for p in model.parameters())
optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1.0)  # Adam would hide a wrong scale
stats = update(model, head, optimizer, batch, question, kl_coef=0.0, classifier_coef=0.3, max_tokens=int(sys.argv[4]), accelerator=accelerator)
weights = whole(model.state_dict())
if accelerator.process_index == 1:  # not the first: all must arrive at the same weights
    torch.save((weights, head.state_dict(), stats), sys.argv[1] + ".out")
accelerator.end_training()
"""


def launch(*arguments, **keywords):
    # `accelerate launch` starts several processes on GPUs; on a CPU it wants MPI, and torchrun does without.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **keywords)


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_two_processes_make_the_single_process_s_step(how, model, chat, episodes, tmp_path):
    """Micro-batches are shared out, weights and gradients are those of the whole batch; both classifier losses on."""
    question = make_question(chat)
    batch, head = make_batch(episodes, advantages_of(episodes)), torch.nn.Linear(32, 1)
    size = next(n for n in range(200, 2000, 50) if len(micro_batches(batch.episodes, n)) in (3, 5))  # one process has more to do
    path = str(tmp_path / "work.pickle")
    with open(path, "wb") as file:
        pickle.dump((model, head, batch, question), file)
    alone, alone_head = copy.deepcopy(model), copy.deepcopy(head)
    optimizer = torch.optim.SGD([*alone.parameters(), *alone_head.parameters()], lr=1.0)
    stats = update(alone, alone_head, optimizer, batch, question, kl_coef=0.0, classifier_coef=0.3, max_tokens=size)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = launch(str(script), path, ROOT, how, str(size))
    assert done.returncode == 0, done.stderr[-2000:]
    weights, head_weights, theirs = torch.load(path + ".out")
    before = model.state_dict()
    assert stats["grad_norm"] > 1.0  # so it was clipped
    assert any(not torch.equal(before[n], w) for n, w in weights.items())
    for mine, other in ((alone.state_dict(), weights), (alone_head.state_dict(), head_weights)):
        assert all(torch.allclose(mine[n], other[n], atol=1e-5) for n in mine)
    assert stats.keys() == theirs.keys()
    assert all(abs(stats[n] - theirs[n]) < 1e-4 for n in stats), (stats, theirs)


def rows_of(out):
    with open(os.path.join(out, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("how", [[], pytest.param(["--shard"], marks=pytest.mark.long)])
def test_a_run_of_two_processes(how, tokenizer, tmp_path):
    folder, out = str(tmp_path / "policy"), str(tmp_path / "run")
    model = policies.tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=0)
    policies.save_policy(folder, model, tokenizer, prompt="short")
    options = ["--games", "generated", "--model", folder, "--iterations", "2", "--tasks", "4", "--group-size", "2",
               "--max-steps", "3", "--eval-games", "2", "--workers", "2", "--device", "cpu", "--save-every", "1",
               "--classifier", "value", *how]
    done = launch("train.py", "--out", out, *options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "2 processes" in done.stdout and done.stdout.count("output ") == 1
    rows = rows_of(out)
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[1]["steps"] == 3.0
    model, _ = policies.load_policy(os.path.join(out, "checkpoint-000002"))
    with open(os.path.join(out, "checkpoint-000002", "config.json")) as file:
        assert json.load(file)["architectures"] == ["Qwen2ForCausalLM"]
    # killed after the first iteration, it goes on to the same numbers and weights
    shutil.rmtree(os.path.join(out, "checkpoint-000002"))
    done = launch("train.py", "--resume", out)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    timeless = lambda row: {k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k}
    assert list(map(timeless, rows_of(out))) == list(map(timeless, rows))
    again, _ = policies.load_policy(os.path.join(out, "checkpoint-000002"))
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())


DYING_ENGINE = """
import pickle, sys, torch
from types import SimpleNamespace
sys.path.insert(0, sys.argv[2])
from accelerate import Accelerator
from support import run as running
from support.processes import shard
accelerator = Accelerator(cpu=True)
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
whole = {n: p.clone() for n, p in model.state_dict().items()}
shard(model)
calls, rank = [], accelerator.process_index

class Engine:
    def load(self, weights):
        assert all(torch.equal(weights[n], p) for n, p in whole.items())
        calls.append("load")

def play(engine, pool, chat, games, *_):
    if rank == 1 and "died" not in calls:
        calls.append("died")
        raise RuntimeError("engine core died")
    return [SimpleNamespace(group=0, steps=[1])], {"sample": 1.0 + rank, "env": 2.0, "bad_games": ["x"] * rank}

running.play, running.make_engine = play, lambda *_: Engine()
args = SimpleNamespace(engine="vllm", group_size=2, max_steps=1, max_context=9, show_actions=False, out="", reward="score")
run = SimpleNamespace(args=args, accelerator=accelerator, engine=Engine(), pool=SimpleNamespace(restarts=1), chat=None,
                      model=model, folder="", engine_restarts=0, bad_games=set())
episodes, report = running.collect_episodes(run, ["a", "b"], 0)
assert calls == (["died", "load"] if rank else []), calls
assert [e.group for e in episodes] == [0, 1]
assert report == {"seconds_sample": 2.0, "seconds_env": 2.0, "bad_games": ["x"], "worker_restarts": 2}
print("fine", rank)
accelerator.end_training()  # without it gloo's threads abort one run in many while Python shuts down
"""


def test_one_process_s_dead_engine_is_restarted_with_spread_weights(model, tmp_path):
    """Regression: the process whose engine had died gathered the spread weights alone, and waited for ever. And what the
    log says of bad games, seconds and restarts is of all processes, not of the first one."""
    path, script = str(tmp_path / "model.pickle"), tmp_path / "child.py"
    with open(path, "wb") as file:
        pickle.dump(model, file)
    script.write_text(DYING_ENGINE)
    done = launch(str(script), path, ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout.count("fine") == 2, done.stdout + done.stderr[-2000:]

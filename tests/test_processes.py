"""Two processes through accelerate: the same gradients as one, and a run from end to end."""

import copy
import json
import os
import pickle
import subprocess
import sys

import torch

import policy
from update import advantages_of, make_batch, update

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHILD = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[2])
from accelerate import Accelerator
from update import update
world = Accelerator(cpu=True)
with open(sys.argv[1], "rb") as file:
    model, head, batch, question = pickle.load(file)
optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
stats = update(model, head, optimizer, batch, question, kl_coef=0.0, classifier_coef=0.3, max_tokens=200, world=world)
if world.process_index == 1:  # not the first: all must arrive at the same weights
    torch.save((model.state_dict(), head.state_dict(), stats), sys.argv[1] + ".out")
"""


def launch(*arguments, **keywords):
    # `accelerate launch` starts several processes on GPUs; on a CPU it wants MPI, and torchrun does without.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **keywords)


def test_two_processes_make_the_single_process_s_step(model, chat, episodes, tmp_path):
    """Micro-batches are shared out, weights and gradients are those of the whole batch; both classifier losses on."""
    from classifier_loss import BAD, GOOD
    encode = lambda text: chat.tokenizer.encode(text, add_special_tokens=False)
    question = (chat.next_prompt(policy.QUESTION), {GOOD: encode("good"), BAD: encode("bad")})
    batch, head = make_batch(episodes, advantages_of(episodes)[0], questions_per_episode=2), torch.nn.Linear(32, 1)
    path = str(tmp_path / "work.pickle")
    with open(path, "wb") as file:
        pickle.dump((model, head, batch, question), file)
    alone, alone_head = copy.deepcopy(model), copy.deepcopy(head)
    optimizer = torch.optim.AdamW([*alone.parameters(), *alone_head.parameters()], lr=1e-2)
    stats = update(alone, alone_head, optimizer, batch, question, kl_coef=0.0, classifier_coef=0.3, max_tokens=200)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = launch(str(script), path, ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, head_weights, theirs = torch.load(path + ".out")
    before = model.state_dict()
    assert any(not torch.equal(before[n], w) for n, w in weights.items())
    for mine, other in ((alone.state_dict(), weights), (alone_head.state_dict(), head_weights)):
        assert all(torch.allclose(mine[n], other[n], atol=1e-5) for n in mine)
    assert stats.keys() == theirs.keys()
    assert all(abs(stats[n] - theirs[n]) < 1e-4 for n in stats), (stats, theirs)


def test_a_run_of_two_processes(tokenizer, tmp_path):
    folder, out = str(tmp_path / "policy"), str(tmp_path / "run")
    model = policy.tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=0)
    policy.save_policy(folder, model, tokenizer, prompt="short")
    done = launch("train.py", "--games", "generated", "--model", folder, "--out", out, "--iterations", "2", "--tasks", "4",
                  "--group-size", "2", "--max-steps", "3", "--eval-games", "2", "--workers", "2", "--device", "cpu")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "2 processes" in done.stdout and done.stdout.count("output ") == 1
    with open(os.path.join(out, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[1]["steps"] == 3.0
    assert os.path.isdir(os.path.join(out, "checkpoint-000002"))

"""LoRA, half precision, chunked log-probabilities, importance weights, checkpoints that survive."""

import copy
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest
import torch

from support import policies
from support.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from grpo import grpo_loss, truncated_importance
from actor import token_logprobs
from helpers import advantages_of, lay_out, make_batch, sampled_logprobs, update

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    policies.save_policy(str(tmp_path / "start"), model, tokenizer, prompt="short")
    return str(tmp_path / "start")


def step(model, episodes, lr=1e-2, value_head=None, optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch = make_batch(episodes, advantages_of(episodes))
    return update(model, value_head, optimizer, batch, **options), optimizer


def test_chunked_log_probabilities_have_the_full_ones_values_and_gradients():
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 300, bias=False), torch.randn(50, 16), torch.randint(300, (50,))
    found = []
    for limit in (2**24, 7 * 300):  # at once; in eight chunks
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(leaf, head, targets, 0.7, limit)
        (logprobs * torch.linspace(-1, 1, 50)).sum().backward()
        found.append((logprobs.detach(), entropy, leaf.grad, head.weight.grad.clone()))
    full = torch.log_softmax(head(hidden) / 0.7, -1)
    assert torch.allclose(found[0][0], full.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(found[0][1], torch.distributions.Categorical(logits=full).entropy(), atol=1e-5)
    for one, two in zip(*found):
        assert torch.allclose(one, two, atol=1e-5)


def test_truncated_importance_weights_turn_the_sampler_s_mean_into_the_trainer_s():
    """Exactly, by enumeration of three actions: E_sampler[w A] = E_trainer[A] while no weight is cut; one that is cut
    counts as much less as it was cut. The gradient of the loss at ratio 1 is the weighted policy gradient."""
    trainer, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.6, 0.15])
    gain = torch.tensor([1.0, -2.0, 3.0])
    weight = truncated_importance(trainer.log(), sampler.log(), 10.0)
    assert (sampler * weight * gain).sum() == pytest.approx((trainer * gain).sum().item())
    weight = truncated_importance(trainer.log(), sampler.log(), 1.5)
    assert weight.tolist() == pytest.approx([1.5, 0.5, 4 / 3])
    now = trainer.log().clone().requires_grad_()
    loss, _ = grpo_loss(now, trainer.log(), gain, sampler, importance=weight)
    loss.backward()
    assert now.grad.tolist() == pytest.approx((-(sampler * weight * gain)).tolist())
    assert loss.item() == pytest.approx(-(0.25 * 1.5 * 1 + 0.6 * 0.5 * -2 + 0.15 * 4 / 3 * 3))


def test_lora_trains_its_additions_alone_and_loads_with_plain_libraries(folder, episodes, tmp_path):
    plain, reference, tokenizer = policies.trainable(folder, lora_rank=4)
    assert reference is plain
    before = {n: p.clone() for n, p in plain.named_parameters()}
    with plain.disable_adapter():
        first = sampled_logprobs(reference, lay_out(episodes), 1.0, 8192)
    step(plain, episodes)
    step(plain, episodes)
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed)
    after = sampled_logprobs(plain, lay_out(episodes), 1.0, 8192)
    with plain.disable_adapter():  # the KL's reference is what it was
        assert torch.equal(first, sampled_logprobs(reference, lay_out(episodes), 1.0, 8192))
    assert (after - first).abs().max() > 1e-3

    state = copy.deepcopy(plain.state_dict())
    out = str(tmp_path / "saved")
    policies.save_policy(out, plain, tokenizer)
    assert all(torch.equal(state[n], p) for n, p in plain.state_dict().items())  # saving merged nothing in place
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), out + "/adapter")
    for loaded in (merged, adapter):
        assert torch.allclose(sampled_logprobs(loaded, lay_out(episodes), 1.0, 8192), after, atol=1e-4)


def test_gradient_checkpointing_leaves_the_update_as_it_is(folder, episodes):
    results = []
    for keep in (False, True):
        model, *_ = policies.trainable(folder, gradient_checkpointing=keep)
        step(model, episodes)
        results.append(model.state_dict())
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])


@pytest.mark.parametrize("half_seconds, said", [(1, False), (60, True)])  # of the quickest of three
def test_where_bfloat16_is_slow_one_line_says_so(monkeypatch, capsys, half_seconds, said):
    products = [90, 1, 1] + [90, half_seconds, 90]  # seconds: in float32, then in bfloat16; one was interrupted
    clock = iter([time for seconds in products for time in (10, 10 + seconds)])
    monkeypatch.setattr("support.policies.time.perf_counter", lambda: next(clock))
    policies.note_slow_bfloat16.cache_clear()
    threads = torch.get_num_threads()
    try:
        assert policies.note_slow_bfloat16() == policies.note_slow_bfloat16() == half_seconds
    finally:
        policies.note_slow_bfloat16.cache_clear()  # the next one measures
    assert capsys.readouterr().err.count("leave --precision bfloat16 out") == said and torch.get_num_threads() == threads


def test_half_precision_computes_in_bfloat16_and_keeps_weights_in_float32(folder, episodes):
    full, *_ = policies.trainable(folder, with_reference=False)
    half, *_ = policies.trainable(folder, half=True, with_reference=False)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    a, b = (sampled_logprobs(m, lay_out(episodes), 1.0, 8192) for m in (full, half))
    assert 0 < (a - b).abs().max() < 0.5 and (a - b).abs().mean() < 0.05
    step(half, episodes, lr=1e-7)  # too small a change for bfloat16 weights
    before = full.state_dict()
    assert any(not torch.equal(before[n], p) for n, p in half.state_dict().items())
    adapted, *_ = policies.trainable(folder, half=True, lora_rank=2)
    kinds = {("lora" if "lora_" in n else "frozen", p.dtype) for n, p in adapted.named_parameters()}
    assert kinds == {("lora", torch.float32), ("frozen", torch.bfloat16)}
    stats, _ = step(adapted, episodes, value_head=torch.nn.Linear(32, 1), classifier_coef=0.3)
    assert stats["skipped"] == 0.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(model, episodes, poison):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = make_batch(episodes, torch.full((len(episodes),), poison))
    assert update(model, None, optimizer, batch)["skipped"] == 1.0
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items()) and not optimizer.state


@pytest.mark.parametrize("rank", [0, 4])
def test_a_damaged_checkpoint_is_passed_over(folder, episodes, tmp_path, capsys, rank):
    out = str(tmp_path / "run")
    os.makedirs(out)
    model, _, tokenizer = policies.trainable(folder, lora_rank=rank)
    head, optimizer = torch.nn.Linear(32, 1), None
    for iteration in (1, 2, 3):
        _, optimizer = step(model, episodes, optimizer=optimizer)
        save_checkpoint(out, model, tokenizer, optimizer, head, iteration)
        if iteration == 2:
            wanted = copy.deepcopy(model.state_dict())
    assert checkpoints(out) == ["checkpoint-000002", "checkpoint-000003"]
    weights = os.path.join(out, "checkpoint-000003", "adapter/adapter_model.safetensors" if rank else "model.safetensors")
    with open(weights, "r+b") as file:
        file.truncate(os.path.getsize(weights) // 2)
    with open(os.path.join(out, "metrics.jsonl"), "w") as file:
        file.write('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera')  # killed in mid-line
    fresh, *_ = policies.trainable(folder, lora_rank=rank)
    optimizer = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    assert load_checkpoint(out, fresh, optimizer, head, "cpu") == 2
    assert "passing over checkpoint-000003" in capsys.readouterr().out
    assert all(torch.equal(wanted[n], p) for n, p in fresh.state_dict().items()) and optimizer.state
    assert open(os.path.join(out, "metrics.jsonl")).read() == '{"iteration": 1}\n{"iteration": 2}\n'


HUB_CHILD = """
import sys
from support.policies import load_policy
try:
    model, tokenizer = load_policy("someone/tiny")
    print("loaded", sum(p.double().sum().item() for p in model.parameters()), len(tokenizer))
except FileNotFoundError as error:
    print("line:", error)
"""


@pytest.mark.long
def test_an_interrupted_download_is_one_clear_line_and_the_next_run_completes_it(tmp_path):
    """A hub of our own that hangs up in the middle of the weights, and later does not."""
    up = {"for": 100_000}  # bytes of the weights' file that the hub sends before it hangs up

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            name = self.path.split("/resolve/main/")[-1]
            path = os.path.join(ROOT, "policies", "tiny", name)
            self.data = open(path, "rb").read() if os.path.isfile(path) and "/resolve/main/" in self.path else None
            if self.data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if begin else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", hashlib.sha256(self.data).hexdigest())
            self.send_header("Content-Length", str(len(self.data) - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(self.data) - 1}/{len(self.data)}")
            self.end_headers()
            self.data = self.data[begin:]

        def do_GET(self):
            self.do_HEAD()
            if self.path.endswith("model.safetensors"):
                self.data, self.close_connection = self.data[:up["for"]], True
            self.wfile.write(self.data or b"")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    load = lambda: subprocess.run([sys.executable, "-c", HUB_CHILD], cwd=ROOT, env=environment, text=True, capture_output=True)
    torn = load()
    assert "line: someone/tiny is not a checkpoint" in torn.stdout and "broke off, start again" in torn.stdout, torn.stderr
    up["for"] = 10**9
    done = load()
    server.shutdown()
    model, tokenizer = policies.load_policy(os.path.join(ROOT, "policies", "tiny"))
    assert done.stdout.split()[-3:] == ["loaded", str(sum(p.double().sum().item() for p in model.parameters())), str(len(tokenizer))]

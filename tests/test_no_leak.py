"""experiments/no_leak.py: what is taken out of the gradient is the leak, no more, and it is a penalty on inadmissible steps."""

import copy
from types import SimpleNamespace

import pytest
import torch

import train
from actor import forward
from experiments import no_leak
from helpers import make_batch
from support.batches import deal, sampled_logprobs


@pytest.fixture
def setting(model, episodes):
    """args, run and a batch of three groups whose first steps are unflawed, second repeated, third inadmissible."""
    for episode in episodes:
        for k, step in enumerate(episode.steps):
            step.malformed = step.no_effect = step.revisited = False
            step.repeated, step.inadmissible = k == 1, k == 2
            if k != 1:  # the same answer, right the first time and wrong the third: praise must leak
                episode.tokens[step.start:step.end] = [5] * (step.end - step.start)
    batch = make_batch(episodes, torch.tensor([0.3, 0.1, 0.4, 0.2, 0.2, -0.05])[:len(episodes)])
    batch.old_logprobs = sampled_logprobs(model, batch, 1.0, 4096)
    args = SimpleNamespace(clip=0.2, kl_coef=0.0, classifier_coef=0.0, temperature=1.0, micro_tokens=4096, head_layer=-1,
                           epo=0.0, iterations=1, out="")
    run = SimpleNamespace(args=args, model=model, value_head=None, question=None, shared=None, turn_entropies=[],
                          optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95)))
    for i, p in enumerate(model.parameters()):  # in the middle of training: second moments of 0.5, 1.0 or 1.5
        run.optimizer.state[p] = {"exp_avg_sq": torch.full_like(p, 0.5 * (1 + i % 3)), "step": torch.tensor(1000.0)}
    return args, run, batch


def gradient(args, run, batch):
    train.gradients(args, run, batch)
    return [p.grad.clone() for p in run.model.parameters()]


def by_hand(run, batch, advantages):
    """The gradient that goes up, of sum w A log pi, one backward pass over all episodes."""
    logprobs = forward(run.model, batch.sequences, batch.sampled)["logprobs"]
    objective = (batch.token_weights * advantages[batch.step_of_token] * logprobs).sum()
    return torch.autograd.grad(objective, list(run.model.parameters()))


def test_what_is_removed_is_the_leak_and_equals_a_penalty(setting):
    args, run, batch = setting
    whole = gradient(args, run, batch)
    sums = no_leak.leak_watched(train.gradients)(args, run, batch)
    left, c = [p.grad.clone() for p in run.model.parameters()], sums["removed_c"]
    assert 0.01 < c < 0.99  # not cut at either end
    # The same gradient as with c taken off the advantage of inadmissible steps.
    inadmissible = torch.tensor([s.inadmissible for e in batch.episodes for s in e.steps])
    penalised = copy.copy(batch)
    penalised.advantages = batch.advantages - c * inadmissible
    expected = gradient(args, run, penalised)
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(left, expected))
    assert max((x - y).abs().max() for x, y in zip(left, whole)) > 1e-4
    # What unflawed steps and the penalty do together to inadmissible actions of the other half is nothing, along Adam's
    # step: each parameter is divided by the root of its second moment, which the batch's own gradient has joined.
    scale = [1.0 / ((0.95 * 0.5 * (1 + i % 3) + 0.05 * g**2).sqrt() + 1e-8) for i, g in enumerate(whole)]
    halves, pushed = [batch.part(half) for half in deal(batch, 2)], {0.0: 0.0, c: 0.0}
    bad = lambda part: torch.tensor([float(s.inadmissible) for e in part.episodes for s in e.steps])
    for own, other in (halves, halves[::-1]):
        raised = by_hand(run, other, bad(other))
        for penalty in pushed:
            advantages = torch.where(own.flawed, 0.0, own.advantages) - penalty * bad(own)
            pushed[penalty] += sum((x * y * s).sum().item() for x, y, s in zip(by_hand(run, own, advantages), raised, scale))
    assert pushed[0.0] > 0 and abs(pushed[c]) < 1e-3 * pushed[0.0]


def test_keep_leak_changes_nothing(setting):
    args, run, batch = setting
    whole = gradient(args, run, batch)
    sums = no_leak.leak_watched(train.gradients, remove=False)(args, run, batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(run.model.parameters(), whole)) and sums["removed_c"] > 0


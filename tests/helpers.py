"""An optimizer step as train.py makes it, from a few arguments: what the tests of the update call."""

import os
import sys
from types import SimpleNamespace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from grpo import group_advantages  # noqa: E402
from support.batches import lay_out, micro_batches, sampled_logprobs  # noqa: E402, F401
from support.processes import clip_gradients  # noqa: E402
from support.run import step_if_finite  # noqa: E402


def advantages_of(episodes):
    """(E,) advantages of the episodes within their groups."""
    batch = lay_out(episodes)
    return group_advantages(batch.reward, batch.group)[0]


def make_batch(episodes, advantages, questions=3, labels="flaws", seed=0):
    """A batch with all its weights; `advantages`: (E,)."""
    batch = lay_out(episodes)
    batch.advantages = advantages[batch.episode_of_step]
    batch.labels = train.LABELS[labels](batch, None)
    return train.weigh(SimpleNamespace(labels=labels, weighting="token", questions=questions), batch, seed)


def update(model, value_head, optimizer, batch, question=None, clip=0.2, kl_coef=0.0, classifier_coef=0.0,
           temperature=1.0, max_tokens=8192, max_norm=1.0, accelerator=None, epo=0.0):
    """One optimizer step; returns the dictionary of sums."""
    args = SimpleNamespace(clip=clip, kl_coef=kl_coef, classifier_coef=classifier_coef, temperature=temperature,
                           micro_tokens=max_tokens, head_layer=-1, epo=epo, iterations=1, out="")
    run = SimpleNamespace(args=args, model=model, value_head=value_head, optimizer=optimizer, question=question,
                          shared=accelerator, skipped_in_a_row=0, turn_entropies=[], accelerator=accelerator)
    sums = train.gradients(args, run, batch)
    sums["grad_norm"] = clip_gradients([p for part in optimizer.param_groups for p in part["params"]], max_norm)
    step_if_finite(run, batch, sums)
    return sums

"""Controls of the classification loss: each takes away one thing that could explain a gain. `--control NAME`.

    stop-gradient  the value head learns, the trunk does not: what is left is a head that watches   (`Detached`)
    shuffled       labels permuted among the steps of won episodes, and among those of lost ones: class balance and outcome
                   are as they were, what a label says of its step is destroyed
    per-text       a random label fixed per action text: can be learnt by heart from the action alone, says nothing of
                   whether it is right here
    random-target  a coin for every step, drawn anew each time, and lambda such that the trunk's gradient has the norm that
                   the true labels would give it through the same head: a disturbance without anything to learn. Not as
                   large as the true labels' own, since coins leave the head untaught: measured, a tenth of it
                   (EXPERIMENTS.md, 2026-11-25)

The fifth control, the same labels in the advantage (ADCA), is a credit rule: credit.py.
"""

import dataclasses
import math
import zlib

import torch

from classifier_loss import LEFT_OUT
from support.processes import clip_gradients


class Detached(torch.nn.Linear):
    """A linear head whose gradient ends at its input."""

    def forward(self, hidden):
        return super().forward(hidden.detach())


def keep(batch, seed):
    """(S,) the labels as they are."""
    return batch.labels


def shuffle(batch, seed):
    """(S,) labels permuted within won and within lost episodes; steps that are left out stay left out."""
    labels, generator = batch.labels.clone(), torch.Generator().manual_seed(seed)
    for outcome in (batch.won, ~batch.won):
        steps = (outcome & (labels != LEFT_OUT)).nonzero()[:, 0]
        labels[steps] = labels[steps[torch.randperm(len(steps), generator=generator)]]
    return labels


def by_text(batch, seed):
    """(S,) labels that depend on the action's text alone, the same in every iteration and run (crc32's lowest bit)."""
    texts = [step.action or "" for episode in batch.episodes for step in episode.steps]
    coins = torch.tensor([zlib.crc32(text.encode()) & 1 for text in texts])
    return torch.where(batch.labels == LEFT_OUT, LEFT_OUT, coins)


def toss(batch, seed):
    """(S,) labels by a fair coin."""
    coins = torch.randint(2, batch.labels.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(batch.labels == LEFT_OUT, LEFT_OUT, coins)


CONTROLS = {"none": keep, "stop-gradient": keep, "shuffled": shuffle, "per-text": by_text, "random-target": toss}


def classifier_coef(args, run, batch, gradients, weigh, seed):
    """lambda; for `random-target` the one with which the random labels' gradient in the trunk is as long as the true
    labels' would be.

    gradients, weigh: train.py's.
    """
    if args.control != "random-target" or args.classifier == "none":
        return args.classifier_coef
    lengths = []
    for labels in (batch.true_labels, batch.labels):
        twin = dataclasses.replace(batch, labels=labels)
        gradients(args, run, weigh(args, twin, seed), grpo_coef=0.0)
        trunk = [p for p in run.model.parameters() if p.grad is not None]  # not the head: that is to be left as it is
        lengths.append(clip_gradients(trunk, math.inf))
    return args.classifier_coef * lengths[0] / lengths[1] if lengths[1] > 0 else 0.0

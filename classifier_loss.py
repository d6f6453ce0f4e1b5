"""Good or bad: labels for single steps and both classification losses of GCD. Needs torch alone; copy it.

"Generative classification disentanglement" (arXiv 2509.23870): the actor itself learns to tell good actions from bad
ones, with L = L_GRPO + lambda * L_cls. To tell them apart it must represent them apart, and then a gradient that
rewards an action where it is right no longer raises it where it is wrong.

    generative:  L_cls = - sum_i w_i log pi(verdict_i | prefix_i, a_i, question)          (verdict tokens only)
    value head:  L_cls = - sum_i w_i log sigmoid(y_i v . h_i),  y = +1 good, -1 bad       (h: last token of the action)

Both are weighted means over the labelled steps in which each class counts half, over the whole batch; both send their
gradient into the shared trunk, which is the point. The paper never writes its loss down: weights and labels here are
our reading, spelled out.

S labelled steps in a batch. Labels: 1 good, 0 bad, -1 left out.

>>> labels = rule_labels(won=torch.tensor([True, True, False, False]), flawed=torch.tensor([False, True, False, True]))
>>> labels.tolist(), class_weights(labels).tolist()
([1, 0, -1, 0], [0.5, 0.25, 0.0, 0.25])
"""

import torch
from torch.nn import functional as F

GOOD, BAD, LEFT_OUT = 1, 0, -1


def rule_labels(won, flawed):
    """Labels from the transcript alone (`--labels rules`).

    Args:
        won: (S,) bool, whether the step's episode succeeded.
        flawed: (S,) bool, whether the step is malformed, inadmissible, without effect, repeated or leads back.
    Returns: (S,) long. Bad: flawed, *also inside a successful episode*, which is where the outcome reward praises it.
        Good: unflawed, in a successful episode. Left out: unflawed, in a failed one (who knows?).
    """
    labels = torch.full(won.shape, LEFT_OUT, device=won.device)
    labels[won] = GOOD
    labels[flawed] = BAD
    return labels


def outcome_labels(advantages):
    """Labels from the episode's advantage (`--labels outcome`): (S,) float -> good > 0, bad < 0, left out at 0."""
    return torch.where(advantages > 0, GOOD, torch.where(advantages < 0, BAD, LEFT_OUT))


def class_weights(labels):
    """(S,) weights in which each class that occurs has the same total; they sum to 1, or are all 0 without labels."""
    weights = torch.zeros(labels.shape, device=labels.device)
    present = [c for c in (GOOD, BAD) if (labels == c).any()]
    for c in present:
        weights[labels == c] = 1.0 / (len(present) * (labels == c).sum())
    return weights


def balanced_choice(labels, episode_of_step, per_episode, generator=None):
    """Which steps to ask the generative classifier about: at most `per_episode` of each episode.

    A question costs tokens. Inside an episode, steps of the class that is rarer *in the batch* come first, so that
    few questions still show both classes. Returns (S,) bool.
    """
    rarer = BAD if (labels == BAD).sum() <= (labels == GOOD).sum() else GOOD
    rank = torch.rand(labels.shape, generator=generator) + (labels == rarer)
    rank[labels == LEFT_OUT] = -1.0
    chosen = torch.zeros(labels.shape, dtype=torch.bool)
    for episode in episode_of_step.unique():
        steps = (episode_of_step == episode).nonzero()[:, 0]
        best = steps[rank[steps].argsort(descending=True)[:per_episode]]
        chosen[best[rank[best] >= 0]] = True
    return chosen


def generative_loss(verdict_logprobs, weights):
    """(S,) log pi(true verdict | prefix, action, question), summed over its tokens -> scalar; micro-batches add up."""
    return -(weights * verdict_logprobs).sum()


def value_head_loss(values, labels, weights):
    """Binary cross-entropy of (S,) head outputs `values` against (S,) labels -> scalar; micro-batches add up."""
    losses = F.binary_cross_entropy_with_logits(values, (labels == GOOD).to(values.dtype), reduction="none")
    return (weights * losses).sum()

"""Good or bad: labels for single steps and both classification losses of GCD. Needs torch alone; copy it.

"Generative classification disentanglement" (arXiv 2509.23870): the actor itself learns to tell good actions
from bad ones, with L = L_GRPO + lambda * L_cls. To tell them apart it must represent them apart, and then a
gradient that rewards an action where it is right no longer raises it where it is wrong.

    generative:  L_cls = - sum_i w_i log pi(verdict_i | prefix_i, a_i, question)    verdict tokens only   (5a)
    value head:  L_cls = - sum_i w_i log sigmoid(y_i v . h_i),   y = +1 good, -1 bad                      (5b)
                 h: the hidden state at the token that ends the action's turn

Both are weighted means over labelled steps, over the whole batch; both send their gradient into the shared
trunk, which is the point. The paper never writes its loss down: weights and labels here are our reading,
spelled out.

**The label must not be the outcome in disguise.** Flawed steps are commoner in lost episodes, so a classifier
that only learns `won` looks good. Therefore steps are drawn and weighted by class *within* outcome: among the
steps of won episodes the two classes weigh the same, and among those of lost ones; knowing the outcome then
helps nothing.

S steps in a batch. Labels: 1 good, 0 bad, -1 left out.

>>> won, flawed = torch.tensor([True, True, True, False, False]), torch.tensor([0, 0, 1, 0, 1]).bool()
>>> flaw_labels(flawed).tolist(), balanced_weights(flaw_labels(flawed), won).tolist()
([1, 1, 0, 1, 0], [0.125, 0.125, 0.25, 0.25, 0.25])
"""

import torch
from torch.nn import functional as F

GOOD, BAD, LEFT_OUT = 1, 0, -1


def flaw_labels(flawed):
    """(S,) bool -> labels (`--labels flaws`): bad if the step is flawed, else good, won or lost.

    Flawed: malformed, inadmissible, without effect, repeated or leading back (rollout.Step).
    """
    return torch.where(flawed, BAD, GOOD)


def cells(labels, won=None):
    """The (good, bad) masks, (S,) bool each, of every outcome in which both classes occur; one pair if `won`
    is None.

    An outcome that shows one class alone is left out: there the label would be the outcome.
    """
    outcomes = [torch.ones_like(labels, dtype=torch.bool)] if won is None else [won.bool(), ~won.bool()]
    pairs = [((labels == GOOD) & outcome, (labels == BAD) & outcome) for outcome in outcomes]
    return [(good, bad) for good, bad in pairs if good.any() and bad.any()]


def balanced_weights(labels, won=None):
    """(S,) weights in which every cell (class x outcome) has the same total, and an outcome that shows one
    class alone has none; they sum to 1, or are all 0.

    won: (S,) bool; None balances the classes over the whole batch (for labels that are the outcome).
    """
    weights, pairs = torch.zeros(labels.shape, device=labels.device), cells(labels, won)
    for mask in [mask for pair in pairs for mask in pair]:
        weights[mask] = 1.0 / (2 * len(pairs) * mask.sum())
    return weights


def choose_questions(labels, won, budget, generator=None):
    """Which steps to ask the generative classifier about, since a question costs tokens: (S,) bool.

    Of each outcome that shows both classes, as many good steps as bad ones, drawn at random: at most `budget`
    in all.
    """
    chosen, pairs = torch.zeros_like(labels, dtype=torch.bool), cells(labels, won)
    for good, bad in pairs:
        count = min(int(good.sum()), int(bad.sum()), budget // (2 * len(pairs)))
        for mask in (good, bad):
            steps = mask.nonzero()[:, 0]
            chosen[steps[torch.randperm(len(steps), generator=generator)[:count]]] = True
    return chosen


def generative_loss(verdict_logprobs, weights):
    """Eq. (5a). verdict_logprobs: (Q,) log pi(true verdict | prefix, action, question), a verdict's tokens
    summed already; weights: (Q,) -> scalar; losses of micro-batches add up."""
    return -(weights * verdict_logprobs).sum()


def value_head_loss(values, labels, weights):
    """Eq. (5b): binary cross-entropy of (S,) outputs of the head against (S,) labels -> scalar; losses of
    micro-batches add up."""
    losses = F.binary_cross_entropy_with_logits(values, (labels == GOOD).to(values.dtype), reduction="none")
    return (weights * losses).sum()


# ----------------------------------------------------------------------------------- other labels, to compare

def rule_labels(won, flawed):
    """(S,) bool, (S,) bool -> labels (`--labels rules`): bad if flawed, *also inside a won episode*, where
    the outcome praises it; good if unflawed in a won one; unflawed in a lost one is left out (who knows?)."""
    return torch.where(flawed, BAD, torch.where(won, GOOD, LEFT_OUT))


def outcome_labels(advantages):
    """(S,) float -> labels by the sign of the advantage (`--labels outcome`); left out at 0. The outcome,
    undisguised."""
    return torch.where(advantages > 0, GOOD, torch.where(advantages < 0, BAD, LEFT_OUT))

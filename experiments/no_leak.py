"""GRPO with its leak measured at every optimizer step, and taken out: what does RL do without it?

    python -m experiments.no_leak --env alfworld --iterations 32 ...                # flags of train.py
    python -m experiments.no_leak --keep-leak --env alfworld --iterations 32 ...    # measured alone: GRPO as it is

The leak into inadmissible actions is what U, the gradient of the unflawed steps, does to their log-probability; H is that
log-probability's own gradient, so that the leak of a step along U is <U, H> / (the step's length). Taking c H out of the
update, c = <U, H> / <H, H>, cancels it to first order. Since H is what an advantage of 1 on every inadmissible step would
contribute, that is the same as taking c off these steps' advantage: c is the leak in the units of an advantage, *the penalty
that this update's leak eats up*. `--credit penalty` takes a constant instead (and off all flawed steps).

    U = sum over tokens t of unflawed steps      w_t A_t grad log pi(t)      (w: train.py's token weights, over a batch 1)
    H = sum over tokens t of inadmissible steps  w_t     grad log pi(t)

Held out: of the batch's games two halves a, b are made, c = (<U_a, H_b> + <U_b, H_a>) / (2 <H_a, H_b>), numerator and
denominator, both over |H|^2, averaged over the updates so far (decay 0.9; one batch of 64 episodes is noisy). The products weigh each
parameter as Adam's step will, by 1 / (sqrt(second moment) + eps), the batch's own gradient in it (coupling.py, question
(i); momentum and clipping are left out). c is kept within 0 .. 1. It goes to metrics.jsonl as `removed_c`, and from there
into the rows of run.py. A resumed run begins its averages again.
"""

import sys
from dataclasses import replace

import torch

import train
from coupling import ascent
from support.batches import deal
from support.coupling_run import as_adam_will

DECAY, LARGEST, EPS = 0.9, 1.0, 1e-8


def unflawed_and_inadmissible(args, run, batch):
    """U and H of a batch, two lists of tensors like the model's parameters."""
    inadmissible = torch.tensor([step.inadmissible for episode in batch.episodes for step in episode.steps])  # (S,)
    praised = replace(batch, advantages=torch.ones_like(batch.advantages))
    return (ascent(args, run, batch, ~batch.flawed[batch.step_of_token]),
            ascent(args, run, praised, inadmissible[batch.step_of_token]))


def leak_in(args, run, batch, G):
    """<U, H> and <H, H> between the halves of a batch, as shares of |H|^2; and H of the whole of it.

    G: the batch's whole gradient, for Adam's second moments. Needs two groups at least."""
    states = [run.optimizer.state.get(p) for p in run.model.parameters()]
    moments = as_adam_will([(s["exp_avg_sq"], float(s["step"])) if s else None for s in states])(G)
    scale = [1.0 / (v.sqrt() + EPS) for v in moments]
    dot = lambda left, right: sum(float((x * y * s).sum()) for x, y, s in zip(left, right, scale))
    (U_a, H_a), (U_b, H_b) = [unflawed_and_inadmissible(args, run, batch.part(half)) for half in deal(batch, 2)]
    H = [x + y for x, y in zip(H_a, H_b)]
    square = dot(H, H) or 1.0  # 0 where no step is inadmissible: then the rest is, too
    return (dot(U_a, H_b) + dot(U_b, H_a)) / square, 2.0 * dot(H_a, H_b) / square, H


def leak_watched(gradients, remove=True):
    """train.gradients, which afterwards measures c and takes c H out of the gradient that it leaves."""
    total = {"leak": 0.0, "own": 0.0}

    def watched(args, run, batch, grpo_coef=1.0, classifier_coef=None):
        sums = gradients(args, run, batch, grpo_coef, classifier_coef)
        if classifier_coef == 0.0:  # norms are measured, no step follows
            return sums
        parameters = list(run.model.parameters())
        G = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # of the loss: it goes down
        leak, own, H = leak_in(args, run, batch, G)
        total["leak"] = DECAY * total["leak"] + leak
        total["own"] = DECAY * total["own"] + own
        c = min(max(total["leak"] / total["own"], 0.0), LARGEST) if total["own"] > 0.0 else 0.0
        for p, g, h in zip(parameters, G, H):
            p.grad = g + c * h if remove else g
        return sums | {"removed_c": c, "removed_leak": leak, "removed_own": own}
    return watched


def main():
    remove = "--keep-leak" not in sys.argv
    sys.argv = [word for word in sys.argv if word != "--keep-leak"]
    train.gradients = leak_watched(train.gradients, remove)
    train.main()


if __name__ == "__main__":
    main()

"""Does a policy represent an action where it is right and the same where it is flawed apart?

On the probes of support/probes.py, in each layer, before the action (the token that predicts its first one)
and after it (its last token): how alike are the hidden states, and can a linear classifier tell good from
flawed in games that it has not seen? Every action has as many good probes as flawed ones, so which action it
is tells nothing.

Hidden states of a transformer share a large common part, whatever was read (Ethayarajh 2019); so the layer's
mean is taken off first, and the distance is 1 - cosine of what is left: 0 the same direction, 1 no more alike
than any two, 2 opposite.
"""

import numpy
import torch

from support.coupling_report import interval
from support.probes import group_cosines

PLACES = ("before", "after")  # the action


@torch.no_grad()
def hidden_states(model, probes):
    """(2, L+1, n, D) float64 of n probes: before and after the action, of the embeddings and of each of L
    layers."""
    model.eval()
    found, device = [], next(model.parameters()).device
    for probe in probes:
        at = [t for t, counts in enumerate(probe.mask) if counts]
        read = model.get_decoder()(input_ids=torch.tensor([probe.tokens], device=device), use_cache=False,
                                   output_hidden_states=True).hidden_states
        found.append(torch.stack([layer[0, [at[0] - 1, at[-1]]].cpu().double() for layer in read], 1))
    return torch.stack(found, 2)


def distances(states, probes):
    """Mean distance in the pair groups A (same action, good and flawed) and B (same action, both good), and
    A - B, with 95% bootstrap intervals over games: {"A": (value, low, high), "B": ..., "A - B": ...}.

    B is what another state does to an action by itself; only A above B says that good and flawed are apart.
    Args: states: (n, D). A group without pairs is left out.
    """
    states = states - states.mean(0)
    cells = group_cosines((states @ states.T).numpy(), probes)
    one = {"A": 1.0, "B": 1.0, "A - B": 0.0}  # and what was the upper end is the lower one
    turned = lambda name, value: None if value is None else one[name] - value
    return {name: tuple(turned(name, cells[name][key]) for key in ("cosine", "high", "low"))
            for name in one if name in cells}


def linear_accuracy(states, probes, folds=5, draws=1000, seed=0):
    """Accuracy, the mean of both classes', of a linear classifier on games that it was not fitted on: (value,
    low, high) with a 95% bootstrap interval over games; 0.5 is chance. (n, D) -> three numbers.

    Ridge regression on labels -1 and 1, both classes weighing the same, inputs standardised, penalty D:
    closed form, nothing tuned. An answer on the fence is half right.
    """
    rng = numpy.random.default_rng(seed)
    label = numpy.array([-1.0 if p.flawed else 1.0 for p in probes])                             # (n,)
    names, game = numpy.unique([p.game for p in probes], return_inverse=True)
    fold = rng.permutation(len(names))[game] % folds                                             # (n,)
    X, right = states.double().numpy(), numpy.full(len(probes), 0.5)
    for k in range(folds):
        fitted, asked = fold != k, fold == k
        if not asked.any() or len(set(label[fitted])) < 2:
            continue
        c = numpy.where(label > 0, 1 / (2 * (label[fitted] > 0).mean()), 1 / (2 * (label[fitted] < 0).mean()))
        mean = numpy.average(X[fitted], axis=0, weights=c[fitted])
        Z = X - mean                                                                             # (n, D)
        Z /= numpy.sqrt(numpy.average(Z[fitted]**2, axis=0, weights=c[fitted])) + 1e-6
        weighed, penalty = (c[:, None] * Z)[fitted].T, X.shape[1] * numpy.eye(X.shape[1])
        w = numpy.linalg.solve(weighed @ Z[fitted] + penalty, weighed @ label[fitted])           # (D,)
        score = Z[asked] @ w
        right[asked] = (1 + numpy.sign(numpy.where(abs(score) > 1e-9, score, 0.0)) * label[asked]) / 2
    often = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)[:, game]      # (draws, n)

    def balanced(weights):  # (..., n) -> (...)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            shares = [(weights * right)[..., label == y].sum(-1) / weights[..., label == y].sum(-1)
                      for y in (-1, 1)]
        return sum(shares) / 2
    return float(balanced(numpy.ones(len(probes)))), *interval(balanced(often))


def representation(model, probes):
    """{"before": [{"A", "B", "A - B", "accuracy"}, ...], "after": [...]}: a row for the embeddings, and one
    for each layer; every entry (value, low, high)."""
    states = hidden_states(model, probes)
    row = lambda layer: {**distances(layer, probes), "accuracy": linear_accuracy(layer, probes)}
    return {place: [row(layer) for layer in part] for place, part in zip(PLACES, states)}


def representation_table(found):
    """`representation`'s result as text."""
    lines = ["hidden states of the same action, mean taken off: 1 - cosine, good-flawed (A), good-good (B); "
             "linear accuracy", f"{'on other games, chance 50%; 95% bootstrap over games':58}{'A':>7}{'B':>7}   "
             f"{'A - B':26}accuracy"]
    for place in PLACES:
        for number, row in enumerate(found[place]):
            name = f"{place} the action, " + (f"layer {number}" if number else "embeddings")
            cell = lambda key: f"{row[key][0]:7.2f}" if key in row else f"{'-':>7}"
            gap, (value, low, high) = row.get("A - B"), row["accuracy"]
            between = "-" if gap is None else f"{gap[0]:+.3f}" + ("" if gap[1] is None else
                                                                  f" ({gap[1]:+.3f}, {gap[2]:+.3f})")
            share = f"{100 * value:.0f}%" + ("" if low is None else f" ({100 * low:.0f} - {100 * high:.0f})")
            lines.append(f"  {name:56}{cell('A')}{cell('B')}   {between:26}{share}")
    return "\n".join(lines)

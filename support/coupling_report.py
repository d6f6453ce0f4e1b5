"""What coupling.py's split update measured, as numbers with intervals and as text."""

import json
import math
import os

import numpy
from scipy import stats

from rollout import FLAWS
from support.checkpoints import write_atomically
from support.curves import read_metrics

KINDS = (*FLAWS, "flawed", "good")
NAMES = ("leak", "own", "net", "ratio")


def write_lines(path, rows):
    """Rows as JSON lines; the file is there whole, or as it was."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    """The rows of a file of JSON lines; none where there is no such file. Raises ValueError, one line."""
    if not os.path.exists(path):
        return []
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON lines") from error


def kinds_of(batch):
    """{kind: (S,) bool} of a batch's steps; a step may have several flaws."""
    steps = [step for episode in batch.episodes for step in episode.steps]
    found = {name: numpy.array([getattr(step, name) for step in steps]) for name in FLAWS}
    return found | {"flawed": batch.flawed.numpy(), "good": ~batch.flawed.numpy()}


def quantities(leak, own):
    """Leak and own correction, numbers or arrays, with what is read of them. Where own >= 0 nothing corrects
    the flaw, and the ratio is not a number."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return {"leak": leak, "own": own, "net": leak + own,
                "ratio": numpy.where(own < 0, -leak / own, numpy.nan)}


def summarize(found, share, held_out, draws=2000, seed=0):
    """Leak, own correction, net and ratio per kind of held-out step, with 95% bootstrap intervals over both
    sets of games.

    Args: found, share: from coupling.split_update, of one rule. held_out: its Batch.
    Returns: {kind: {"steps", "whole", "additivity", "leak", "leak_low", "leak_high", "own", ...}} of kinds
        that occur. "additivity" is |leak + own - whole| / (|leak| + |own|). None stands for "not a number".
    """
    rng, share = numpy.random.default_rng(seed), numpy.array(share)
    game = held_out.group[held_out.episode_of_step].numpy()                                   # (S,)
    B, games = len(share), numpy.unique(game)
    # How often each block and each game is drawn: (draws, B), (draws, H). Plain resampling of n units has but
    # (n-1)/n of the variance, so deviations are widened (Rao & Wu 1988).
    often = [1 + math.sqrt(n / max(1, n - 1)) * (rng.multinomial(n, [1 / n] * n, size=draws) - 1)
             for n in (B, len(games))]
    result = {}
    for kind, chosen in kinds_of(held_out).items():
        if not chosen.any():
            continue
        inside = (game == games[:, None]) & chosen                                            # (H, S)
        sums = numpy.einsum("pbs,hs->pbh", found["change"].numpy(), inside.astype(float))     # (2, B, H)
        counts = inside.sum(1)                                                                # (H,)
        leak, own = sums.sum((1, 2)) / counts.sum()
        # A resample's gradient has token weights of its own, its mean has actions of its own: both sum to 1.
        weight = (often[0] @ share) * (often[1] @ counts)
        weight = numpy.where(weight > 0, weight, numpy.nan)
        redrawn = numpy.einsum("db,pbh,dh->pd", often[0], sums, often[1], optimize=True) / weight
        whole = found["whole"].numpy()[chosen].mean()
        row = {"steps": int(counts.sum()), "whole": float(whole),
               "additivity": float(abs(leak + own - whole) / max(abs(leak) + abs(own), 1e-30))}
        for name, values in quantities(*redrawn).items():
            value = float(quantities(leak, own)[name])
            row[name] = None if math.isnan(value) else value
            row[f"{name}_low"], row[f"{name}_high"] = interval(values) if B > 1 else (None, None)  # one cannot vary
        result[kind] = row
    return result


def interval(values):
    """The middle 95% of resampled values; (None, None) where one in forty of them is no number."""
    there = values[numpy.isfinite(values)]
    if len(there) < 0.975 * len(values):
        return None, None
    return tuple(float(x) for x in numpy.quantile(there, [0.025, 0.975]))


def over_draws(values):
    """(mean, low, high) by Student's t; no interval from one draw.

    >>> [round(x, 3) for x in over_draws([1.0, 2.0, 3.0])]      # 2 -+ 4.303 * 1 / sqrt(3)
    [2.0, -0.484, 4.484]
    """
    n = len(values)
    mean = float(numpy.mean(values))
    half = stats.t.ppf(0.975, n - 1) * numpy.std(values, ddof=1) / math.sqrt(n) if n > 1 else None
    return (mean, None, None) if half is None else (mean, float(mean - half), float(mean + half))


def jackknife(statistic, n):
    """(value, low, high): 95% interval of a statistic of n draws by leaving out each in turn (Tukey 1958) and
    Student's t over what this makes of every draw. Where a value is no number there is no interval, or
    nothing.

    Args: statistic: of an array of the draws' numbers, 0 .. n-1.
    Of a mean it is the t interval of the mean:
    >>> values = numpy.array([1.0, 2.0, 3.0])
    >>> [round(x, 3) for x in jackknife(lambda draws: values[draws].mean(), 3)]
    [2.0, -0.484, 4.484]
    """
    value = float(statistic(numpy.arange(n)))
    if math.isnan(value):
        return None, None, None
    without = [float(statistic(numpy.delete(numpy.arange(n), i))) for i in range(n)] if n > 1 else []
    if n < 2 or numpy.isnan(without).any():
        return value, None, None
    _, low, high = over_draws([n * value - (n - 1) * one for one in without])
    middle = value - (low + high) / 2  # its mean is not the value shown
    return value, low + middle, high + middle


def ratio_of(cells):
    """The draws' ratio, as a function for `jackknife`: that of the mean leak to the mean own correction. (The
    mean of the draws' ratios would be drawn by those whose correction is nearly nothing.)"""
    leak, own = (numpy.array([cell[name] for cell in cells]) for name in ("leak", "own"))
    return lambda draws: quantities(leak[draws].mean(), own[draws].mean())["ratio"]


def combine(rows, rule, kind):
    """{name: (value, low, high)} over those of a model's draws that have this kind; of a single draw with the
    bootstrap's intervals."""
    cells = [row[rule][kind] for row in rows if kind in row[rule]]
    if len(rows) == 1 and cells:
        return {name: tuple(cells[0][name + end] for end in ("", "_low", "_high")) for name in NAMES}
    if not cells:
        return {name: (None, None, None) for name in NAMES}
    found = {name: over_draws([one[name] for one in cells]) for name in NAMES if name != "ratio"}
    return found | {"ratio": jackknife(ratio_of(cells), len(cells))}


def fates(folders, kinds=FLAWS):
    """What became of flaws in runs of train.py: {folder: {kind: (share of the steps before, after)}}, on the
    test games of the run's own level, the same before and after. Raises ValueError, one line."""
    found = {}
    for folder in folders:
        try:
            rows = read_metrics(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no metrics.jsonl of a run in there") from error
        for level in ("L0", "L1", "L2"):
            evaluations = [row[f"eval_{level}"] for row in rows if f"eval_{level}" in row]
            if len(evaluations) > 1:  # of the level trained for: before the first iteration, at the end
                found[folder] = {kind: (evaluations[0][kind], evaluations[-1][kind]) for kind in kinds}
        if folder not in found:
            raise ValueError(f"{folder}: no evaluation before and after: not ended, or --eval-games 0")
    return found


def text(value, low, high, digits=3):
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" + ("" if low is None else f" ({low:+.{digits}f}, {high:+.{digits}f})")


DIGITS = {"plain": 3, "adam": 1}  # a step along the gradient over the root of its square goes hundreds of times as far


def table(model, rows):
    """The report of one model, from its rows of results.jsonl."""
    won, drawn = 100 * numpy.mean([row["success"] for row in rows]), len(rows)
    rows = [row for row in rows if "plain" in row]
    over = f"t intervals over {len(rows)} draws" if len(rows) > 1 else "bootstrap intervals over games"
    over += f" ({drawn - len(rows)} more had no gradient)" if drawn > len(rows) else ""
    episodes = rows[0]["episodes"]
    lines = [f"{model}: {episodes} episodes a draw, {won:.0f}% won; nats per unit step, 95% {over}"]
    for rule in (rule for rule in ("plain", "adam") if rule in rows[0]):
        about = {"plain": "plain gradient", "adam": f"through Adam, v from {rows[0]['moments']}"}[rule]
        lines.append(f"{about:32}{'steps':>8}   {'leak':26}{'own correction':26}{'net':26}-leak / own")
        for kind in (kind for kind in KINDS if any(kind in row[rule] for row in rows)):
            cells = combine(rows, rule, kind)
            _, low, high = cells["net"] if kind != "good" else (None, None, None)
            said = "" if low is None else "grows" if low > 0 else "falls" if high < 0 else "open"
            steps = sum(row[rule][kind]["steps"] for row in rows if kind in row[rule])
            shown, there = "".join(f"{text(*cells[name], DIGITS[rule]):25} " for name in NAMES[:3]), sum(kind in row[rule] for row in rows)
            ratio = text(*cells["ratio"], 2) if kind != "good" else ""
            name = kind + (f" ({there} draws)" if there < len(rows) else "")
            lines.append(f"  {name:24}{said:6}{steps:8}   {shown}{ratio}")
        worst = max(cell["additivity"] for row in rows for cell in row[rule].values())
        lines.append(f"  additivity: leak + own is the change along the whole gradient to within "
                     f"{100 * worst:.2g}% of |leak| + |own|")
    return "\n".join(lines)


def paired(models, rows):
    """Differences to the first model, draw by draw on the same games, as text."""
    of = {model: {row["draw"]: row for row in rows if row["model"] == model and "plain" in row} for model in models}
    lines = ["minus " + models[0] + ", paired by draw, 95% t intervals over the draws",
             " " * 56 + "".join(f"{name:28}" for name in ("leak", "own correction", "net", "-leak / own"))]
    for model in models[1:]:
        both = [(of[models[0]][draw], row) for draw, row in of[model].items() if draw in of[models[0]]]
        for rule in (rule for rule in ("plain", "adam") if both and rule in both[0][0]):
            for kind in KINDS:
                found = gaps(*zip(*both), rule, kind)
                if found:
                    shown = "".join(f"{text(*found[name], 2 if name == 'ratio' else DIGITS[rule]):27} " for name in NAMES)
                    lines.append(f"  {model:27} ({len(both)}) {rule:6} {kind:13}{shown}")
    return "\n".join(lines)


def gaps(first, second, rule, kind):
    """{name: (value, low, high)} of the second's rows minus the first's, paired draw by draw, over the draws
    where both have this kind; {} where there is none."""
    pairs = [(a[rule][kind], b[rule][kind]) for a, b in zip(first, second) if kind in a[rule] and kind in b[rule]]
    if not pairs:
        return {}
    a, b = zip(*pairs)
    found = {name: over_draws([y[name] - x[name] for x, y in pairs]) for name in NAMES if name != "ratio"}
    of_a, of_b = ratio_of(a), ratio_of(b)
    return found | {"ratio": jackknife(lambda draws: of_b(draws) - of_a(draws), len(pairs))}

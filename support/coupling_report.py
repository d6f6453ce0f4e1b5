"""What coupling.py's split update measured, as numbers with intervals and as text."""

import math

import numpy
from scipy import stats

from rollout import FLAWS

KINDS = (*FLAWS, "flawed", "good")
NAMES = ("leak", "own", "net", "ratio")


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
            row[f"{name}_low"], row[f"{name}_high"] = interval(values)
        result[kind] = row
    return result


def interval(values):
    """The middle 95% of resampled values; (None, None) where one in forty of them is no number."""
    there = values[numpy.isfinite(values)]
    if len(there) < 0.975 * len(values):
        return None, None
    return tuple(float(x) for x in numpy.quantile(there, [0.025, 0.975]))


def over_draws(values):
    """(mean, low, high) by Student's t; no interval from one draw, and nothing where a draw has no value.

    >>> [round(x, 3) for x in over_draws([1.0, 2.0, 3.0])]      # 2 -+ 4.303 * 1 / sqrt(3)
    [2.0, -0.484, 4.484]
    """
    n = len(values)
    if n == 0 or None in values:
        return None, None, None
    mean = float(numpy.mean(values))
    half = stats.t.ppf(0.975, n - 1) * numpy.std(values, ddof=1) / math.sqrt(n) if n > 1 else None
    return (mean, None, None) if half is None else (mean, float(mean - half), float(mean + half))


def combine(rows, rule, kind):
    """{name: (value, low, high)} over a model's draws; of a single draw with the bootstrap's intervals."""
    cells = [row[rule].get(kind) for row in rows]
    if len(cells) == 1 and cells[0]:
        return {name: tuple(cells[0][name + end] for end in ("", "_low", "_high")) for name in NAMES}
    return {name: over_draws([one and one[name] for one in cells]) for name in NAMES}


def text(value, low, high, digits=3):
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" + ("" if low is None else f" ({low:+.{digits}f}, {high:+.{digits}f})")


def table(model, rows):
    """The report of one model, from its rows of results.jsonl."""
    over = f"t intervals over {len(rows)} draws" if len(rows) > 1 else "bootstrap intervals over games"
    won = 100 * numpy.mean([row["success"] for row in rows])
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
            shown = "".join(f"{text(*cells[name]):26}" for name in NAMES[:3])
            ratio = text(*cells["ratio"], 2) if kind != "good" else ""
            lines.append(f"  {kind:20}{said:10}{steps:8}   {shown}{ratio}")
        worst = max(cell["additivity"] for row in rows for cell in row[rule].values())
        lines.append(f"  additivity: leak + own is the change along the whole gradient to within "
                     f"{100 * worst:.2g}% of |leak| + |own|")
    return "\n".join(lines)


def paired(models, rows):
    """Differences to the first model, draw by draw on the same games, as text."""
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    lines = [f"minus {models[0]}, paired by draw ({len(of[models[0]])}), 95% t intervals over the draws",
             " " * 56 + "".join(f"{name:28}" for name in ("leak", "own correction", "net", "-leak / own"))]
    for model in models[1:]:
        for rule in (rule for rule in ("plain", "adam") if rule in rows[0]):
            for kind in KINDS:
                pairs = [(a[rule].get(kind), b[rule].get(kind)) for a, b in zip(of[models[0]], of[model])]
                if not all(a and b for a, b in pairs):
                    continue
                gaps = [[None if None in (a[name], b[name]) else b[name] - a[name] for a, b in pairs]
                        for name in NAMES]
                shown = "".join(f"{text(*over_draws(gap)):28}" for gap in gaps)
                lines.append(f"  {model:32} {rule:6} {kind:13}{shown}")
    return "\n".join(lines)

"""Does coupling at the start tell which flaws RL removes? Hypothesis P of experiments/README.md, from rows alone.

    python experiments/prediction.py                                 # the table and the rank correlations
    python experiments/prediction.py --out docs/coupling_fate.png    # and the picture

A point is a kind of flaw of a policy that RL began with. Across: its leak + own correction there (coupling.py's split
update, plain gradient; their ratio is none where nothing corrects a flaw, and a ratio above 1 is a sum above 0). Upwards:
how common it is on the test games after RL, over before, in two units: times per episode, and share of all steps (which
also changes where other steps go). The theory says that across and upwards rise together.

Not all is taken at one moment: supervised updates stand between `tiny` as shipped (across) and where its runs' evaluation
begins (upwards), and for tiny-reads, whose one evaluation before RL is all its runs', it is the other way round.

Beside each rank correlation: its spread where draws (or seeds) and runs are resampled within each start, the same ones for
all its flaws (no interval: resampling pulls a rank correlation towards 0); and Fisher's z interval as if the points were
independent, for their being few (a step can have two flaws). Flaws under 1% of a start's are left out: noise.
"""

import argparse
import os
import sys

import numpy
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from experiments.analyse import mean_and_half, shown, splits  # noqa: E402
from experiments.run import HERE, read_rows, read_runs  # noqa: E402
from rollout import FLAWS  # noqa: E402
from support.coupling_figures import draw_fate  # noqa: E402
from support.coupling_report import combine, text  # noqa: E402

STARTS = (  # a start, its draws of coupling.py (None: the runs measured it themselves), runs that began with it
    ("ALFWorld, tiny", "coupling-tiny.jsonl", "default", "none"),
    ("ALFWorld, tiny-reads", None, "classifier", "none"),
    ("ScienceWorld, tiny", "coupling-scienceworld.jsonl", "default-scienceworld", "none"))
LEAST = 0.01  # of all flaws of the start's steps
UNITS = {"times per episode": lambda one, kind: one[kind] * one["steps"], "share of steps": lambda one, kind: one[kind]}


def measured(rows, file, experiment, arm):
    """[{kind: {"leak", "own", "net"}}] of a start, one for each draw; without a file from its runs' iteration 0."""
    if file is None:
        return [seed["plain"] for seed in splits(rows, experiment, FLAWS)[arm][0].values()]
    return [{kind: row["plain"][kind] for kind in FLAWS if kind in row["plain"]}
            for row in read_rows(os.path.join(HERE, file)) if "plain" in row]


def became(rows, experiment, arm, unit="times per episode", level="L1"):
    """{kind: [(how common before, after) of each run]}, in one of UNITS."""
    runs = [row for row in rows if (row["experiment"], row["arm"]) == (experiment, arm)]
    often = UNITS[unit]
    return {kind: [tuple(often(row[when][level], kind) for when in ("before", "after")) for row in runs] for kind in FLAWS}


def points(rows, starts=STARTS, unit="times per episode"):
    """[(start, kind, draws' cells, [after / before of each run])] of all starts whose runs have rows."""
    found = []
    for name, file, experiment, arm in starts:
        runs = became(rows, experiment, arm, unit)
        if not runs[FLAWS[0]]:
            print(f"({name}: no rows of {experiment}, arm {arm}: left out)")
            continue
        draws = measured(rows, file, experiment, arm)
        first = {kind: numpy.mean([before for before, _ in runs[kind]]) for kind in FLAWS}
        for kind in FLAWS:
            cells = [draw[kind] for draw in draws if kind in draw]
            common = first[kind] >= LEAST * sum(first.values()) and all(before for before, _ in runs[kind])
            if len(cells) == len(draws) and common:
                found.append((name, kind, cells, [after / before for before, after in runs[kind]]))
    return found


def correlation(found, name, draws=4000, seed=0):
    """Spearman's rank correlation of the mean `name` (leak, net) with the mean after / before; the middle 95% of it where
    draws and runs of each start are resampled; Fisher's interval.

    Points of one order have correlation 1:
    >>> one = lambda x, y: ("a", "b", [{"net": x}, {"net": x}], [y, y])
    >>> correlation([one(0, 1), one(1, 2), one(2, 3), one(3, 4)], "net")[0]
    1.0
    """
    rng = numpy.random.default_rng(seed)
    values = [(start, numpy.array([cell[name] for cell in cells]), numpy.array(grown)) for start, _, cells, grown in found]
    rank = lambda pairs: float(stats.spearmanr(*zip(*pairs)).statistic)
    value = rank([(x.mean(), y.mean()) for _, x, y in values])
    sizes = {start: (len(x), len(y)) for start, x, y in values}
    resampled = []
    for _ in range(draws):  # all flaws of a start come from the same draws and the same runs
        of = {start: [rng.integers(n, size=n) for n in both] for start, both in sizes.items()}
        resampled.append(rank([(x[of[start][0]].mean(), y[of[start][1]].mean()) for start, x, y in values]))
    half = stats.norm.ppf(0.975) / max(1, len(values) - 3) ** 0.5
    z = numpy.arctanh(min(value, 1 - 1e-9))
    return value, tuple(numpy.quantile(resampled, [0.025, 0.975])), (float(numpy.tanh(z - half)), float(numpy.tanh(z + half)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", default=os.path.join(HERE, "results.jsonl"))
    parser.add_argument("--out", help="picture to write")
    args = parser.parse_args()
    found = points(read_runs(args.results))
    if len(found) < 4:
        sys.exit(f"prediction.py: {len(found)} points in {args.results}: too few for a rank correlation")
    shares = {point[:2]: point[3] for point in points(read_runs(args.results), unit="share of steps")}
    print("After / before RL: mean over runs and 95% t interval\n\n"
          "| start | flaw | leak | own correction | leak + own | times per episode | share of steps |\n" + "| --- " * 7 + "|")
    nets = []
    for start, kind, cells, grown in found:
        cell = combine([{"plain": {kind: one}} for one in cells], "plain", kind)
        nets.append(cell["net"])
        print(f"| {start} | {kind.replace('_', ' ')} | " + " | ".join(text(*cell[name]) for name in ("leak", "own", "net"))
              + "".join(f" | {shown(*mean_and_half(values), digits=2)}" for values in (grown, shares[start, kind])) + " |")
    print(f"\nSpearman's rank correlation with after / before, {len(found)} points (spread of resamples; Fisher's z)")
    for unit in UNITS:
        there = [(*point[:3], shares[point[:2]]) for point in found] if unit == "share of steps" else found
        for name in ("leak", "net"):
            value, (low, high), (least, most) = correlation(there, name)
            print(f"  {name:5}{unit:20} {value:+.2f}  ({low:+.2f} to {high:+.2f}; {least:+.2f}, {most:+.2f})")
    if args.out:
        try:
            draw_fate({"plain": [(start, kind, net, grown) for (start, kind, _, grown), net in zip(found, nets)]}, args.out,
                      of="times per episode")
        except (OSError, ValueError) as error:
            sys.exit(f"prediction.py: --out {args.out}: {error}")


if __name__ == "__main__":
    main()

"""Does coupling at the start tell which flaws RL removes? Hypothesis P of experiments/README.md, from rows alone.

    python experiments/prediction.py                                 # the table and the rank correlations
    python experiments/prediction.py --out docs/coupling_fate.png    # and the picture

A point is a kind of flaw of a policy that RL began with. Across: its leak + own correction there (coupling.py's split
update, plain gradient; their ratio is none where nothing corrects a flaw, and a ratio above 1 is a sum above 0). Upwards:
how often an episode of the test games shows it after RL, over before (times per episode; shares of all steps also change
where other steps go). The theory says that the two rise together.

Intervals of the rank correlation, two: resampling draws (or seeds) and runs within each start, for what measuring the
points costs; Fisher's z as if the points were independent, for their being few. Flaws under 1% of the start's flawed steps
are left out: their numbers are noise.
"""

import argparse
import os
import sys

import numpy
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from experiments.analyse import splits  # noqa: E402
from experiments.run import HERE, read_rows  # noqa: E402
from rollout import FLAWS  # noqa: E402
from support.coupling_figures import draw_fate  # noqa: E402
from support.coupling_report import combine, text  # noqa: E402

STARTS = (  # a start, its draws of coupling.py (None: the runs measured it themselves), runs that began with it
    ("ALFWorld, tiny", "coupling-tiny.jsonl", "default", "none"),
    ("ALFWorld, tiny-reads", None, "classifier", "none"),
    ("ScienceWorld, tiny", "coupling-scienceworld.jsonl", "default-scienceworld", "none"))
LEAST = 0.01  # of the start's flawed steps


def measured(rows, file, experiment, arm):
    """[{kind: {"leak", "own", "net"}}] of a start, one for each draw; without a file from its runs' iteration 0."""
    if file is None:
        return [seed["plain"] for seed in splits(rows, experiment, FLAWS)[arm][0].values()]
    return [{kind: row["plain"][kind] for kind in FLAWS if kind in row["plain"]}
            for row in read_rows(os.path.join(HERE, file)) if "plain" in row]


def became(rows, experiment, arm, level="L1"):
    """{kind: [(times per episode before, after) of each run]}."""
    runs = [row for row in rows if (row["experiment"], row["arm"]) == (experiment, arm)]
    often = lambda one, kind: one[kind] * one["steps"]
    return {kind: [tuple(often(row[when][level], kind) for when in ("before", "after")) for row in runs] for kind in FLAWS}


def points(rows, starts=STARTS):
    """[(start, kind, draws' cells, [after / before of each run])] of all starts whose runs have rows."""
    found = []
    for name, file, experiment, arm in starts:
        runs = became(rows, experiment, arm)
        if not runs[FLAWS[0]]:
            continue
        draws = measured(rows, file, experiment, arm)
        total = sum(runs[kind][0][0] for kind in FLAWS)
        for kind in FLAWS:
            cells = [draw[kind] for draw in draws if kind in draw]
            if len(cells) == len(draws) and runs[kind][0][0] >= LEAST * total:
                found.append((name, kind, cells, [after / before for before, after in runs[kind]]))
    return found


def correlation(found, name, draws=4000, seed=0):
    """Spearman's rank correlation of the mean `name` (leak, net) with the mean after / before, its interval by resampling
    draws and runs, and Fisher's.

    Points of one order have correlation 1:
    >>> one = lambda x, y: ("a", "b", [{"net": x}, {"net": x}], [y, y])
    >>> correlation([one(0, 1), one(1, 2), one(2, 3), one(3, 4)], "net")[0]
    1.0
    """
    rng = numpy.random.default_rng(seed)
    values = [(numpy.array([cell[name] for cell in cells]), numpy.array(grown)) for _, _, cells, grown in found]
    rank = lambda pairs: float(stats.spearmanr(*zip(*pairs)).statistic)
    again = lambda x: rng.choice(x, len(x)).mean()
    value = rank([(x.mean(), y.mean()) for x, y in values])
    resampled = [rank([(again(x), again(y)) for x, y in values]) for _ in range(draws)]
    half = stats.norm.ppf(0.975) / max(1, len(values) - 3) ** 0.5
    z = numpy.arctanh(min(value, 1 - 1e-9))
    return value, tuple(numpy.quantile(resampled, [0.025, 0.975])), (float(numpy.tanh(z - half)), float(numpy.tanh(z + half)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", default=os.path.join(HERE, "results.jsonl"))
    parser.add_argument("--out", help="picture to write")
    args = parser.parse_args()
    found = points(read_rows(args.results))
    if len(found) < 4:
        sys.exit(f"prediction.py: {len(found)} points in {args.results}: too few for a rank correlation")
    print("| start | flaw | leak | own correction | leak + own | times per episode, after / before (a run each) |\n| --- " + "| --- " * 5 + "|")
    nets = []
    for start, kind, cells, grown in found:
        cell = combine([{"plain": {kind: one}} for one in cells], "plain", kind)
        nets.append(cell["net"])
        print(f"| {start} | {kind.replace('_', ' ')} | " + " | ".join(text(*cell[name]) for name in ("leak", "own", "net"))
              + " | " + ", ".join(f"{value:.2f}" for value in grown) + f"; **{numpy.mean(grown):.2f}** |")
    print(f"\nSpearman's rank correlation with after / before, {len(found)} points (resampled draws and runs; Fisher's z)")
    for name in ("leak", "net"):
        value, (low, high), (least, most) = correlation(found, name)
        print(f"  {name:5} {value:+.2f}  ({low:+.2f}, {high:+.2f}; {least:+.2f}, {most:+.2f})")
    if args.out:
        try:
            draw_fate({"plain": [(start, kind, net, grown) for (start, kind, _, grown), net in zip(found, nets)]}, args.out,
                      of="times per episode")
        except (OSError, ValueError) as error:
            sys.exit(f"prediction.py: --out {args.out}: {error}")


if __name__ == "__main__":
    main()

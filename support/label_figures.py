"""The pictures of support/label_table.py, from the JSON that it writes.

    python -m support.label_figures experiments/label_table-*.json --out docs/labels-and-credit.png

One row of panels for each file: what each credit rule pays on average for flawed and unflawed steps and for what the oracle
calls bad and good; and how often each label source is right about bad and about good steps, inside won and inside lost
episodes. 95% intervals over games; marks and hatching say what colours say.
"""

import argparse
import json
import sys

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402

KINDS = (("flawed", "#D55E00", "v"), ("unflawed", "#0072B2", "^"), ("oracle bad", "#CC79A7", "s"),
         ("oracle good", "#009E73", "o"), ("bad, won", "#000000", "x"))
SOURCES = ("flaws", "rules", "outcome")


def bars(found):
    """(means, lower arms, upper arms) of dictionaries as `label_table.mean_over_games` makes them; gaps stay gaps."""
    nan = float("nan")
    means = [nan if f["mean"] is None else f["mean"] for f in found]
    arms = [[0.0 if f["mean"] is None else abs(f[edge] - f["mean"]) for f in found] for edge in ("low", "high")]
    return means, arms


def advantages_panel(axis, result):
    """Mean advantage by credit rule, a mark for each kind of step."""
    rules = list(result["advantages"])
    for k, (kind, color, mark) in enumerate(KINDS):
        means, arms = bars([result["advantages"][rule][kind] for rule in rules])
        places = [i + 0.15 * (k - 2) for i in range(len(rules))]
        axis.errorbar(places, means, arms, fmt=mark, color=color, label=kind, capsize=2, ms=5, lw=1)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(xticks=range(len(rules)), xticklabels=rules, ylabel="mean advantage of a step")
    axis.legend(fontsize=8, ncols=2)


def labels_panel(axis, result):
    """Precision of each label source on bad and on good steps, by outcome; the oracle is the truth."""
    cells = [(source, where) for source in SOURCES for where in ("won", "lost")]
    for k, (measure, color, hatch) in enumerate((("bad precision", "#D55E00", "//"), ("good precision", "#0072B2", ""))):
        means, arms = bars([result["sources"][source][where][measure] for source, where in cells])
        axis.bar([i + 0.4 * k - 0.2 for i in range(len(cells))], means, 0.4, yerr=arms, capsize=2, color=color, alpha=0.8,
                 hatch=hatch, edgecolor="white", label=f"{measure[:-10]} steps")
    axis.set(xticks=range(len(cells)), xticklabels=[f"{source}\n{where}" for source, where in cells], ylim=(0, 1.25),
             ylabel="precision against the oracle")
    axis.legend(fontsize=8, ncols=2, loc="upper right")


def draw(results, path):
    """results: {title: result of label_table.tabulate}."""
    figure, axes = plt.subplots(len(results), 2, figsize=(13, 4 * len(results)), constrained_layout=True, squeeze=False)
    for row, (title, result) in zip(axes, results.items()):
        advantages_panel(row[0], result)
        labels_panel(row[1], result)
        row[0].set_title(f"{title}: which credit rule punishes flaws?")
        row[1].set_title(f"{title}: which labels agree with the oracle?")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Draw what support/label_table.py has measured.")
    parser.add_argument("files", nargs="+", help="written by `python -m support.label_table --out FILE`")
    parser.add_argument("--out", default="labels-and-credit.png", help="the picture")
    args = parser.parse_args()
    results = {}
    for path in args.files:
        try:
            with open(path) as file:
                result = json.load(file)
            names = {"alfworld": "ALFWorld", "scienceworld": "ScienceWorld"}
            results[f"{names[result['arguments']['env']]}, {result['episodes']} episodes"] = result
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"label_figures: {path} is not from support.label_table --out ({error})")
    try:
        draw(results, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"label_figures: --out {args.out}: {error}")


if __name__ == "__main__":
    main()

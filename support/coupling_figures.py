"""Pictures of what coupling.py measured: the danger zone with a policy's own flaws in it, and the kernel.

    python -m support.coupling_figures runs/coupling/results.jsonl --out danger_zone.png   # of one, or more
    python -m support.coupling_figures runs/coupling/results.jsonl --after runs/a runs/b --out fate.png
    python experiments/prediction.py                                 # the same from the rows of the experiments
    python -m support.coupling_figures runs/coupling/kernel.jsonl --out path.png
"""

import argparse
import json
import os

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy  # noqa: E402

from rollout import FLAWS  # noqa: E402
from support.coupling_report import combine, fates  # noqa: E402
from support.curves import COLORS, FLAW_COLORS  # noqa: E402
from support.probes import GROUPS, cosine, group_cosines  # noqa: E402

MARKERS = "os^Dv<>"


def save(figure, path):
    """The file holds the old picture or the new one, never half of it."""
    figure.savefig(path + ".partial.png", dpi=110)
    plt.close(figure)
    os.replace(path + ".partial.png", path)


def common(rows, rule):
    """The kinds of step that every draw has and that make up 1% of a model's held-out flawed ones or more. What
    a rarer one does is noise, whose intervals would set the scale."""
    count = lambda kind: sum((row[rule].get(kind) or {}).get("steps", 0) for row in rows)
    return [kind for kind in FLAW_COLORS
            if count(kind) >= 0.01 * count("flawed") and all(kind in row[rule] for row in rows)]


def draw_danger_zone(rows, path):
    """Leak against own correction, a panel per rule, a colour per `common` kind of flaw, a marker per model,
    95% intervals. On the diagonal the leak undoes the correction; above it the flaw grows. Faint: single
    draws.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    rules = [rule for rule in ("plain", "adam") if all(rule in row for row in rows)]
    figure, axes = plt.subplots(1, len(rules), figsize=(6.2 * len(rules), 5.6), squeeze=False,
                                constrained_layout=True)
    for axis, rule in zip(axes[0], rules):
        reach, points = [0.0], [0.0]  # of intervals; where there are none, of points
        for marker, model in zip(MARKERS * len(models), models):
            mine = [row for row in rows if row["model"] == model]
            for kind, color in ((kind, FLAW_COLORS[kind]) for kind in common(mine, rule)):
                cells = combine(mine, rule, kind)
                (leak, *leaks), (own, *owns) = cells["leak"], cells["own"]
                if leak is None:
                    continue
                bars = {}
                if leaks[0] is not None:
                    bars = {"xerr": [[owns[1] - own], [own - owns[0]]],  # the axis shows -own
                            "yerr": [[leak - leaks[0]], [leaks[1] - leak]]}
                    reach += [-owns[0], -owns[1], *leaks]
                name = kind.replace("_", " ") + (f", {model}" if len(models) > 1 else "")
                ratio = cells["ratio"][0]
                axis.errorbar([-own], [leak], fmt=marker, color=color, capsize=3, markersize=7, elinewidth=1,
                              label=name + ("" if ratio is None else f": {ratio:.2f}"))
                if bars:
                    axis.errorbar([-own], [leak], fmt="none", color=color, capsize=3, elinewidth=1, **bars)
                points += [-own, leak]
                if len(mine) > 1:
                    single = [(-row[rule][kind]["own"], row[rule][kind]["leak"]) for row in mine if kind in row[rule]]
                    axis.plot(*zip(*single), marker, color=color, alpha=0.3, markersize=4)
        reach = reach if len(reach) > 1 else points
        low, high = min(reach), max(reach)
        low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
        axis.plot([low, high], [low, high], "k-", linewidth=1)
        axis.fill_between([low, high], [low, high], high, color="#D55E00", alpha=0.08)
        axis.text(0.03, 0.97, "danger zone:\nthe flaw grows", va="top", transform=axis.transAxes, fontsize=9)
        axis.axhline(0, color="k", linewidth=0.5)
        axis.axvline(0, color="k", linewidth=0.5)
        axis.set(xlim=(low, high), ylim=(low, high), xlabel="own correction: fall of log pi under $G_f$",
                 ylabel="leak: rise of log pi under $G_u$ (nats per unit step)",
                 title={"plain": "plain gradient", "adam": "through Adam"}[rule])
        axis.legend(fontsize=8, title="held-out flaws: -leak / own", title_fontsize=8, loc="lower right")
    save(figure, path)


def draw_kernels(grams, path):
    """Per model: the cosines of all pairs of probes, sorted by action and then label; and the pair groups per
    block. grams: {model: ({block: Gram matrix}, probes)}. Nothing is drawn where there are none."""
    if not grams:
        return
    figure, axes = plt.subplots(len(grams), 2, figsize=(13, 6 * len(grams)), squeeze=False,
                                constrained_layout=True)
    for (left, right), (model, (of_block, probes)) in zip(axes, grams.items()):
        counts = {p.action: sum(q.action == p.action for q in probes) for p in probes}
        place = lambda i: (-counts[probes[i].action], probes[i].action, probes[i].flawed)
        order = sorted(range(len(probes)), key=place)
        image = left.imshow(cosine(of_block["all"])[numpy.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r")
        figure.colorbar(image, ax=left, shrink=0.7, label="cosine")
        before = [None] + [probes[i] for i in order]
        starts = [k for k, i in enumerate(order) if k == 0 or before[k].action != probes[i].action]
        turns = [k for k, i in enumerate(order) if k and probes[i].flawed and not before[k].flawed]
        for k in starts[1:]:
            left.axhline(k - 0.5, color="k", linewidth=0.4)
            left.axvline(k - 0.5, color="k", linewidth=0.4)
        for k in turns:  # from here on the same action's flawed probes
            left.plot([-0.035 * len(order), -0.5], [k - 0.5] * 2, color="#D55E00", lw=0.8, clip_on=False)
        named = [k for k in starts if counts[probes[order[k]].action] >= len(probes) / 40]
        left.set(xticks=[], yticks=[k + counts[probes[order[k]].action] / 2 - 0.5 for k in named],
                 xlim=(-0.5, len(order) - 0.5))
        left.set_title(f"{model}: cosine of grad log pi(action)\nby action; below each orange mark: flawed", fontsize=10)
        left.set_yticklabels([probes[order[k]].action for k in named], fontsize=7)
        left.tick_params(length=0, pad=22)
        for k, (block, gram) in enumerate(of_block.items()):
            cells = group_cosines(gram, probes, draws=400)
            for g, name in enumerate(n for n in GROUPS if n in cells):
                cell = cells[name]
                x = k + 0.15 * (g - 2)
                right.plot([x], [cell["cosine"]], "o", color=COLORS[g], markersize=5,
                           label=f"{name}  {GROUPS[name]}" if k == 0 else None)
                if cell["low"] is not None:
                    right.plot([x, x], [cell["low"], cell["high"]], color=COLORS[g], linewidth=1.5)
        right.axhline(0, color="k", linewidth=0.5)
        right.set(ylabel="cosine", xticks=range(len(of_block)))
        right.set_title("mean cosine per pair group and block, 95% over games", fontsize=10)
        right.set_xticklabels([b.replace(" ", "\n") for b in of_block], fontsize=8)
        right.legend(fontsize=8)
        right.grid(axis="y", alpha=0.3)
    save(figure, path)


def fate_points(starts):
    """{rule: [(name, kind, (net, low, high), [share of steps after / before, a number a run])]} for `draw_fate`.

    starts: [(name, rows of coupling.py of one model, `fates` of runs that began with it), ...].
    """
    rules = [rule for rule in ("plain", "adam") if all(rule in rows[0] for _, rows, _ in starts)]
    points = {rule: [] for rule in rules}
    for rule, (name, rows, became) in ((rule, start) for rule in rules for start in starts):
        for kind in (kind for kind in FLAWS if kind in common(rows, rule)):
            net = combine(rows, rule, kind)["net"]
            grown = [after / before for before, after in (one[kind] for one in became.values()) if before]
            if grown and net[0] is not None:  # else too rare for a draw or more
                points[rule].append((name, kind, net, grown))
    return points


def draw_fate(points, path, of="share of steps"):
    """Leak + own correction at the start against what became of each flaw under RL, a point a kind of flaw and
    run. (Not their ratio, which is none where nothing corrects a flaw: the edge of the danger zone, ratio 1, is
    a sum of 0.)

    points: as `fate_points` has them. Upwards: how common the flaw is after training over before, on the same
    games, `of` what; below 1 it was unlearnt.
    """
    figure, axes = plt.subplots(1, len(points), figsize=(6.8 * len(points) + 2.6, 5), squeeze=False,
                                constrained_layout=True)
    for axis, (rule, of_rule) in zip(axes[0], points.items()):
        names = list(dict.fromkeys(name for name, *_ in of_rule))
        for name, kind, (net, low, high), grown in of_rule:
            marker, color = MARKERS[names.index(name) % len(MARKERS)], FLAW_COLORS[kind]
            label = kind.replace("_", " ") + (f", {name}" if len(names) > 1 else "")
            axis.plot([net] * len(grown), grown, marker, color=color, label=label, alpha=0.8)
            if low is not None:
                axis.plot([low, high], [sum(grown) / len(grown)] * 2, color=color, linewidth=1)
        axis.axvline(0, color="k", linewidth=1)
        axis.axhline(1, color="k", linewidth=0.5)
        axis.set(title={"plain": "plain gradient", "adam": "through Adam"}[rule], ylim=(0, None),
                 xlabel="leak + own correction at the start, nats per unit step, 95% interval\n"
                 "(right of the line: danger zone)", ylabel=f"{of}, after / before RL (a point a run)")
    axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside: it would hide points
    save(figure, path)


def draw_path(lines, path):
    """Kernel and representation from checkpoint to checkpoint, with 95% bootstrap intervals over games.

    lines: of kernel.jsonl, in the order wanted. Left: mean cosine of policy gradients, the same action good
    and flawed (A) and both good (B); no gap is no separation. Right: how well a linear classifier tells good
    from flawed in the last layer, on games that it has not seen.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    names = [line["model"].rstrip("/").split("/")[-1] for line in lines]

    def bars(axis, cells, shift, color, label):
        for x, (value, low, high) in enumerate(cells):
            axis.plot([x + shift], [value], "o", color=color, label=label if x == 0 else None)
            if low is not None:
                axis.plot([x + shift] * 2, [low, high], color=color, linewidth=1.5)
    for g, (color, shift) in zip("ABE", zip(COLORS, (-0.12, 0.0, 0.12))):
        cells = [line["cosines"]["all"][g] for line in lines]
        bars(left, [(c["cosine"], c["low"], c["high"]) for c in cells], shift, color, f"{g}  {GROUPS[g]}")
    for place, color, shift in (("before", COLORS[3], -0.06), ("after", COLORS[4], 0.06)):
        cells = [line["layers"][place][-1]["accuracy"] for line in lines]
        bars(right, cells, shift, color, f"{place} the action")
    left.set(title="mean cosine of grad log pi(action)", ylabel="cosine")
    right.set(title="good or flawed? linear accuracy, last layer, other games", ylabel="accuracy")
    right.axhline(0.5, color="k", linewidth=0.5)
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description="Pictures from the rows of coupling.py.")
    parser.add_argument("results", nargs="+", help="results.jsonl of one measurement or several; or "
                        "kernel.jsonl: kernel and representation from checkpoint to checkpoint")
    parser.add_argument("--after", action="append", nargs="+", metavar="RUN", help="draw leak + own against "
                        "what became of each flaw: the runs of train.py that began with the policy of the "
                        "first file; again for the second, and so on")
    parser.add_argument("--out", default="danger_zone.png", help="picture to write")
    args = parser.parse_args()
    try:
        files = [[json.loads(line) for line in open(path)] for path in args.results]
        kernels = [row for rows in files for row in rows if "cosines" in row]
        if kernels:
            draw_path(kernels, args.out)
            return
        files = [[row for row in rows if "plain" in row] for rows in files]
        if not all(files):
            raise ValueError("no rows of coupling.py in one of these files")
        if args.after and len(args.after) != len(files):
            raise ValueError("--after: once for each file")
        names = [rows[0]["model"].rstrip("/").split("/")[-1] for rows in files]
        if args.after:
            draw_fate(fate_points(list(zip(names, files, map(fates, args.after)))), args.out)
        else:
            draw_danger_zone([row for rows in files for row in rows], args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

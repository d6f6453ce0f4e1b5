"""Tables and pictures of an experiment, from results.jsonl alone.

    python experiments/analyse.py default                                 # the tables, as Markdown
    python experiments/analyse.py parts --beside classifier --arms none adca unflawed flawed penalty      # with arms of another
    python experiments/analyse.py default --out docs/default-runs.png     # and the picture (of leak and own correction, too:
                                                                          # ...-coupling.png)

Seeds are the unit: means over seeds with t intervals, every seed shown; differences to the baseline are paired by seed, since
the same seed plays the same games in every arm. Games are never pooled over seeds as if they were independent.

Outcomes: what is averaged over training is the mean over iterations of an iteration's rate. `coupled` is the primary
outcome of experiments/README.md: the share of steps that are inadmissible, and of those that are repeated, added.
"""

import argparse
import os
import sys

import numpy
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluate import bootstrap  # noqa: E402
from experiments.run import EXPERIMENTS, HERE, read_runs  # noqa: E402
from support.coupling_report import combine, gaps, text  # noqa: E402

ARM_COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
FLAWS = (("inadmissible", "inadmissible"), ("repeated", "repeated"), ("no_effect", "without effect"))


def mean_and_half(values):
    """Mean and half width of the 95% t interval over seeds; half is nan for fewer than two.

    >>> mean, half = mean_and_half([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)  # 4.303 * 1 / sqrt(3)
    (2.0, 2.484)
    """
    values = numpy.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def outcomes(row):
    """{outcome: percent} of a run: success at each level before and after, flaws averaged over training and at the end."""
    training = lambda key: 100 * float(numpy.mean([one.get(key, numpy.nan) for one in row["training"]]))
    found = {"coupled, training": training("inadmissible") + training("repeated"), "success, training": training("success")}
    for key, name in (*FLAWS, ("malformed", "malformed")):
        found[f"{name}, training"] = training(key)
    for when in ("before", "after"):
        for level, result in row[when].items():
            found[f"{level} {when}"] = 100 * result["success"]
            for key, name in FLAWS:
                found[f"{name}, {level} {when}"] = 100 * result[key]
            if "flawed" in result:  # not in rows of before 2026-11-25
                found[f"any flaw, {level} {when}"] = 100 * result["flawed"]
                found[f"inadmissible of no repeats, {level} {when}"] = 100 * result["inadmissible_anew"] / (1 - result["repeated"])
    for level in set(row["before"]) & set(row["after"]):
        coupled = lambda when: sum(found[f"{name}, {level} {when}"] for name in ("inadmissible", "repeated"))
        found[f"coupled, {level} after - before"] = coupled("after") - coupled("before")
    return found


def by_arm(rows, experiment):
    """{arm: {seed: outcomes}}, arms and seeds in their order."""
    arms = {}
    for row in sorted((row for row in rows if row["experiment"] == experiment), key=lambda row: row["seed"]):
        arms.setdefault(row["arm"], {})[row["seed"]] = outcomes(row)
    return {arm: arms[arm] for arm in (*EXPERIMENTS[experiment][1], *arms) if arm in arms}  # an arm that is run no more: last


def paired(arm, baseline, outcome):
    """Differences of an outcome, arm minus baseline, of the seeds that both have."""
    return [arm[seed][outcome] - baseline[seed][outcome] for seed in sorted(set(arm) & set(baseline))
            if outcome in arm[seed] and outcome in baseline[seed]]


def shown(mean, half, digits=1):
    """`52.5 ± 5.2`, without the half width where there is but one seed."""
    return f"{mean:.{digits}f}" + ("" if numpy.isnan(half) else f" ± {half:.{digits}f}")


def table(arms, wanted, baseline):
    """Markdown: every arm's outcomes, each seed, mean ± 95% t interval; then differences to the baseline, paired."""
    lines = ["| arm | seeds | " + " | ".join(wanted) + " |", "| --- | --- |" + " --- |" * len(wanted)]
    for arm, seeds in arms.items():
        cells = []
        for outcome in wanted:
            values = [found[outcome] for found in seeds.values() if outcome in found]
            each = " / ".join(f"{value:.1f}" for value in values)
            cells.append(f"{each}; **{shown(*mean_and_half(values))}**" if values else "-")
        lines.append(f"| {arm} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |")
    for arm, seeds in arms.items():
        if arm != baseline and baseline in arms:
            pairs = {outcome: paired(seeds, arms[baseline], outcome) for outcome in wanted}
            lines.append(f"| {arm} - {baseline} | {max(map(len, pairs.values()))} pairs | " + " | ".join(
                shown(*mean_and_half(values)) if values else "-" for values in pairs.values()) + " |")
    return "\n".join(lines)


def per_episode(rows, experiment, baseline="none", level="L1"):
    """Markdown: how often each flaw is shown in an episode of the level's test games, before and after (shares of all steps
    change also where other steps go), and what an arm ends with more than the baseline, paired by seed."""
    lines = ["| arm | flaw | times per episode before | after | difference |", "| --- | --- | --- | --- | --- |"]
    line = lambda arm, name, *cells: lines.append(f"| {arm} | {name} | " + " | ".join(
        shown(*mean_and_half(values), digits=2) if values else "" for values in cells) + " |")
    runs = {arm: {row["seed"]: row for row in rows if (row["experiment"], row["arm"]) == (experiment, arm) and level in row["before"]}
            for arm in by_arm(rows, experiment)}
    kinds = (*FLAWS, ("revisited", "back"), ("malformed", "malformed"), ("steps", "(steps)"))
    count = lambda row, when, key: row[when][level].get(key, 0.0) * (1 if key == "steps" else row[when][level].get("steps", numpy.nan))
    for arm, of_seed in runs.items():
        for key, name in kinds if of_seed else ():
            before, after = ([count(row, when, key) for row in of_seed.values()] for when in ("before", "after"))
            line(arm, name, before, after, [b - a for a, b in zip(before, after)])
    for arm, of_seed in runs.items():
        both = sorted(set(of_seed) & set(runs.get(baseline, {})))
        for key, name in kinds if arm != baseline and both else ():
            line(f"{arm} - {baseline}, {len(both)} pairs", name, [], [],
                 [count(of_seed[seed], "after", key) - count(runs[baseline][seed], "after", key) for seed in both])
    return "\n".join(lines)


def by_game(rows, experiment):
    """Markdown: success of each run before and after on all test games of its levels together, and after minus before, paired
    by game, with a 95% bootstrap interval over games: what can be said of one policy, not of training with other seeds. In
    some experiments one evaluation of the common start is "before" for all runs."""
    lines = ["| arm | seed | games | before | after | after - before |", "| --- |" + " --- |" * 5]
    rank = list(EXPERIMENTS.get(experiment, ((), ()))[1])
    for row in sorted((row for row in rows if row["experiment"] == experiment), key=lambda r: (rank.index(r["arm"]) if r["arm"] in rank else 99, r["seed"])):
        levels = sorted(set(row["before"]) & set(row["after"]))
        before, after = ([int(won) for level in levels for won in row[when][level]["won_by_game"]] for when in ("before", "after"))
        if levels and all(len(row["before"][level]["won_by_game"]) == len(row["after"][level]["won_by_game"]) for level in levels):
            low, high = bootstrap([100 * (b - a) for a, b in zip(before, after)])
            share = [100 * sum(won) / len(won) for won in (before, after)]
            lines.append(f"| {row['arm']} | {row['seed']} | {len(before)} | {share[0]:.1f} | {share[1]:.1f} | "
                         f"{share[1] - share[0]:+.1f} ({low:+.1f}, {high:+.1f}) |")
    return "\n".join(lines) if len(lines) > 2 else ""


REPAIRED = "2026-11-25"  # rows from before have a split through Adam that left the batch's own gradient out of the moments


def splits(rows, experiment, kinds, rule="plain"):
    """{arm: {iteration: {seed: {rule: {kind: {"leak", "own", "net"}}}}}} of what the runs measured on the way, along the plain
    gradient or through the second moments that the run's "adam" had then (before its first update: none)."""
    arms = {}
    for row in sorted((row for row in rows if row["experiment"] == experiment), key=lambda row: row["seed"]):
        stale = rule == "adam" and row.get("date", REPAIRED) < REPAIRED
        for one in () if stale else row.get("coupling", []):
            cells = {kind: {"leak": one[f"leak_{rule}_{kind}"], "own": one[f"own_{rule}_{kind}"]}
                     for kind in kinds if f"leak_{rule}_{kind}" in one}
            for cell in cells.values():
                cell["net"] = cell["leak"] + cell["own"]
            if cells:
                arms.setdefault(row["arm"], {}).setdefault(one["iteration"], {})[row["seed"]] = {rule: cells}
    order = EXPERIMENTS[experiment][1] if experiment in EXPERIMENTS else arms
    return {arm: arms[arm] for arm in order if arm in arms}


def coupling_table(rows, experiment, baseline, kinds=("inadmissible", "repeated"), rule="plain"):
    """Markdown: leak, own correction and their ratio (through Adam: their sum, of which there always is one) at every
    measurement of every arm, over seeds, and what the last differs by from the baseline's, paired by seed (the same seed
    measures on the same games)."""
    arms = splits(rows, experiment, kinds, rule)
    if not arms:
        return ""
    last, digits = max(when for times in arms.values() for when in times), 2 if rule == "plain" else 0
    names, head = (("leak", "own", "ratio"), "ratio -leak / own") if rule == "plain" else (("leak", "own", "net"), "net")
    lines = [f"| flaw | arm | iteration | seeds | leak | own correction | {head} |", "| --- | --- |" + " --- |" * 5]
    line = lambda kind, arm, when, n, found: lines.append(
        f"| {kind} | {arm} | {when} | {n} | " + " | ".join(text(*found[name], digits=digits) for name in names) + " |")
    for kind in kinds:
        for arm, times in arms.items():
            for when in sorted(when for when, seeds in times.items() if len(seeds) > 1):
                line(kind, arm, when, len(times[when]), combine(list(times[when].values()), rule, kind))
        for arm, times in arms.items():
            if arm != baseline and last in times and last in arms.get(baseline, {}):
                both = sorted(set(times[last]) & set(arms[baseline][last]))
                found = gaps([arms[baseline][last][s] for s in both], [times[last][s] for s in both], rule, kind)
                if len(both) > 1 and found:
                    line(kind, f"{arm} - {baseline}", last, f"{len(both)} pairs", found)
    return "\n".join(lines)


def draw_coupling(rows, experiment, path, kinds=("inadmissible", "repeated")):
    """Leak and own correction over training, a panel a kind of flaw, a colour an arm: means over seeds, bars 95% t."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.3), constrained_layout=True, sharey=True)
    for axis, kind in zip(axes, kinds):
        for k, (arm, times) in enumerate(splits(rows, experiment, kinds).items()):
            for name, mark, style in (("leak", "o", "-"), ("own", "s", "--")):
                points = [(when, *mean_and_half([cell["plain"][kind][name] for cell in seeds.values() if kind in cell["plain"]]))
                         for when, seeds in sorted(times.items())]
                at, mean, half = zip(*points)
                sign = 1 if name == "leak" else -1
                axis.errorbar([when + 0.4 * k for when in at], [sign * m for m in mean], numpy.nan_to_num(half), marker=mark,
                              ls=style, capsize=3, color=ARM_COLORS[k % 7], ms=5,
                              label=f"{arm}: " + ("leak" if name == "leak" else "own correction (how far it lowers)"))
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(xlabel="iteration", title=kind)
    axes[0].set_ylabel("nats per unit step; where the full line is\nabove the broken one: danger zone")
    axes[0].legend(fontsize=7, loc="lower left", ncol=2)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.25 * (high - low), high)  # room for it
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(rows, experiment, arms, baseline, path):
    """Learning curves with bands, success of every seed, paired differences."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    colors, marks = ARM_COLORS, "osv^Dx*"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), constrained_layout=True)
    level = next((name for name in ("L1", "L2", "L0") if all(f"{name} after" in f for a in arms.values() for f in a.values())), None)
    success = f"{level} after" if level else "success, training"  # of runs that were not evaluated
    for k, (arm, seeds) in enumerate(arms.items()):
        runs = [row["training"] for row in rows if row["experiment"] == experiment and row["arm"] == arm]
        length = min(map(len, runs))
        curves = numpy.array([[100 * (one["inadmissible"] + one["repeated"]) for one in run[:length]] for run in runs])
        smooth = numpy.array([[c[max(0, i - 4):i + 1].mean() for i in range(length)] for c in curves])
        axes[0].plot(range(1, length + 1), smooth.mean(0), color=colors[k % 7], label=arm, ls=["-", "--", "-.", ":"][k % 4])
        if len(runs) > 1:
            half = stats.t.ppf(0.975, len(runs) - 1) * smooth.std(0, ddof=1) / len(runs) ** 0.5
            axes[0].fill_between(range(1, length + 1), smooth.mean(0) - half, smooth.mean(0) + half, color=colors[k % 7], alpha=0.12)
        for when, x, face in ((f"{level} before", k - 0.15, "none"), (success, k + 0.15, colors[k % 7])):
            values = [found[when] for found in seeds.values() if when in found]
            if not values:
                continue
            mark = marks[k % 7] if face != "none" else "o"
            edge = {} if mark == "x" else {"edgecolors": colors[k % 7]}  # a mark without an inside has no edge
            axes[1].scatter([x] * len(values), values, marker=mark, s=30, facecolors=face, **edge)
            mean, half = mean_and_half(values)
            axes[1].errorbar([x + 0.12], [mean], [[0 if numpy.isnan(half) else half]] * 2, fmt="_", color=colors[k % 7], capsize=3)
    axes[0].set(xlabel="iteration", ylim=(0, None))
    axes[0].set_title("inadmissible + repeated, % of steps, in training\n(mean of 5 iterations; band: 95% t over seeds)", fontsize=10)
    axes[0].legend(fontsize=7, loc="lower left", ncol=3)
    axes[1].set(xticks=range(len(arms)), ylim=(0, 100))
    axes[1].set_title(f"success {f'on {level}' if level else 'in training'}, %\n(a mark a seed{', hollow: before' * bool(level)}; bars: 95% t)", fontsize=10)
    axes[1].set_xticklabels(arms, rotation=20, ha="right")
    others = [arm for arm in arms if arm != baseline and baseline in arms]
    for k, arm in enumerate(others):
        for shift, outcome, mark in ((-0.15, success, "o"), (0.15, "coupled, training", "s")):
            values = paired(arms[arm], arms[baseline], outcome)
            axes[2].scatter([k + shift] * len(values), values, marker=mark, s=25, facecolors="none", edgecolors="grey")
            mean, half = mean_and_half(values)
            axes[2].errorbar([k + shift + 0.08], [mean], [[0 if numpy.isnan(half) else half]] * 2, fmt=mark, capsize=4, ms=5,
                             color="#0072B2" if mark == "o" else "#D55E00",
                             label=("success" + ", training" * (not level) if mark == "o" else "coupled flaws, training") if k == 0 else None)
    axes[2].axhline(0, color="grey", lw=0.8)
    axes[2].set(xticks=range(len(others)), xlim=(-0.6, len(others) - 0.4))
    axes[2].set_title(f"minus {baseline}, points, paired by seed\n(grey: a seed; bars: 95% t)", fontsize=10)
    axes[2].set_xticklabels(others, rotation=20, ha="right")
    if others:
        axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Tables and pictures of an experiment.")
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--results", default=os.path.join(HERE, "results.jsonl"))
    parser.add_argument("--baseline", default="none", help="what the other arms are compared with")
    parser.add_argument("--arms", nargs="+", help="these alone, in this order (default: all that have rows)")
    parser.add_argument("--beside", choices=list(EXPERIMENTS), help="another experiment on the same games: its arms join this one's")
    parser.add_argument("--out", help="picture to write")
    args = parser.parse_args()
    rows = [row for row in read_runs(args.results) if not args.arms or row["arm"] in args.arms]
    own = {row["arm"] for row in rows if row["experiment"] == args.experiment}
    rows = [{**row, "experiment": args.experiment} if row["experiment"] == args.beside and row["arm"] not in own else row for row in rows]
    found = by_arm(rows, args.experiment)
    arms = {arm: found[arm] for arm in args.arms or found if arm in found}  # in the order in which they were asked for
    if not arms:
        sys.exit(f"analyse.py: no rows of {args.experiment} in {args.results}: python experiments/run.py {args.experiment}")
    known = {outcome for seeds in arms.values() for found in seeds.values() for outcome in found}
    first = [o for o in ("L1 before", "L1 after", "L2 before", "L2 after", "L0 after", "success, training") if o in known]
    level = next((name for name in ("L1", "L2", "L0") if f"{name} before" in known), None)  # of which flaws are told, too
    flaws = ["coupled, training", f"coupled, {level} after - before"] + [f"{name}, {level} {when}" for _, name in FLAWS for when in ("before", "after")]
    flaws = [o for o in flaws if o in known]
    each = [f"{name}, training" for name in ("inadmissible", "repeated", "without effect", "malformed")]
    each += [o for name in ("any flaw", "inadmissible of no repeats") for when in ("before", "after") if (o := f"{name}, {level} {when}") in known]
    print(f"{args.experiment}, % (each seed; mean ± half of the 95% t interval over seeds)\n\n"
          f"{table(arms, first, args.baseline)}\n\n{table(arms, flaws, args.baseline)}\n\n{table(arms, each, args.baseline)}")
    if level:
        print(f"\n{per_episode(rows, args.experiment, args.baseline, level)}")
    gains = by_game(rows, args.experiment)
    print(f"\nSuccess on all of its test games, %; 95% intervals over games, paired (of one policy each, not over seeds)\n\n{gains}" if gains else "", end="\n")
    coupling = coupling_table(rows, args.experiment, args.baseline)
    print(f"\nNats per unit step; 95% t intervals over seeds, of ratios by jackknife\n\n{coupling}" if coupling else "", end="\n")
    through_adam = coupling_table(rows, args.experiment, args.baseline, ("inadmissible", "repeated", "flawed"), "adam")
    if through_adam:
        print(f"\nThe same through Adam's second moments as the run had them\n\n{through_adam}")
    if args.out:
        try:
            draw(rows, args.experiment, arms, args.baseline, args.out)
            if coupling:
                draw_coupling(rows, args.experiment, "-coupling".join(os.path.splitext(args.out)))
        except (OSError, ValueError) as error:
            sys.exit(f"analyse.py: --out {args.out}: {error}")


if __name__ == "__main__":
    main()

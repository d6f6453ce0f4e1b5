"""The learning curves of one run or several: `curves.png` from `metrics.jsonl`.

    python -m support.curves runs/alfworld-...                    # redraw one run
    python -m support.curves runs/a runs/b runs/c --out both.png  # several runs in one picture
"""

import argparse
import json
import os

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402

# Wong's palette: distinct for colour-blind readers; line styles keep it readable in grey.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
FLAW_COLORS = {"malformed": "#CC79A7", "inadmissible": "#E8702A", "no_effect": "#E6A817", "repeated": "#56B4E9",
               "revisited": "#2FB58A", "flawed": "#000000"}  # the same in every picture and on the report's page
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-"]


def read_metrics(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def smooth(values, width=5):
    """Running mean over the last `width` points."""
    return [sum(values[max(0, i - width + 1):i + 1]) / len(values[max(0, i - width + 1):i + 1]) for i in range(len(values))]


def draw(folders, out, names=None):
    """Panels: success (training, and evaluation with intervals), flaws, classifier accuracy, KL and entropy; where a run
    has them, the log-probabilities of probes (--probes), and leak and own correction (--coupling-every)."""
    runs = [read_metrics(folder) for folder in folders]
    there = {key for rows in runs for row in rows for key in row}
    panels = [
        ("success", [("success", "training games")]),
        ("flawed actions, share of steps", [("inadmissible", "inadmissible"), ("repeated", "repeated"),
                                            ("no_effect", "without effect"), ("malformed", "malformed")]),
        ("mean advantage: below 0 reward punishes", [("advantage_inadmissible", "inadmissible"), ("advantage_repeated", "repeated"),
                                                    ("advantage_flawed", "all flawed"), ("advantage_unflawed", "unflawed")]),
        ("classifier: accuracy by class and outcome",
         [(f"accuracy_{form}_{label}_{outcome}", f"{name}, {label} steps of {outcome} episodes")
          for form, name in (("value", "head"), ("generative", "words"))
          for outcome in ("won", "lost") for label in ("good", "bad")]),
        ("policy", [("entropy", "entropy per token (nats)"), ("kl", "KL to the reference"),
                    ("clip_fraction", "clip fraction")]),
    ]
    watched = [("probes: mean log pi(action), nats", [("probe_good", "good"), ("probe_flawed", "flawed"),
                                                      ("probe_margin", "margin: good - flawed")])]
    watched += [(f"held-out flaws, {named}: nats per unit step",
                 [(f"{part}_{rule}_{kind}", f"{name}, {kind}") for kind in ("flawed", "inadmissible", "repeated")
                  for part, name in (("leak", "leak"), ("own", "own correction"))])
                for rule, named in (("plain", "plain gradient"), ("adam", "through Adam"))]
    panels += [panel for panel in watched if there & {key for key, _ in panel[1]}]
    panels = [panel for panel in panels if there & {key for key, _ in panel[1]} or not panel[0].startswith("mean advantage")]
    count = -(-len(panels) // 2)
    figure, axes = plt.subplots(count, 2, figsize=(11, 3.75 * count), constrained_layout=True)
    for axis, (title, lines) in zip(axes.flat, panels):
        k = 0
        for r, rows in enumerate(runs):
            prefix = "" if len(folders) == 1 else f"{(names or folders)[r]}: "
            for key, label in lines:
                points = [(row["iteration"], row[key]) for row in rows if key in row]
                if points:
                    xs, ys = zip(*points)
                    color = FLAW_COLORS.get(key.removeprefix("advantage_"), COLORS[k % 7]) if len(folders) == 1 else COLORS[k % 7]
                    axis.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
                    ys = ys if title.startswith("held-out") else smooth(ys)  # few points
                    axis.plot(xs, ys, color=color, linestyle=STYLES[k % 7], label=prefix + label)
                    k += 1
            if title == "success":
                for split in ("L0", "L1", "L2"):
                    marks = [(row["iteration"], row[f"eval_{split}"]) for row in rows if f"eval_{split}" in row]
                    if marks:
                        xs, ys = [x for x, _ in marks], [m["success"] for _, m in marks]
                        error = [[m["success"] - m["low"] for _, m in marks], [m["high"] - m["success"] for _, m in marks]]
                        axis.errorbar(xs, ys, error, fmt="o" if split == "L1" else "s", capsize=4, color=COLORS[(k + 1) % 7],
                                      label=f"{prefix}{split}, 95% interval", markersize=5)
                        k += 1
        axis.set(title=title, xlabel="iteration")
        if title.startswith(("probes", "held-out", "mean advantage")):  # of either sign
            axis.axhline(0, color="k", linewidth=0.5)
        else:
            axis.set_ylim(bottom=0)
        if title == "success":
            axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "no classifier in this run", ha="center", transform=axis.transAxes)
    for axis in list(axes.flat)[len(panels):]:
        axis.set_visible(False)
    partial = out + ".partial.png"
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    os.replace(partial, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the learning curves of runs.")
    parser.add_argument("runs", nargs="+", help="folders with metrics.jsonl")
    parser.add_argument("--names", nargs="+", help="what to call them")
    parser.add_argument("--out", help="picture to write (default: curves.png in the first run)")
    args = parser.parse_args()
    draw(args.runs, args.out or os.path.join(args.runs[0], "curves.png"), args.names)

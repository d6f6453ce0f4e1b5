"""What coupling.py measured, as one page to look at: python coupling.py ... --report report.html

Of support/report.py's template: a table for every model and rule, the pictures, the probes with log pi of every model, and
the held-out episodes of each model's last draw, every step with what reinforcing unflawed steps (leak) and punishing flawed
ones (own correction) would do to it.
"""

import os

import torch

from evaluate import summarize
from support.coupling_report import KINDS, NAMES, combine, paired, text
from support.report import describe, facts_of, section, write_report
from support.representation import representation_table

PICTURES = {"danger_zone.png": "The danger zone: leak against own correction", "fate.png": "What became of each flaw under RL",
            "kernel.png": "The kernel: the probes' policy gradients, by action and label"}
RULES = {"plain": "plain gradient", "adam": "through Adam"}


def held_out_set(name, chat, batch, change):
    """A model's held-out episodes as a set of the page.

    Args: batch: of S steps, with advantages. change: (2, B, S), of unflawed and flawed steps, by block, as
        `coupling.split_update` gives it, in nats per unit step."""
    leak, own = change.sum(1).tolist()
    dependent = {"low": None, "high": None}  # episodes of one game are not independent: no interval
    summary = summarize(batch.episodes)
    summary = {**summary, **dependent, "tasks": {k: {**row, **dependent} for k, row in summary["tasks"].items()}}
    about = ("held-out episodes of the last draw; leak and own correction: what a step along the gradient of the other "
             "half's unflawed, flawed steps does to log pi of this action (nats per unit step, plain gradient)")
    return describe(name, batch.episodes, chat, summary, about, label=batch.labels.tolist(),
                    advantage=batch.advantages.tolist(), leak=leak, own=own)


def split_sections(models, rows):
    """A table for every model and rule; with several models the paired differences, as text."""
    found = []
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        for rule in (rule for rule in RULES if mine and rule in mine[0]):
            head = ["kind of step", "steps", "leak", "own correction", "net", "-leak / own", "so it"]
            lines = []
            for kind in (kind for kind in KINDS if any(kind in row[rule] for row in mine)):
                cells = combine(mine, rule, kind)
                _, low, high = cells["net"]
                said = "open" if low is None else "grows" if low > 0 else "falls" if high < 0 else "open"
                steps = sum(row[rule][kind]["steps"] for row in mine if kind in row[rule])
                values = [text(*cells[name], 3 if rule == "plain" else 0) for name in NAMES[:3]]
                values.append("own >= 0" if cells["ratio"][0] is None else text(*cells["ratio"], 2))
                lines.append([kind, steps, *values, "" if kind == "good" else said])
            over = "t intervals over the draws" if len(mine) > 1 else "bootstrap intervals over games"
            about = (f"{len(mine)} draw{'s' * (len(mine) > 1)} of {mine[0]['episodes']} episodes; nats per unit step, 95% {over}. Net is "
                     "leak + own correction: above 0 the flaw grows although it is punished (a ratio from 1 on, or no "
                     "correction at all: own >= 0); open: the interval of net holds 0, or there is none.")
            found.append(section(f"{model}: {RULES[rule]}", about, head, lines))
    if len(models) > 1 and rows:
        found.append(section("Differences, paired by draw", pre=paired(models, rows)))
    return found


def probe_section(episodes, scores):
    """The probes, one a line, with log pi of every model.

    Args: episodes: of the file (support/probes.py). scores: {model: (n,) log pi of the n probes, in the file's order}."""
    lines, number = [], 0
    for episode in episodes:
        for i, (observation, command) in enumerate(episode["turns"]):
            if str(i) in episode["probes"]:
                flaws = episode["probes"][str(i)]
                scored = [f"{float(score[number]):+.2f}" for score in scores.values()]
                lines.append([command, ", ".join(flaws) or "good", *scored, f"{episode['game']}, step {i + 1}",
                              observation[:160] + "…" * (len(observation) > 160)])
                number += 1
    flawed = torch.tensor([line[1] != "good" for line in lines])
    margins = "; ".join(f"{model}: good {float(score[~flawed].mean()):+.2f}, flawed {float(score[flawed].mean()):+.2f}"
                        for model, score in scores.items())
    return section("The probes", f"A careless expert's steps on games outside training; mean log pi of the action: {margins}.",
                   ["action", "it is", *(f"log pi, {model}" for model in scores), "in the game", "after"], lines)


def write_page(args, rows, episodes, seen_of, drawn):
    """Write --report. Raises OSError.

    Args: rows: of results.jsonl. episodes: of the file of probes, or None. seen_of: {model: ...} in each of `held_out`
        (arguments of `held_out_set`), `scores` (of `probe_section`), `layers` (of support/representation.py), `said` (the
        table of the model's kernel). drawn: which of PICTURES there are; the folder may hold older ones.
    """
    sections = split_sections(args.model, rows)
    for name, title in PICTURES.items():
        if name in drawn:
            sections.append(section(title, picture=os.path.join(args.out, name)))
    for model, cells in seen_of.layers.items():
        table = f"{seen_of.said[model]}\n\n{representation_table(cells)}"
        sections.append(section(f"{model}: kernel and representation", pre=table))
    if seen_of.scores:
        sections.append(probe_section(episodes, seen_of.scores))
    sets = [held_out_set(model, *shown) for model, shown in seen_of.held_out.items()]
    title = "Gradient coupling: " + ", ".join(args.model)
    write_report(args.report, title, sets, facts=facts_of(args), sections=sections)

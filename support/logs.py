"""What a run logs of an iteration: metrics.jsonl, TensorBoard, a line on the screen, sample episodes."""

import importlib.metadata
import json
import os
import platform
import subprocess

from tqdm import tqdm

from rollout import FLAWS, flaw_rates


def progress(what, total=None, unit=" steps", over=None):
    """A bar with a time to go, gone when it is done: on a terminal alone (a log would fill with it), and of the first
    process alone. It is told with `update`, or goes along with what is iterated `over`."""
    first = int(os.environ.get("RANK", 0)) == 0
    return tqdm(over, total=total, desc=what, unit=unit, leave=False, disable=None if first else True)


class Tally:
    """Adds up, over the micro-batches of one optimizer step, the parts of the loss and the classifier's answers."""

    def __init__(self):
        self.sums = {}

    def add(self, parts=(), **more):
        for name, value in {**dict(parts), **more}.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.item() if hasattr(value, "item") else float(value))

    def judge(self, form, says_good, labels, won):
        """Count the answers and the right ones in each cell, class x outcome; (n,) each. Labels other than 0, 1: no cell."""
        for answer, label, w in zip(says_good.tolist(), labels.tolist(), won.tolist()):
            if label in (0, 1):
                cell = f"{form}_{'good' if label else 'bad'}_{'won' if w else 'lost'}"
                self.add({f"count_{cell}": 1, f"right_{cell}": answer == bool(label)})


def metrics_of(episodes, parts):
    """Means over the episodes of an iteration, and over its updates' dictionaries `parts`."""
    mean = lambda values: sum(values) / len(values)
    found = {"success": mean([e.won for e in episodes]), "reward": mean([e.reward for e in episodes]),
             "steps": mean([len(e.steps) for e in episodes]), **flaw_rates(episodes),
             "truncated": sum(e.truncated for e in episodes), "tokens": sum(len(e.tokens) for e in episodes)}
    if episodes[0].score is not None:
        found["score"] = mean([max(0, e.score) for e in episodes])
    names = sorted({name for part in parts for name in part})
    for name in names:
        if name.startswith("count_"):  # answers of the classifier: shares of all of them, not means of shares
            count = sum(part.get(name, 0) for part in parts)
            right = sum(part.get(name.replace("count_", "right_"), 0) for part in parts)
            found |= {name: count, name.replace("count_", "accuracy_"): right / count}
        elif not name.startswith("right_"):
            found[name] = mean([part[name] for part in parts if name in part])
    return found


def flaw_advantages(episodes, advantages):
    """Mean advantage of the steps with each flaw, of all flawed ones and of the others: the claim that reward punishes
    flaws in expectation, E[1{flawed} A] <= 0, in this iteration. Kinds that nobody showed are left out.

    advantages: (S,) of the steps, laid end to end.
    """
    steps = [step for episode in episodes for step in episode.steps]
    kinds = {name: [getattr(step, name) for step in steps] for name in (*FLAWS, "flawed")}
    kinds["unflawed"] = [not step.flawed for step in steps]
    return {f"advantage_{name}": advantages[there].mean().item() for name, there in kinds.items() if any(there)}


def line_of(row):
    """The one line an iteration prints."""
    return (f"success {row['success']:.2f}  reward {row['reward']:.2f}  loss {row['loss']:+.4f}  inadmissible "
            f"{row['inadmissible']:.2f}  repeated {row['repeated']:.2f}  no signal {row['groups_without_signal']:.2f}  kl "
            f"{row['kl']:.4f}  {row['tokens'] / (row['seconds_play'] + row['seconds_update']):,.0f} tokens/s")


def log(out, board, iteration, row):
    """A line of metrics.jsonl, and TensorBoard's scalars."""
    with open(os.path.join(out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"iteration": iteration, **row}) + "\n")
    for name, value in row.items():
        if isinstance(value, dict):
            board.add_scalar(f"{name}/success", value["success"], iteration)
        else:
            board.add_scalar(name, value, iteration)


def write_samples(out, tokenizer, episodes, iteration):
    """Two won and two lost episodes as text, with each step's flaws."""
    picks = [e for e in episodes if e.won][:2] + [e for e in episodes if not e.won][:2]
    with open(os.path.join(out, "samples", f"iteration-{iteration:06d}.txt"), "w") as file:
        for episode in picks:
            file.write(f"=== {episode.game.name}   won: {episode.won}\n{tokenizer.decode(episode.tokens)}\n")
            for k, step in enumerate(episode.steps):
                flaws = [n for n in FLAWS if getattr(step, n)]
                file.write(f"  step {k + 1}: {step.action!r} {' '.join(flaws)}\n")
            file.write("\n")


def machine():
    """What a run's numbers depend on besides its flags: versions, cores, memory, GPU, and the commit where git tells it."""
    import torch
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git
        commit = None
    names = ("torch", "transformers", "alfworld", "textworld", "scienceworld")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names},
            "commit": commit, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

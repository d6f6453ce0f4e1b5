"""What is a policy's leak made of: praise or blame, and how much of it is the baseline's?

    python -m experiments.leak_parts --model policies/tiny --draws 10 --blocks 1 --out runs/leak      # flags of coupling.py

coupling.py's leak is what the unflawed steps' gradient G_u does to flawed actions in other games. Two things it does not
tell. G_u praises unflawed steps (A > 0: of won episodes) *and blames* others (A < 0: of lost ones): only where praise raises
flaws does "what is right here" spread to where it is wrong; blame may raise them as well, since what one action of a
softmax loses the others gain. And the split depends on the baseline: E[sum of grad log pi over all sampled actions] = 0, so
a constant k added to every advantage leaves the expected update as it is, but moves k <U_1, h> into the leak and as much out
of the correction. GRPO's advantages have mean 0 over episodes, not over steps: lost episodes are longer. So leak and
correction are given at GRPO's own baseline and centred over steps (token weighted); only their sum is free of k.

    h      = grad of mean log pi(action) over held-out steps of a kind     effect of a direction D: <D, h>, nats per unit step
    praise = of unflawed steps with A > 0      leak = praise + blame       centred leak = leak + k <U_1, h>
    blame  = of unflawed steps with A < 0      own  = of flawed steps      centred own  = own  + k <F_1, h>
    U_1, F_1: gradients of unflawed and of flawed steps with an advantage of 1           k = - sum of w A over all tokens

First derivatives by inner products, where coupling.py takes finite differences (to be compared: `leak`, `own`). Where a
checkpoint has Adam's moments the same through them, as its step divides (coupling.py, question (i)).
"""

import json
import os
import sys
from collections import defaultdict
from dataclasses import replace

import torch

from coupling import ascent
from experiments.analyse import mean_and_half
from games.pool import EnvPool
from support.coupling_report import kinds_of
from support.coupling_run import as_run, checkpoint_moments, choose_games, collect, parse_arguments, prepare
from support.logs import progress
from support.setup import player

KINDS = ("inadmissible", "anew", "repeated", "flawed", "good")  # anew: inadmissible, but no repeat


def directions(args, run, batch):
    """{name: gradient that goes up, tensors like the parameters} of a batch with GRPO's advantages A (S,), and k."""
    token = batch.step_of_token
    flawed, A = batch.flawed[token], batch.advantages[token]                                                  # (N,)
    ones = replace(batch, advantages=torch.ones_like(batch.advantages))
    return {"praise": ascent(args, run, batch, ~flawed & (A > 0)), "blame": ascent(args, run, batch, ~flawed & (A < 0)),
            "own": ascent(args, run, batch, flawed), "U_1": ascent(args, run, ones, ~flawed),
            "F_1": ascent(args, run, ones, flawed)}, -float((batch.token_weights * A).sum())


def punished(batch):
    """How much less advantage inadmissible steps have than unflawed ones: (over all steps; between steps that begin in the same
    state of the same game; the same of inadmissible steps that are no repeat).

    Where things go wrong flaws are commoner, so the first number also says *where* they are taken. Of a state both kinds must
    be there; it weighs as many times as it has inadmissible steps. nan where there is none."""
    steps = [(A, (episode.group, step.state), step) for A, (episode, step) in zip(
        batch.advantages.tolist(), ((episode, step) for episode in batch.episodes for step in episode.steps))]
    mean = lambda values: sum(values) / len(values) if values else float("nan")
    bad = lambda step: step.inadmissible
    anew = lambda step: step.inadmissible and not step.repeated
    overall = mean([A for A, _, step in steps if bad(step)]) - mean([A for A, _, step in steps if not step.flawed])
    found, right = [overall], defaultdict(list)
    for A, state, step in steps:
        if not step.flawed:
            right[state].append(A)
    for kind in (bad, anew):
        found.append(mean([A - mean(right[state]) for A, state, step in steps if kind(step) and state in right]))
    return tuple(found)


def targets(args, run, held_out, mask):
    """{kind: h} of held-out steps; mask: (N,) 1.0 for the tokens that are the action itself."""
    kinds = {name: torch.tensor(there) for name, there in kinds_of(held_out).items()}
    kinds["anew"] = kinds["inadmissible"] & ~kinds["repeated"]
    return {kind: ascent(args, run, replace(held_out, token_weights=mask.float() / kinds[kind].sum(),
                                            advantages=kinds[kind].float()))
            for kind in KINDS if kinds[kind].any()}


def effects(D, k, H, scale=None):
    """{kind: {name: <D, h>}} with what follows from it: leak, net, and both parts centred over steps."""
    dot = lambda d, h: sum(float((x * y * s).double().sum()) for x, y, s in zip(d, h, scale or [1.0] * len(h)))
    found = {}
    for kind, h in H.items():
        e = {name: dot(d, h) for name, d in D.items()}
        e["leak"] = e["praise"] + e["blame"]
        found[kind] = e | {"net": e["leak"] + e["own"], "leak, centred": e["leak"] + k * e["U_1"], "own, centred": e["own"] + k * e["F_1"]}
    return found


def measure(args, run, games, seed, v):
    """One draw: the first half of the games gives the directions, the other is held out. A row, or None without a gradient."""
    episodes = collect(args, run.engine, run.chat, run.pool, games, seed, run.bar)
    halves = [[e for e in episodes if (e.group < len(games) // 2) == here] for here in (True, False)]
    (first, _), (held_out, mask) = (prepare(args, run.chat, half) for half in halves)
    if not first.advantages.any():
        return None
    (D, k), H = directions(args, run, first), targets(args, run, held_out, mask)
    row = {"k": k, "success": sum(e.won for e in episodes) / len(episodes), "plain": effects(D, k, H),
           "punished": punished(first)}
    if v:
        moments = v([sum(g) for g in zip(D["praise"], D["blame"], D["own"])])
        row["adam"] = effects(D, k, H, [1.0 / (m.sqrt() + 1e-8) for m in moments])
    return row


def table(rows, rule):
    """Markdown: means over draws with 95% t intervals."""
    names = ("leak", "praise", "blame", "own", "net", "U_1", "F_1", "leak, centred", "own, centred")
    lines = [f"| {rule}: effect on | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for kind in KINDS:
        cells = []
        for name in names:
            mean, half = mean_and_half([row[rule][kind][name] for row in rows if kind in row[rule]])
            cells.append(f"{mean:+.3f}" + (f" ({mean - half:+.3f}, {mean + half:+.3f})" if half == half else ""))  # nan: one draw
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    args = parse_arguments()
    try:
        games = choose_games(args)
        if not args.draws:
            raise ValueError("--draws must be at least 1")
        os.makedirs(args.out, exist_ok=True)
        count = len(games) // args.draws
        with EnvPool(args.workers) as pool, open(os.path.join(args.out, "leak-parts.jsonl"), "a") as file:
            for folder in args.model:
                engine, chat = player(args, folder)
                v, rows = None if args.no_adam else checkpoint_moments(folder, engine.model), []
                with progress(folder, args.draws * -(-count // max(1, args.batch // args.group_size)), " parts") as bar:
                    run = as_run(args, engine.model, bar, engine=engine, chat=chat, pool=pool)
                    for draw in range(args.draws):
                        seed = (args.seed * 1_000_003 + draw) * 10_007  # as coupling.py: the same episodes
                        row = measure(args, run, games[draw * count:(draw + 1) * count], seed, v)
                        if row:
                            rows.append({"model": folder, "draw": draw, "seed": args.seed, "episodes": args.episodes} | row)
                            file.write(json.dumps(rows[-1]) + "\n")
                            file.flush()
                for i, what in enumerate(("over all steps", "in the same state", "in the same state, no repeats") if rows else ()):
                    mean, half = mean_and_half([row["punished"][i] for row in rows])
                    print(f"{folder}: advantage of inadmissible minus unflawed steps, {what}: {mean:+.3f} (half width {half:.3f})", flush=True)
                if not rows:
                    print(f"{folder}: no draw has a gradient, all episodes of a group have one reward: take more --episodes", flush=True)
                for rule in ("plain", "adam") if rows and "adam" in rows[0] else ("plain",) if rows else ():
                    print(f"{folder}, {len(rows)} draws, k {sum(row['k'] for row in rows) / len(rows):+.3f}\n\n{table(rows, rule)}\n", flush=True)
    except (OSError, ValueError) as error:
        sys.exit(f"leak_parts.py: {error}")


if __name__ == "__main__":
    main()

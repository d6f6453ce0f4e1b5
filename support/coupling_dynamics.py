"""`train.py --probes FILE --coupling-every N`: how coupling acts while a policy learns. The dynamics, shown.

    probe_good, probe_flawed      mean log pi(action) of the good and of the flawed probes (support/probes.py)
    probe_margin                  good - flawed: is an action likelier where it is right than where it is not?
                                  (fixed probes under learning: Ren & Sutherland 2024)
    leak_RULE_KIND, own_RULE_KIND the split update, eq. 2 of coupling.py; RULE plain or adam (with the run's
                                  own second moments), KIND of held-out step: a flaw, flawed, good

A run with and without them is the same run, bit for bit: games and samples depend on the seed alone, the
weights are put back, gradients are dropped, and no random state but the engine's own, which every `play`
seeds anew, is used. The games of the split update are the same ones each time, drawn as an iteration's are,
by a seed that no iteration has; of a million houses hardly one is trained on as well.
"""

import argparse
import os
import sys

from types import SimpleNamespace

from coupling import split_update
from games import levels
from rollout import pay_success_only
from support.coupling_report import summarize
from support.coupling_run import as_adam_will, as_run, collect, prepare
from support.probes import encode, probe_file, probe_logprobs
from support.setup import in_half

BLOCKS, STEP = 2, 1e-3  # of coupling.py: no intervals are wanted here; nats


def prepare_watch(run):
    """The probes of `--probes`, as the run's policy reads them, on the process that logs; [] without. The
    file is made where there is none. Ends the run, by one line, where that cannot be."""
    args = run.args
    why = ("--shard: the weights are spread over processes" if args.shard else
           "a policy in bfloat16 (--precision): differences of nearly equal numbers are read"
           if args.coupling_every and in_half(args) else "")
    if why and (args.probes or args.coupling_every):
        sys.exit(f"train.py: --probes and --coupling-every do not go with {why}")
    if not args.probes or not run.accelerator.is_main_process:
        return []
    try:
        os.makedirs(os.path.dirname(args.probes) or ".", exist_ok=True)
        episodes = probe_file(argparse.Namespace(**{"probe_count": 256, **vars(args)}), run.pool)
        return encode(episodes, run.chat)
    except OSError as error:
        sys.exit(f"train.py: --probes {args.probes}: {error.strerror or error}")
    except ValueError as error:
        sys.exit(f"train.py: {error}")


def watch(run, iteration):
    """What is to be logged after this iteration (0: before the first), as described above. Nothing of the run
    changes."""
    args, found = run.args, {}
    if run.probes:
        logprobs = probe_logprobs(run.model, run.probes, args.temperature, args.micro_tokens)      # (n,)
        for name, wanted in (("good", False), ("flawed", True)):
            found[f"probe_{name}"] = logprobs[[p.flawed == wanted for p in run.probes]].mean().item()
        found["probe_margin"] = found["probe_good"] - found["probe_flawed"]
    if args.coupling_every and iteration % args.coupling_every == 0:
        found |= split(run)
    return found


def split(run):
    """The split update between two halves of as many games as an iteration has."""
    args = argparse.Namespace(**{**vars(run.args), "blocks": BLOCKS, "step": STEP,
                                 "batch": run.args.tasks * run.args.group_size})
    games, seed = games_apart(run)
    silent = SimpleNamespace(write=lambda line: None, update=lambda: None)
    try:
        episodes = collect(args, run.engine, run.chat, run.pool, games, seed, silent)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    if args.reward == "success":
        pay_success_only(episodes)
    halves = [[e for e in episodes if (e.group < len(games) // 2) == here] for here in (True, False)]
    if not all(halves):
        return {}
    (first, _), (held_out, mask) = (prepare(args, run.chat, half) for half in halves)
    if not first.advantages.any():  # no group with two rewards: no gradient
        return {}
    changes, share = split_update(args, as_run(args, run.model, None), first, held_out, mask, moments(run))
    return {f"{name}_{rule}_{kind}": cell[name] for rule, change in changes.items()
            for kind, cell in summarize(change, share, held_out, draws=2).items() for name in ("leak", "own")}


def games_apart(run):
    """The games of the split update, the same ones each time, and their seed. (An iteration's seed is
    `--seed` * 1_000_003 + its number. Minus one would not do: Python's random takes -1 for 1.)"""
    seed, least = run.args.seed * 1_000_003 + 999_999, 2 * BLOCKS  # a group for each block of each half
    return levels.sample_games(run.games, least * -(-run.args.tasks // least), seed), seed


def moments(run):
    """`as_adam_will` with the second moments that the run's Adam has now; None before its first update."""
    state = run.optimizer.state
    if not state:
        return None
    return as_adam_will([(state[p]["exp_avg_sq"], float(state[p]["step"])) if p in state else None for p in run.model.parameters()])

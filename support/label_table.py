"""Which labels agree with the oracle, and which credit rules punish what it calls bad? On one set of real episodes.

    python -m support.label_table                                           # ALFWorld: generated houses
    python -m support.label_table --env scienceworld --out experiments/label_table-scienceworld.json
    python -m support.label_table --games official --model runs/.../checkpoint-000032

The policy plays `--count` training games, `--group-size` episodes each, sampled as in training. The oracle (games/oracle.py)
says of every step whether it brought the goal nearer. Then, inside won episodes and inside lost ones:

* how many steps make progress. GraphGPO (arXiv 2605.26684) reports for ALFWorld that 65% of the steps of successful
  episodes do not, and 22% of those of failed ones do;
* precision and recall of the label sources, for either class, with the oracle as the truth. What a source leaves out
  counts as not found; steps that the oracle does not know are left out of everything;
* the mean advantage of flawed and of unflawed steps, of bad and of good ones, under every credit rule: the paper's lemma
  says that flaws are punished in expectation.

Intervals: 95%, bootstrap over games (all episodes of a game are drawn together). Mind what the oracle is: it knows where
everything is, so that a look into the wrong drawer is bad. A label source that praises a sensible search is wrong here,
and perhaps only here.
"""

import argparse
import json
import os
import sys

import numpy
import torch

from classifier_loss import flaw_labels, outcome_labels, rule_labels
from credit import CREDIT
from games import levels, oracle
from games.game import BadGame, most_steps
from games.pool import EnvPool, make_world
from rollout import FLAWS, play
from support.logs import progress
from support.policies import SHIPPED
from support.setup import PLAYED, player

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PUBLISHED = {"progress in lost": 0.22, "no progress in won": 0.65}  # GraphGPO, ALFWorld
MEASURES = ("labelled", "bad precision", "bad recall", "good precision", "good recall")


# ------------------------------------------------------------------------------------------------------- the statistics

def mean_over_games(values, chosen, game, draws=2000, seed=0):
    """Mean of the chosen values, with a 95% interval: percentiles over resampled games (Efron 1979).

    Args:
        values: (S,) numbers or bools. chosen: (S,) bool. game: (S,) ints, the game that each step belongs to.
    Returns: {"mean", "low", "high", "steps"}, where nothing is chosen None, None, None, 0.

    >>> values, game = numpy.array([1, 1, 0, 0]), numpy.array([0, 0, 1, 1])
    >>> mean_over_games(values, values >= 0, game)  # two games: drawn are both, or one of them twice
    {'mean': 0.5, 'low': 0.0, 'high': 1.0, 'steps': 4}
    """
    size = int(game.max()) + 1
    total = numpy.bincount(game, numpy.where(chosen, values, 0).astype(float), size)                    # (games,)
    count = numpy.bincount(game, chosen.astype(float), size)                                            # (games,)
    if count.sum() == 0:
        return {"mean": None, "low": None, "high": None, "steps": 0}
    drawn = numpy.random.default_rng(seed).multinomial(size, [1 / size] * size, draws)                  # (draws, games)
    drawn = drawn[drawn @ count > 0]
    low, high = numpy.quantile((drawn @ total) / (drawn @ count), [0.025, 0.975])
    return {"mean": float(total.sum() / count.sum()), "low": float(low), "high": float(high), "steps": int(count.sum())}


def agreement(labels, truth, among, game):
    """MEASURES of (S,) labels against the oracle's (S,) `truth`, within the steps `among`: {measure: mean_over_games}."""
    among = among & (truth >= 0)
    found = {"labelled": mean_over_games(labels >= 0, among, game)}
    for name, value in (("bad", oracle.BAD), ("good", oracle.GOOD)):
        found[f"{name} precision"] = mean_over_games(truth == value, among & (labels == value), game)
        found[f"{name} recall"] = mean_over_games(labels == value, among & (truth == value), game)
    return found


# ---------------------------------------------------------------------------------------------------------- the sources

def sources_of(episodes):
    """{label source: (S,) labels} of those that need no model and no oracle."""
    flawed = torch.tensor([step.flawed for episode in episodes for step in episode.steps])
    length = torch.tensor([len(episode.steps) for episode in episodes])
    won = torch.tensor([episode.won for episode in episodes]).repeat_interleave(length)
    advantages = CREDIT["grpo"](episodes)
    return {"flaws": flaw_labels(flawed).numpy(), "rules": rule_labels(won, flawed).numpy(),
            "outcome": outcome_labels(advantages).numpy()}


def credit_of(episodes, labels):
    """{credit rule: (S,) advantages}. `labels`: (S,), for the rule that puts labels into the advantage.

    From `credit.CREDIT`, functions from episodes to an advantage for every step.
    """
    return {name: numpy.asarray(rule(episodes, labels=torch.as_tensor(labels))) for name, rule in CREDIT.items()}


# ------------------------------------------------------------------------------------------------------------ the table

def tabulate(episodes, truth):
    """The whole result for episodes in whole groups and the oracle's labels, (S,): a dictionary that JSON can hold."""
    steps = [(episode, step) for episode in episodes for step in episode.steps]
    game = numpy.array([episode.group for episode, _ in steps])
    won = numpy.array([episode.won for episode, _ in steps])
    within = {"won": won, "lost": ~won}
    sources = sources_of(episodes)
    progress = {name: mean_over_games(truth == oracle.GOOD, among & (truth >= 0), game) for name, among in within.items()}
    flags = {name: numpy.array([getattr(step, name) for _, step in steps]) for name in ("flawed", *FLAWS)}
    kinds = {"flawed": flags["flawed"], "unflawed": ~flags["flawed"], **{name: flags[name] for name in FLAWS},
             "oracle bad": truth == oracle.BAD, "oracle good": truth == oracle.GOOD,
             "bad, won": (truth == oracle.BAD) & won, "good, lost": (truth == oracle.GOOD) & ~won}
    rewards = {}
    for episode in episodes:
        rewards.setdefault(episode.group, set()).add(episode.reward)
    return {
        "episodes": len(episodes), "steps": len(steps), "won": sum(episode.won for episode in episodes),
        "groups": len(rewards), "groups with signal": sum(len(different) > 1 for different in rewards.values()),
        "unknown": mean_over_games(truth < 0, truth < 2, game),
        "progress": progress,
        "flaws that make progress": {name: mean_over_games(truth == oracle.GOOD, flags[name] & (truth >= 0), game)
                                     for name in flags},
        "sources": {name: {where: agreement(labels, truth, among, game) for where, among in within.items()}
                    for name, labels in sources.items()},
        "advantages": {rule: {kind: mean_over_games(advantages, chosen, game) for kind, chosen in kinds.items()}
                       for rule, advantages in credit_of(episodes, sources["flaws"]).items()},
    }


def shown(found, scale=100, digits=0):
    """`53 (48-58)`, in percent unless `scale` says otherwise; a dash where there was nothing to measure.

    >>> shown({"mean": 0.5, "low": 0.25, "high": 0.75, "steps": 4})
    '50 (25 to 75)'
    """
    if found["mean"] is None:
        return "-"
    return "{0:.{3}f} ({1:.{3}f} to {2:.{3}f})".format(*(scale * found[k] for k in ("mean", "low", "high")), digits)


def as_text(result):
    """The result as the table that is printed."""
    unknown, progress = result["unknown"], result["progress"]
    lines = [f"{result['episodes']} episodes of {result['groups']} games, {result['won']} won; {result['steps']} steps, "
             f"the oracle does not know {shown(unknown)}%.   (in brackets: 95% intervals over games)", "",
             f"steps that make progress, %: in won episodes {shown(progress['won'])}, in lost ones {shown(progress['lost'])}"
             "   (GraphGPO on ALFWorld: 35 and 22)",
             "flawed steps that make progress, %: " +
             ", ".join(f"{name} {shown(found)}" for name, found in result["flaws that make progress"].items() if found["steps"]),
             "", f"{'% within':22}" + "".join(f"{measure:>18}" for measure in MEASURES)]
    for name, found in result["sources"].items():
        lines += [f"{name + ', ' + where:22}" + "".join(f"{shown(row[m]):>18}" for m in MEASURES) for where, row in found.items()]
    kinds = list(next(iter(result["advantages"].values())))
    lines += ["", "mean advantage   (" + f"{result['groups with signal']} of {result['groups']} groups have a signal)",
              f"{'':14}" + "".join(f"{rule:>24}" for rule in result["advantages"])]
    lines += [f"{kind:14}" + "".join(f"{shown(found[kind], 1, 2):>24}" for found in result["advantages"].values())
              for kind in kinds]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ the episodes

def collect(args, pool):
    """Episodes of the policy on training games, in whole groups, and the oracle's labels, (S,)."""
    types = args.task_types or (["short"] if args.env == "scienceworld" else None)
    games = levels.level_games(args.env, "L1", "train", args.games, types)
    games = levels.sample_games(games, args.count, args.seed)
    folder = args.model or os.path.join(ROOT, "policies", SHIPPED[levels.choose_games(args.games, args.env)])
    how = argparse.Namespace(**{name: None for name in PLAYED} | vars(args), device="cpu", shard=False, engine_memory=0.9,
                             tensor_parallel=1)
    engine, chat = player(how, folder)
    steps = args.max_steps or levels.level_max_steps(args.env, "L1", levels.choose_games(args.games, args.env), types)
    with progress("playing", args.group_size * most_steps(steps, games)) as bar:
        episodes, report = play(engine, pool, chat, games, args.group_size, steps, how.max_context, args.seed,
                                how.show_actions, bar)
    if report["bad_games"]:
        print(f"skipped {len(report['bad_games'])} games that cannot be played: {report['bad_games'][0]}", file=sys.stderr)
    number = {group: i for i, group in enumerate(sorted({episode.group for episode in episodes}))}
    for episode in episodes:
        episode.group = number[episode.group]
    return episodes, numpy.array([label for labels in oracle.oracle_labels(episodes, pool) for label in labels])


def plans_that_still_win(episodes, count=50):
    """ScienceWorld's oracle counts what is left of one plan. Does the rest win, from where lost episodes ended?

    Returns (wins, tried), of the first `count` lost episodes after which a rest was known.
    """
    world, wins, tried = make_world("scienceworld"), 0, 0
    for episode in (e for e in episodes if not e.won):
        *_, (now, _, rest) = oracle.follow(world, episode.game, [step.action for step in episode.steps])
        if isinstance(rest, list) and not now.done and tried < count:
            tried += 1
            for command in rest:
                now = now if now.done else world.step(command)
            wins += now.won
    return wins, tried


def main():
    parser = argparse.ArgumentParser(description="Label sources and credit rules against the oracle.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--env", default="alfworld", choices=levels.ENVS)
    parser.add_argument("--model", help="Hugging Face folder (default: the tiny policy of the environment)")
    parser.add_argument("--games", default="auto", choices=["auto", "official", "generated"], help="ALFWorld's")
    parser.add_argument("--task-types", nargs="+", help="these only (default: all; ScienceWorld: short)")
    parser.add_argument("--count", type=int, default=40, help="games")
    parser.add_argument("--group-size", type=int, default=4, help="episodes of each")
    parser.add_argument("--max-steps", type=int, help="default: as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the games and of sampling")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="environment processes")
    parser.add_argument("--out", help="write the result there as JSON, with every number of the table")
    args = parser.parse_args()
    try:
        if min(args.count, args.group_size, args.workers, 1 if args.max_steps is None else args.max_steps) < 1:
            raise ValueError("--count, --group-size, --workers and --max-steps must be at least 1")
        if args.out and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
            raise ValueError(f"--out {args.out}: there is no folder {os.path.dirname(args.out)}")
        with EnvPool(args.workers) as pool:
            episodes, truth = collect(args, pool)
        if not episodes:
            raise ValueError("none of the games can be played")
        result = {"arguments": vars(args), **tabulate(episodes, truth), "published (GraphGPO)": PUBLISHED}
        print(as_text(result))
        if args.env == "scienceworld":
            result["plans that still win"] = plans_that_still_win(episodes)
            print("\nfrom where lost episodes ended, the rest of the oracle's plan wins {} of {}".format(*result["plans that still win"]))
        if args.out:
            with open(args.out + ".partial", "w") as file:
                json.dump(result, file, indent=1)
            os.replace(args.out + ".partial", args.out)
    except (FileNotFoundError, ValueError, BadGame) as error:
        sys.exit(f"label_table.py: {error}")


if __name__ == "__main__":
    main()

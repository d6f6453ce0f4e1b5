"""Enumerated evaluation: any checkpoint at any level, every game once, in a fixed order, with 95% intervals.

    python evaluate.py --model policies/tiny                                # ALFWorld, level L1 (new houses)
    python evaluate.py --env scienceworld --model policies/tiny-scienceworld --level L0
    python evaluate.py --model runs/.../checkpoint-000032 --temperature 0 --json > b.json    # greedy
    python evaluate.py --agent expert                                       # one end of the scale ...
    python evaluate.py --agent random                                       # ... and the other
    python evaluate.py --compare policies/tiny runs/.../checkpoint-000032   # the same games, paired

The games are sorted and each is played once, so the result depends on the checkpoint and, if sampled, on the
seed; the number of workers changes nothing. Success comes with Wilson's interval, which behaves near 0 and 1
as well; the mean score and paired differences with bootstrap intervals; two checkpoints' successes with
McNemar's exact test.

Scores: ScienceWorld's 0 to 100; the -100 of a fatal mistake counts as 0 in the mean, as in published figures,
and the fatal episodes are counted beside it.
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict

from games import levels
from games.game import most_steps
from games.players import play_expert, random_agent
from games.pool import EnvPool
from rollout import FLAWS, Episode, Step, flaw_rates, judge, play
from support.flags import AS_TRAINED, flags_as_trained, make_parser
from support.logs import machine, progress

NORMAL = 1.959964  # 97.5% quantile


# --------------------------------------------------------------------------------------------- the statistics

def wilson(successes, n, z=NORMAL):
    """95% interval of a proportion (Wilson 1927): the p for which the count is within z standard errors of n
    p.

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z / n
    center, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


def bootstrap(values, draws=10_000, seed=0):
    """95% interval of a mean: percentiles of the means of resampled values (Efron 1979). Seeded: it repeats.

    >>> low, high = bootstrap([0, 100] * 50)
    >>> 39 <= low <= 42 and 58 <= high <= 61  # normal theory: 50 -+ 1.96 * 50 / sqrt(100)
    True
    >>> bootstrap([7, 7, 7])
    (7.0, 7.0)
    """
    import numpy
    values = numpy.asarray(values, dtype=float)
    if len(values) == 0:
        return 0.0, 0.0
    generator = numpy.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_a, only_b):
    """Exact two-sided p-value (McNemar 1947): of the games that only one of the two won, each is a fair coin
    under the hypothesis that A and B are equally good.

    >>> mcnemar(2, 8)  # 2 * (1 + 10 + 45) / 1024
    0.109375
    >>> mcnemar(0, 0), mcnemar(5, 5)
    (1.0, 1.0)
    """
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


def summarize(episodes):
    """Success with interval, overall and per task type; score where there is one; steps and flaw rates; every
    game."""
    def line(chosen):
        won = sum(e.won for e in chosen)
        low, high = wilson(won, len(chosen))
        found = {"games": len(chosen), "won": won, "success": won / max(1, len(chosen)),
                 "low": low, "high": high, "steps": sum(len(e.steps) for e in chosen) / max(1, len(chosen))}
        scores = [max(0, e.score) for e in chosen if e.score is not None]
        if scores:
            low, high = bootstrap(scores)
            found |= {"score": sum(scores) / len(scores), "score_low": low, "score_high": high,
                      "fatal": sum(e.score < 0 for e in chosen)}
        return found
    by_task = defaultdict(list)
    for episode in episodes:
        by_task[episode.game.task_type].append(episode)
    return {**line(episodes), **flaw_rates(episodes), "truncated": sum(e.truncated for e in episodes),
            "tasks": {task: line(by_task[task]) for task in sorted(by_task)},
            "played": {e.game.name: {"won": e.won, "score": e.score, "steps": len(e.steps)}
                       for e in episodes}}


def compare(a, b):
    """Two results on the same games, paired: B minus A.

    Returns games, only_a, only_b (won by one of them alone), p (McNemar), difference in success with a
    bootstrap interval over games, and the same for the score where there is one. Raises ValueError where the
    games differ.
    """
    if set(a["played"]) != set(b["played"]):
        differ = len(set(a["played"]) ^ set(b["played"]))
        raise ValueError(f"the two results are not of the same games: {differ} differ")
    pairs = [(a["played"][name], b["played"][name]) for name in sorted(a["played"])]
    only_a, only_b = (sum(p[i]["won"] and not p[1 - i]["won"] for p in pairs) for i in (0, 1))
    success = [p[1]["won"] - p[0]["won"] for p in pairs]
    found = {"games": len(pairs), "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b),
             "difference": sum(success) / len(pairs)}
    found["low"], found["high"] = bootstrap(success)
    if all(x["score"] is not None for p in pairs for x in p):
        score = [max(0, p[1]["score"]) - max(0, p[0]["score"]) for p in pairs]
        found["score_difference"] = sum(score) / len(pairs)
        found["score_low"], found["score_high"] = bootstrap(score)
    return found


# ------------------------------------------------------------------------------------------------- the agents

def evaluate(engine, pool, chat, games, max_steps=20, seed=0, batch=128, max_context=math.inf,
             show_actions=False):
    """Play every game once with an engine; returns `summarize`'s dictionary and the episodes."""
    episodes, bad = [], []
    with progress("evaluation", most_steps(max_steps, games)) as bar:
        for begin in range(0, len(games), batch):
            chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
            played, report = play(engine, pool, chat, chunk, 1, max_steps, max_context, seed + begin,
                                  show_actions, bar)
            episodes += played
            bad += report["bad_games"]
    return {**summarize(episodes), "bad_games": bad}, episodes


def reference_result(agent, games, pool, max_steps, seed=0):
    """The expert's or the random agent's result, in the same form as a model's."""
    episodes, bad = [], []
    player = (play_expert(games, pool, max_steps, warn=bad.append) if agent == "expert" else
              random_agent(games, pool, max_steps, seed, warn=bad.append))
    for game, turns, won in progress(agent, len(games), " games", over=player):
        episode, tried, visited = Episode(game, 0, won=won, reward=float(won)), defaultdict(set), set()
        for _, command, before, after, *_ in turns:
            visited.add(before.state)
            episode.steps.append(Step(0, 0, command))
            episode.score = after.score
            judge(episode.steps[-1], before, after, tried, visited)
        episodes.append(episode)
    return {**summarize(episodes), "bad_games": bad}


# ------------------------------------------------------------------------------------------------- the report

def table(result):
    """The report as text."""
    scored = "score" in result
    width = max([len(task) for task in result["tasks"]] + [30]) + 2
    lines = [f"{'':{width}}{'games':>6} {'success %':>10} {'95% interval':>15}" +
             (f" {'score':>6} {'95% interval':>14} {'fatal':>6}" if scored else "") + f" {'steps':>6}"]
    for name, row in [*result["tasks"].items(), ("all", result)]:
        interval = f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
        line = f"{name:{width}}{row['games']:6} {100 * row['success']:10.1f} {interval:>15}"
        if scored:
            interval = f"{row['score_low']:.1f} - {row['score_high']:.1f}"
            line += f" {row['score']:6.1f} {interval:>14} {row['fatal']:6}"
        lines.append(f"{line} {row['steps']:6.1f}")
    line = "share of steps: " + ", ".join(f"{name} {100 * result[name]:.1f}%" for name in FLAWS)
    if "flawed" in result:  # not in files of before 2026-11-25
        line += f"; any {100 * result['flawed']:.1f}%"
        line += f", inadmissible and no repeat {100 * result['inadmissible_anew']:.1f}%"
    lines.append(line)
    if result["truncated"]:
        lines.append(f"{result['truncated']} episodes ended because the context was full")
    if result.get("bad_games"):
        lines.append(f"skipped {len(result['bad_games'])} games that cannot be played:")
        lines += [f"    {why}" for why in result["bad_games"]]
    return "\n".join(lines)


def comparison(found, a, b):
    """The paired comparison as text."""
    lines = [f"B - A on the same {found['games']} games   (A: {a}, B: {b})",
             f"success {100 * found['difference']:+.1f} points, 95% interval {100 * found['low']:+.1f} to "
             f"{100 * found['high']:+.1f}; won by A alone {found['only_a']}, by B alone {found['only_b']}, "
             f"McNemar p = {found['p']:.3g}"]
    if "score_difference" in found:
        lines.append(f"score   {found['score_difference']:+.1f} points, 95% interval "
                     f"{found['score_low']:+.1f} to {found['score_high']:+.1f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- main

def main():
    parser, group = make_parser("Evaluate an agent: every game of a level or split once.")
    flag = group("most used")
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--model", help="folder, hub name, .gguf, smollm2 (default: the tiny policy of the environment)")
    flag("--level", default="L1", choices=levels.LEVELS, help="what is tested: see games/levels.py")
    flag("--split", help="instead of a level: train, valid_seen, valid_unseen (ALFWorld), train, dev, test")
    flag("--count", type=int, help="so many of the games only, for a quick look")
    flag("--compare", nargs=2, metavar=("A", "B"), help="two checkpoints, or two results saved with --json")
    flag("--report", metavar="FILE", help="write a page with every step of every game there")
    flag("--oracle", action="store_true", help="with its verdicts on every step")
    flag("--json", action="store_true", help="print one JSON object, with every game, not the table")

    flag = group("what is played, and by whom")
    flag("--agent", default="model", choices=["model", "expert", "random"], help="who plays")
    flag("--games", default="auto", choices=["auto", "official", "generated"], help="ALFWorld's")
    flag("--task-types", nargs="+", help="these only: ALFWorld 1-6, ScienceWorld's names or `short` "
         "(default: all; `short` where a tiny policy of ours plays)")
    flag("--max-steps", type=int, help="default 20 on generated games, 50 on official ones, in ScienceWorld "
         "30, or what the task takes (up to 321), 15 on the short ones")
    flag("--engine", choices=["auto", "torch", "vllm"], help=f"who samples ({AS_TRAINED}torch)")
    flag("--precision", choices=["auto", "float32", "bfloat16"], help=f"({AS_TRAINED}float32)")
    flags_as_trained(flag)

    flag = group("the run")
    flag("--seed", type=int, default=0, help="for sampling; the games are always the same")
    flag("--workers", type=int, default=os.cpu_count(), help="environment processes")
    flag("--batch", type=int, default=128, help="episodes played side by side")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.set_defaults(shard=False, engine_memory=0.9, tensor_parallel=1)
    args, shown = parser.parse_args(), []  # what --report shows, of each checkpoint
    try:
        if min(args.workers, args.batch, 1 if args.max_steps is None else args.max_steps) < 1:
            raise ValueError("--workers, --batch and --max-steps must be at least 1")
        if args.report or args.oracle:
            from support import report
            report.check(args)
        if not args.compare:
            result, said = run(args, args.model, shown), ""
            print(json.dumps(result) if args.json else table(result))
        else:
            a, b = (json.load(open(one)) if one.endswith(".json") else run(args, one, shown)
                    for one in args.compare)
            found = compare(a, b)
            said = comparison(found, *args.compare)
            print(json.dumps({**found, "a": a, "b": b}) if args.json else
                  f"A\n{table(a)}\n\nB\n{table(b)}\n\n{said}")
        if args.report:
            report.report_evaluation(args, shown, said)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"evaluate.py: {error}")


def run(args, folder, shown):
    import torch

    from support.policies import SHIPPED, notes_of
    from support.setup import PLAYED, player
    kind = levels.choose_games(args.games, args.env)
    folder = folder or os.path.join(os.path.dirname(os.path.abspath(__file__)), "policies", SHIPPED[kind])
    ours = args.agent == "model" and notes_of(folder).get("prompt") == "short"
    types = args.task_types or (["short"] if ours and args.env == "scienceworld" else None)
    skipped = []
    quiet = lambda line: (skipped.append(line), print(line, file=sys.stderr))
    if args.split:
        types_played = levels.SHORT if types == ["short"] else types
        games = levels.list_games(args.env, args.split, args.games, types_played, args.count, quiet)
    else:
        games = levels.level_games(args.env, args.level, "test", args.games, types, args.count, quiet)
    steps = args.max_steps or (levels.max_steps(kind, types_played) if args.split else
                               levels.level_max_steps(args.env, args.level, kind, types, ["test"]))
    about = {"agent": args.agent, "env": args.env, "games_from": kind, "split": args.split,
             "level": None if args.split else args.level, "max_steps": steps, "seed": args.seed,
             "skipped": skipped, "machine": machine()}
    with EnvPool(args.workers) as pool:
        if args.agent != "model":
            result = reference_result(args.agent, games, pool, steps, args.seed)
        else:
            args = argparse.Namespace(**vars(args))  # two checkpoints may have been trained in two ways
            if args.device == "auto":
                args.device = "cuda" if torch.cuda.is_available() else "cpu"
            engine, chat = player(args, folder)
            about |= {"model": folder, **{name: getattr(args, name) for name in PLAYED}}
            result, episodes = evaluate(engine, pool, chat, games, steps, args.seed, args.batch,
                                        args.max_context, args.show_actions)
            if args.report:
                from support import report
                shown.append(report.of_checkpoint(folder, args, engine, chat, pool, episodes, about | result))
    if not result["games"]:
        raise ValueError(f"none of the {len(games)} games can be played: {'; '.join(result['bad_games'])}")
    return {**about, **result}


if __name__ == "__main__":
    main()

"""Enumerated evaluation: any checkpoint on any split, every game once, in a fixed order, with 95% intervals.

    python evaluate.py --model policies/tiny --split valid_unseen
    python evaluate.py --model runs/.../checkpoint-000040 --games official --split valid_seen --json
    python evaluate.py --agent expert --split valid_unseen                  # what is possible

The games are sorted and each is played once, so the result depends on the checkpoint and, if sampled, on the seed; the
number of workers changes nothing. Success comes with Wilson's interval, which behaves near 0 and 1 as well.
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict

import envs
from env_pool import EnvPool
from rollout import FLAWS, SYSTEM, SYSTEM_INSTRUCT, ChatFormat, TorchEngine, flaw_rates, play


def wilson(successes, n, z=1.959964):
    """95% interval of a proportion (Wilson 1927): the p for which the count is within z standard errors of n p.

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


def summarize(episodes):
    """Success with interval, overall and per task type; steps and flaw rates."""
    def line(chosen):
        won = sum(e.won for e in chosen)
        low, high = wilson(won, len(chosen))
        return {"games": len(chosen), "won": won, "success": won / max(1, len(chosen)), "low": low, "high": high,
                "steps": sum(len(e.steps) for e in chosen) / max(1, len(chosen))}
    by_task = defaultdict(list)
    for episode in episodes:
        by_task[episode.game.task_type].append(episode)
    return {**line(episodes), **flaw_rates(episodes), "truncated": sum(e.truncated for e in episodes),
            "tasks": {task: line(by_task[task]) for task in sorted(by_task)}}


def evaluate(engine, pool, chat, games, max_steps=20, seed=0, batch=128):
    """Play every game once with an engine; returns `summarize`'s dictionary and the episodes."""
    episodes, bad = [], []
    for begin in range(0, len(games), batch):
        chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
        played, report = play(engine, pool, chat, chunk, 1, max_steps, seed=seed + begin)
        episodes += played
        bad += report["bad_games"]
    return {**summarize(episodes), "bad_games": bad}, episodes


def table(result):
    """The report as text."""
    lines = [f"{'':34}{'games':>6} {'success %':>10} {'95% interval':>15} {'steps':>6}"]
    for name, row in [*result["tasks"].items(), ("all", result)]:
        interval = f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
        lines.append(f"{name:34}{row['games']:6} {100 * row['success']:10.1f} {interval:>15} {row['steps']:6.1f}")
    lines.append("share of steps: " + ", ".join(f"{name} {100 * result[name]:.1f}%" for name in FLAWS))
    for name, what in (("truncated", "episodes ended because the context was full"),):
        if result[name]:
            lines.append(f"{result[name]} {what}")
    if result.get("bad_games"):
        lines.append(f"skipped {len(result['bad_games'])} games that cannot be played: {result['bad_games'][0]} ...")
    return "\n".join(lines)


def make_chat(tokenizer, env, folder):
    """(chat format, whether it is a tiny policy of ours). Ours knows the short prompt; others need the instructions."""
    try:
        with open(os.path.join(folder, "notes.json")) as file:
            tiny = json.load(file).get("prompt") == "short"
    except (OSError, ValueError):
        tiny = False
    return ChatFormat(tokenizer, (SYSTEM if tiny else SYSTEM_INSTRUCT)[env]), tiny


def expert_result(games, pool, max_steps):
    from cold_start import play_expert
    from rollout import Episode, Step, judge
    episodes = []
    for game, turns, won in play_expert(games, pool, max_steps):
        episode, tried, visited = Episode(game, 0, won=won, reward=float(won)), defaultdict(set), set()
        for _, command, before, after in turns:
            visited.add(before.state)
            episode.steps.append(Step(0, 0, command))
            judge(episode.steps[-1], before, after, tried, visited)
        episodes.append(episode)
    return summarize(episodes)


def main():
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint: every game of a split once.")
    parser.add_argument("--agent", default="model", choices=["model", "expert"], help="who plays")
    parser.add_argument("--model", default="policies/tiny", help="Hugging Face folder or hub name")
    parser.add_argument("--env", default="alfworld", choices=["alfworld"])
    parser.add_argument("--games", default="auto", choices=["auto", "official", "generated"])
    parser.add_argument("--split", default="valid_unseen", choices=["train", "valid_seen", "valid_unseen"])
    parser.add_argument("--task-types", type=int, nargs="+", help="ALFWorld's task types to keep (1-6); default all")
    parser.add_argument("--count", type=int, help="only the first so many games")
    parser.add_argument("--max-steps", type=int, help="default 20 on generated games, 50 on official ones")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 samples as in training, 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for sampling; the games are always the same")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="environment processes")
    parser.add_argument("--batch", type=int, default=128, help="episodes played side by side")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    try:
        result = run(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
    print(json.dumps(result) if args.json else table(result))


def run(args):
    import torch
    args.games = envs.choose_games(args.games)
    games = envs.list_games(args.env, args.split, args.games, args.task_types, args.count,
                            warn=lambda line: print(line, file=sys.stderr))
    args.max_steps = args.max_steps or (20 if args.games == "generated" else 50)
    with EnvPool(args.workers) as pool:
        if args.agent == "expert":
            return {**vars(args), **expert_result(games, pool, args.max_steps)}
        from cold_start import load_policy
        device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_policy(args.model, device)
        chat, tiny = make_chat(tokenizer, args.env, args.model)
        engine = TorchEngine(model, chat.eos, args.temperature, 24 if tiny else 512)
        result, _ = evaluate(engine, pool, chat, games, args.max_steps, args.seed, args.batch)
        return {**vars(args), **result}


if __name__ == "__main__":
    main()

"""A fixed set of probes, single actions in single states, for the kernel of coupling.py.

They are a careless expert's steps (games/players.py) on games that training never shows; rollout.judge says
which are flawed. Chosen once, they stay in a file of texts, one episode a line, so that every checkpoint
reads the same, through a tokenizer of its own:

    {"game": ..., "task_type": ..., "turns": [[observation, command], ...], "probes": {turn: [flaws], ...}}

Every action has as many good probes as flawed ones, so that which action it is tells nothing: the comparison
that matters is between an action where it is right and the same where it is not. Pairs of probes:

    A  same action, one good and one flawed    B  same action, both good    (A and B: in different games)
    C  another action, similar state: in the same game
    D  same action, dissimilar state: in games of different task types      E  any two
"""

import json
import os
from collections import defaultdict
from typing import NamedTuple

import numpy
import torch

from games import levels
from games.players import play_expert
from rollout import FLAWS, Step, judge
from support.batches import forward, micro_batches
from support.coupling_report import interval, write_lines

GROUPS = {"A": "same action, good and flawed", "B": "same action, both good", "C": "other action, same game",
          "D": "same action, other task type", "E": "any two"}


class Probe(NamedTuple):
    """One action after its episode's beginning, as a policy reads it."""
    tokens: list      # T ids, up to the end of the answer
    mask: list        # T bools: True where the action itself is, as `coupling_run.content` says
    action: str
    flawed: bool
    game: str
    task_type: str


def probe_file(args, pool):
    """The episodes in the file `--probes`, made where there is none. Raises ValueError or OSError."""
    if not os.path.exists(args.probes):
        games = levels.level_games(args.env, args.level, "test", args.games, args.task_types)
        games = [games[i] for i in range(min(len(games), max(16, args.probe_count // 2)))]
        episodes = make_probes(games, pool, args.max_steps, args.probe_count)
        write_lines(args.probes, episodes)
        return episodes
    try:
        with open(args.probes) as file:
            episodes = [json.loads(line) for line in file]
        assert episodes and all({"game", "task_type", "turns", "probes"} <= set(e) for e in episodes)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"--probes {args.probes}: not a file of probes as coupling.py writes them (under "
                         "another name one is made)") from error
    return episodes


def make_probes(games, pool, max_steps, count=256, sloppy=0.5, seed=0):
    """Episodes of a careless expert as the file has them, with `count` of their steps as probes, or fewer."""
    episodes, steps = [], defaultdict(lambda: {True: [], False: []})  # action -> flawed? -> where
    silent = lambda line: None
    for game, turns, _ in play_expert(games, pool, max_steps, sloppy=sloppy, seed=seed, warn=silent):
        tried, visited = defaultdict(set), set()
        episodes.append({"game": game.name, "task_type": game.task_type, "turns": [], "probes": {}})
        for i, (observation, command, before, after, *_) in enumerate(turns):
            episodes[-1]["turns"].append([observation, command])
            visited.add(before.state)
            step = Step(0, 0, command)
            judge(step, before, after, tried, visited)
            flaws = [name for name in FLAWS if getattr(step, name)]
            steps[command][bool(flaws)].append((len(episodes) - 1, i, flaws))
    rng = numpy.random.default_rng(seed)
    pairs = []
    for _, by_label in sorted(steps.items()):
        pairs += zip(*([by_label[label][k] for k in rng.permutation(len(by_label[label]))]
                       for label in (False, True)))
    if not pairs:
        raise ValueError("no probes: in these games no action is now good, now flawed; more --probe-count")
    for k in rng.permutation(len(pairs))[:max(1, count // 2)]:
        for episode, i, flaws in pairs[k]:
            episodes[episode]["probes"][str(i)] = flaws
    return [episode for episode in episodes if episode["probes"]]


def encode(episodes, chat):
    """The probes of a file as a policy reads them: a list of Probe."""
    from support.coupling_run import content
    probes = []
    for episode in episodes:
        tokens = []
        for i, (observation, command) in enumerate(episode["turns"]):
            tokens += chat.first_prompt(observation) if i == 0 else chat.next_prompt(observation)
            answer = chat.tokenizer.encode(f"<action>{command}</action>", add_special_tokens=False)
            answer.append(chat.eos)
            if str(i) in episode["probes"]:
                mask = [False] * len(tokens) + content(chat, answer)
                probes.append(Probe(tokens + answer, mask, command, bool(episode["probes"][str(i)]),
                                    episode["game"], episode["task_type"]))
            tokens = tokens + answer
    return probes


@torch.no_grad()
def probe_logprobs(model, probes, temperature=1.0, micro_tokens=8192):
    """(n,) log pi(action) of every probe, in float64: the sum over the action's tokens."""
    model.eval()
    found = torch.zeros(len(probes), dtype=torch.float64)
    for chosen in micro_batches(probes, micro_tokens):
        masks = [probes[i].mask for i in chosen]
        each = forward(model, [probes[i].tokens for i in chosen], masks, temperature)["logprobs"].cpu()
        sums = [part.double().sum() for part in each.split([sum(mask) for mask in masks])]
        found[chosen] = torch.stack(sums)
    return found


def pair_groups(probes):
    """{"A": (n, n) bool, ...}: which pairs of probes are in each group; each pair once, none with itself."""
    column = lambda name: numpy.array([getattr(p, name) for p in probes], dtype=object)
    same = {name: column(name)[:, None] == column(name) for name in ("action", "game", "task_type")}
    flawed = column("flawed").astype(bool)
    once = numpy.triu(numpy.ones((len(probes), len(probes)), bool), 1)
    elsewhere = same["action"] & ~same["game"]
    return {name: once & pairs for name, pairs in {
        "A": elsewhere & (flawed[:, None] ^ flawed), "B": elsewhere & ~flawed[:, None] & ~flawed,
        "C": ~same["action"] & same["game"], "D": same["action"] & ~same["task_type"], "E": once}.items()}


def cosine(gram):
    """Gram matrix -> cosines; 0 for gradients that vanish."""
    length = numpy.sqrt(numpy.diag(gram))
    return gram / numpy.maximum(length[:, None] * length, 1e-30)


def group_cosines(gram, probes, draws=1000, seed=0):
    """Mean cosine in each pair group with a 95% bootstrap interval over games, and A - B, resampled alike:
    {"A": {"pairs", "cosine", "low", "high"}, ..., "A - B": ...}. Groups without pairs are left out."""
    cosines, rng = cosine(numpy.asarray(gram)), numpy.random.default_rng(seed)
    names, game = numpy.unique([p.game for p in probes], return_inverse=True)
    often = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)[:, game]      # (draws, n)
    same, found, redrawn = game[:, None] == game, {}, {}
    for name, pairs in pair_groups(probes).items():
        if not pairs.any():
            continue
        redrawn[name] = resampled(pairs, cosines, same, often)
        low, high = interval(redrawn[name])
        mean = float(cosines[pairs].mean())
        found[name] = {"pairs": int(pairs.sum()), "cosine": mean, "low": low, "high": high}
    if "A" in found and "B" in found:
        low, high = interval(redrawn["A"] - redrawn["B"])
        difference = found["A"]["cosine"] - found["B"]["cosine"]
        found["A - B"] = {"pairs": None, "cosine": difference, "low": low, "high": high}
    return found


def resampled(pairs, values, same, often):
    """(draws,) weighted means of values over pairs. A pair of two games counts as often as the product of how
    often each is drawn; one within a game, which is drawn whole, as often as that game."""
    def total(matrix):
        apart = numpy.where(pairs & ~same, matrix, 0.0)
        together = numpy.where(pairs & same, matrix, 0.0)
        return numpy.einsum("dn,dn->d", often @ apart, often) + often @ together.sum(1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return total(values) / total(numpy.ones_like(values))


def kernel_table(model, cells, probes):
    """Mean cosines as text; cells: {block: from `group_cosines`}. Intervals: of all parameters together."""
    blocks = [block for block in cells if block != "all"]
    flawed = sum(p.flawed for p in probes)
    lines = [f"{model}: mean cosine of grad log pi(action), {len(probes) - flawed} good and {flawed} flawed "
             "probes, 95% bootstrap intervals over games",
             f"{'':36}{'pairs':>7}  {'all parameters':26}" + "".join(f"{block:>14}" for block in blocks)]
    for name, row in cells["all"].items():
        values = "".join(f"{cells[block][name]['cosine']:14.3f}" for block in blocks)
        bounds = "" if row["low"] is None else f" ({row['low']:+.3f}, {row['high']:+.3f})"
        lines.append(f"{name + '  ' + GROUPS.get(name, ''):36}{row['pairs'] or '':>7}  "
                     f"{format(row['cosine'], '+.3f') + bounds:26}{values}")
    return "\n".join(lines)

"""Text games behind one small interface: `reset(game)` and `step(command)`, each answering an `Observation`.

What stands here: which games there are, in which split and at which level of generalisation. The engines that play them
are alfworld.py and scienceworld.py; batches of episodes are played in worker processes: pool.py.

    games = level_games("scienceworld", "L1", "test")     # every game of the level's test, once, in a fixed order
    world = make_world("scienceworld")
    observation = world.reset(games[0])
    observation = world.step("teleport to kitchen")

**Levels** (what an agent is tested on, from easy to hard):
    L0  new episodes of what was trained    ALFWorld valid_seen      ScienceWorld dev variations of the trained tasks
    L1  new houses, new variations          ALFWorld valid_unseen    ScienceWorld test variations of the trained tasks
    L2  new kinds of task                   ALFWorld: trained on task types 1-4, tested on 5 and 6 of valid_unseen
                                            ScienceWorld: trained without ten tasks, tested on their test variations
"""

import json
import os
import random
from itertools import islice

from games import houses
from games.game import BadGame, Game

ENVS = ("alfworld", "scienceworld")
LEVELS = ("L0", "L1", "L2")
SPLITS = {"alfworld": houses.SPLITS, "scienceworld": ("train", "dev", "test")}
MAX_STEPS = {"generated": 20, "official": 50, "simulator": 30, "short": 15}
# ScienceWorld's tasks that take more than 30 steps: how many the simulator's own solution needs, nothing left
# out, to score 100 in nine of ten training variations (4 to 31 of each task were measured; the tail is long:
# one of inclined-plane-friction-named-surfaces took 743).
SOLUTION_STEPS = {
    "boil": 40, "change-the-state-of-matter-of": 35, "chemistry-mix": 55,
    "chemistry-mix-paint-tertiary-color": 36, "freeze": 62, "grow-fruit": 96, "grow-plant": 43,
    "identify-life-stages-1": 39, "inclined-plane-determine-angle": 161,
    "inclined-plane-friction-named-surfaces": 321, "inclined-plane-friction-unnamed-surfaces": 177,
    "measure-melting-point-known-substance": 71, "measure-melting-point-unknown-substance": 93, "melt": 43,
    "mendelian-genetics-known-plant": 131, "mendelian-genetics-unknown-plant": 132, "test-conductivity": 44}
TASK_TYPES = houses.TASK_TYPES
GENERATED_COUNT = {"train": 1_000_000, "valid_seen": 200, "valid_unseen": 200}
# ScienceWorld 1.2.3: how many variations each task has. tests/test_scienceworld.py asks the simulator.
VARIATIONS = {
    "boil": 30, "change-the-state-of-matter-of": 30, "chemistry-mix": 32, "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36, "find-animal": 300, "find-living-thing": 300, "find-non-living-thing": 300,
    "find-plant": 300, "freeze": 30, "grow-fruit": 126, "grow-plant": 126, "identify-life-stages-1": 14,
    "identify-life-stages-2": 10, "inclined-plane-determine-angle": 168, "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162, "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125, "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436, "measure-melting-point-unknown-substance": 300, "melt": 30,
    "mendelian-genetics-known-plant": 120, "mendelian-genetics-unknown-plant": 480, "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20, "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600, "use-thermometer": 540}
HELD_OUT = (  # level L2 of ScienceWorld: never trained ...
    "change-the-state-of-matter-of", "chemistry-mix-paint-tertiary-color", "find-plant", "grow-plant",
    "identify-life-stages-2", "inclined-plane-friction-unnamed-surfaces", "lifespan-longest-lived-then-shortest-lived",
    "measure-melting-point-unknown-substance", "mendelian-genetics-unknown-plant", "test-conductivity-of-unknown-substances")
NEITHER = ("use-thermometer",)  # ... and this one neither trained nor tested there
# Tasks with solutions of three to seven steps, which a policy of a million parameters can learn; the last two are held out.
SHORT = ("find-animal", "find-living-thing", "find-non-living-thing", "lifespan-longest-lived", "lifespan-shortest-lived",
         "find-plant", "lifespan-longest-lived-then-shortest-lived")


# ---------------------------------------------------------------------------------------------------------- the games

def official_folder():
    """`json_2.1.1` of the official ALFWorld data, or None."""
    folder = os.path.join(houses.ALFWORLD_DATA, "json_2.1.1")
    return folder if os.path.isdir(folder) else None


def choose_games(games, env="alfworld"):
    """"auto" becomes "official" where ALFWorld's data is found, else "generated". ScienceWorld: always "simulator"."""
    if env == "scienceworld":
        if games not in ("auto", "simulator"):
            raise ValueError(f"--games {games} is ALFWorld's: ScienceWorld's games come with its simulator")
        return "simulator"
    if games == "auto":
        return "official" if official_folder() else "generated"
    if games == "official" and not official_folder():
        raise FileNotFoundError(
            f"no official ALFWorld games: {houses.ALFWORLD_DATA} has no folder json_2.1.1. Set ALFWORLD_DATA to the folder "
            "that contains it (`alfworld-download` fetches it), or use --games generated.")
    return games


def _official_game(split, path, root):
    """The game in this file. Raises BadGame with one line that says what is wrong with it."""
    name = os.path.relpath(os.path.dirname(path), root)
    try:
        with open(path) as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise BadGame(f"{name}: unreadable ({type(error).__name__}: {error})") from error
    if not isinstance(data, dict):
        raise BadGame(f"{name}: no game in it, but JSON's {json.dumps(data)[:20]}")
    for key in ("pddl_domain", "pddl_problem", "grammar"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise BadGame(f"{name}: no {key} in it")
    if not data.get("solvable"):
        raise BadGame(f"{name}: " + ("marked unsolvable" if "solvable" in data else "not marked solvable"))
    if "move {o} to {r}" not in data["grammar"]:
        old = "put {o} in/on {r}" in data["grammar"]
        why = "another ALFWorld version (`put` instead of `move`)" if old else "a cut grammar"
        raise BadGame(f"{name}: {why}")
    return Game("alfworld", split, name, os.path.basename(os.path.dirname(os.path.dirname(path))).split("-")[0], path)


def list_games(env="alfworld", split="train", games="auto", task_types=None, count=None, warn=print):
    """Every game of a split, once, in an order that depends on nothing but the games' names.

    Args:
        split: see SPLITS.
        games: ALFWorld's: "official", "generated" or "auto".
        task_types: names of the task types to keep (ALFWorld: or numbers, 1-6); None keeps all.
        count: so many games only: official the first, generated so many seeds, ScienceWorld evenly over its tasks.
        warn: called with one line that names what was skipped, and how many.
    """
    if split not in SPLITS[env]:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS[env])}")
    wanted = named_task_types(env, task_types)
    if count is not None and count < 1:
        raise ValueError(f"{count} games are none: ask for at least 1")
    if env == "scienceworld":
        there = {task: variations(task, split) for task in sorted(wanted)}
        shares = even_shares([len(v) for v in there.values()], count or sum(map(len, there.values())))
        return [Game(env, split, f"{task}/{v[i]}", task, (task, v[i]))
                for (task, v), share in zip(there.items(), shares) for i in spread(len(v), share)]
    if choose_games(games) == "generated":
        # A seed's task type is known only after drawing it, so lists of millions stay lazy: names come when played.
        if wanted == list(TASK_TYPES):
            numbers = range(count or GENERATED_COUNT[split])
            return LazyGames(split, numbers)
        limit = count or min(GENERATED_COUNT[split], 2000)
        seeds = range(20 * limit if count else GENERATED_COUNT[split])  # the rarest kind is one house in nine
        return list(islice((g for g in (generated_game(split, seed) for seed in seeds) if g.task_type in wanted), limit))
    root = official_folder()
    paths = sorted(os.path.join(folder, "game.tw-pddl") for folder, _, files in os.walk(os.path.join(root, split))
                   if "game.tw-pddl" in files)
    playable, skipped = [], []
    for path in paths:
        if path.split(os.sep)[-3].split("-")[0] not in wanted:
            continue
        try:
            playable.append(_official_game(split, path, root))
        except BadGame as error:
            skipped.append(str(error))
        if count and len(playable) == count:
            break
    if skipped:
        warn(f"skipped {len(skipped)} of {len(paths)} games: {'; '.join(skipped)}")
    if not playable:
        raise FileNotFoundError(f"no playable games of {split} in {root}")
    return playable


def spread(n, k):
    """`k` of the numbers 0 to n - 1, evenly spaced from 0 on.

    >>> spread(9, 3), spread(5, 4)
    ([0, 3, 6], [0, 1, 2, 3])
    """
    return [i * n // k for i in range(k)]


def even_shares(sizes, count):
    """How many of `count` things each of several groups gives: as equal as the groups' sizes allow.

    >>> even_shares([10, 10, 10], 6), even_shares([1, 10, 10], 9), even_shares([5, 5, 5, 5], 2)
    ([2, 2, 2], [1, 4, 4], [1, 0, 1, 0])
    """
    shares, left = [0] * len(sizes), min(count, sum(sizes))
    while left > 0:
        able = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = max(1, left // len(able))
        for i in able if left >= len(able) else [able[j] for j in spread(len(able), left)]:
            given = min(each, sizes[i] - shares[i])
            shares[i], left = shares[i] + given, left - given
    return shares


def named_task_types(env, task_types=None):
    """Names of task types, from names or ALFWorld's numbers; None is all. Raises ValueError for an unknown one.

    >>> named_task_types("alfworld", [1, "5"])
    ['pick_and_place_simple', 'pick_cool_then_place_in_recep']
    """
    known = TASK_TYPES if env == "alfworld" else {name: name for name in VARIATIONS}
    wanted = {str(t) for t in task_types or known}
    unknown = wanted - {str(x) for pair in known.items() for x in pair}
    if unknown:
        raise ValueError(f"unknown task type {sorted(unknown)[0]!r} of {env}: choose from " +
                         ", ".join(f"{number} ({name})" if name != number else name for name, number in known.items()))
    return [name for name, number in known.items() if name in wanted or str(number) in wanted]


def variations(task, split):
    """The task's variations in a split: the first half, the next quarter, the rest (quarters rounded down).

    >>> [len(variations("boil", split)) for split in ("train", "dev", "test")]
    [14, 7, 9]
    """
    quarter = VARIATIONS[task] // 4
    return {"train": range(2 * quarter), "dev": range(2 * quarter, 3 * quarter),
            "test": range(3 * quarter, VARIATIONS[task])}[split]


def level_task_types(env, level, part, task_types=None):
    """Task types that `part` ("train" or "test") of a level may show. task_types: None for all, ["short"], or names."""
    held_out = ("pick_cool_then_place_in_recep", "pick_two_obj_and_place") if env == "alfworld" else HELD_OUT
    short = list(task_types or []) == ["short"]
    if short and env == "alfworld":
        raise ValueError("--task-types short is ScienceWorld's: ALFWorld's types are 1 to 6")
    wanted = named_task_types(env, SHORT if short else task_types)
    if level == "L2" and part == "test":
        allowed = held_out
    elif level == "L2" or short:  # the short tasks that are held out never enter training: one policy serves all levels
        allowed = [t for t in wanted if t not in held_out and not (env == "scienceworld" and t in NEITHER)]
    else:
        allowed = wanted
    found = [t for t in wanted if t in allowed]
    if not found:
        raise ValueError(f"none of the chosen --task-types is {'tested' if part == 'test' else 'trained'} at level {level}")
    return found


def max_steps(games, task_types=None):
    """Steps per episode unless told otherwise: by the kind of games ("generated", "official", "simulator").

    ScienceWorld: 30, or as many as the task's solution takes (SOLUTION_STEPS), then {task: steps}. Published
    figures are mostly of 30 steps in all tasks, too few for that solution in 17.

    >>> max_steps("simulator", ["boil", "find-plant"]), max_steps("simulator", ["find-plant"])
    ({'boil': 40, 'find-plant': 30}, 30)
    >>> max_steps("simulator", ["short"]), max_steps("generated")
    (15, 20)
    """
    if list(task_types or []) == ["short"]:
        return MAX_STEPS["short"]
    if games != "simulator":
        return MAX_STEPS[games]
    chosen = named_task_types("scienceworld", task_types)
    found = {task: SOLUTION_STEPS.get(task, MAX_STEPS[games]) for task in chosen}
    return found if len(set(found.values())) > 1 else found[chosen[0]]


def level_max_steps(env, level, games, task_types=None, parts=("train", "test")):
    """`max_steps` of the tasks that a level trains on or tests, and of no others.

    >>> limits = level_max_steps("scienceworld", "L2", "simulator")
    >>> len(limits), limits["find-plant"], limits["inclined-plane-friction-named-surfaces"]
    (29, 30, 321)
    >>> max(level_max_steps("scienceworld", "L2", "simulator", parts=["test"]).values())
    177
    """
    if env != "scienceworld" or list(task_types or []) == ["short"]:
        return max_steps(games, task_types)
    played = []
    for part in parts:
        try:
            played += level_task_types(env, level, part, task_types)
        except ValueError:  # nothing of what was chosen: whoever lists those games says so
            continue
    return max_steps(games, sorted(set(played)) or task_types)


def level_games(env, level, part, games="auto", task_types=None, count=None, warn=print):
    """The games that a level trains on (part "train") or is tested on ("test"), in `list_games`' order."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: choose from {', '.join(LEVELS)}")
    tested = SPLITS[env][1] if level == "L0" else SPLITS[env][2]
    types = level_task_types(env, level, part, task_types)
    return list_games(env, "train" if part == "train" else tested, games, types, count, warn)


def generated_game(split, seed):
    data = houses.generate(split, seed)
    return Game("alfworld", split, data["name"], data["task_type"], seed)


class LazyGames:
    """A sequence of generated games, each drawn when it is asked for."""

    def __init__(self, split, seeds):
        self.split, self.seeds = split, seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return LazyGames(self.split, self.seeds[i])
        return generated_game(self.split, self.seeds[i])


def sample_games(games, n, seed):
    """`n` distinct games drawn with a seed; the draw depends on the seed and the list alone."""
    return [games[i] for i in random.Random(seed).sample(range(len(games)), min(n, len(games)))]

"""Text games behind one small interface: `reset(game)` and `step(command)`, each answering an `Observation`.

What stands here: the list of games of a split (official ALFWorld games where their data is found, generated houses
otherwise) and ALFWorld on TextWorld's real `PddlEnv`. Batches of episodes are played in worker processes: env_pool.py.
No model is known here.

    world = ALFWorld()
    observation = world.reset(list_games("alfworld", "valid_unseen", games="generated")[0])
    observation = world.step("go to shelf 1")

**Speed.** Stock ALFWorld translates the same PDDL problem four times a reset and parses the same grammar snippets at
every step. All of that is a pure function of its text, so we remember it: `bench.py` measures the ratio, and
`tests/test_envs.py` replays games on both and compares every observation and every list of admissible commands.
"""

import copy
import functools
import hashlib
import json
import os
import random
import re
import struct
import tempfile
from typing import NamedTuple

import houses

TASK_TYPES = houses.TASK_TYPES
GENERATED_COUNT = {"train": 1_000_000, "valid_seen": 200, "valid_unseen": 200}
# Facts that change while one plays. `checked` is left out: the engine sets it when the agent merely looks.
DYNAMIC = {"atlocation", "inreceptacle", "opened", "holds", "isclean", "ishot", "iscool", "ison", "istoggled", "issliced"}
WELCOME = "-= Welcome to TextWorld, ALFRED! =-\n\n"


class Game(NamedTuple):
    """One task instance: a file (official) or a number (generated). Sorts, hashes and pickles small."""
    env: str
    split: str
    name: str
    task_type: str
    source: object  # str: path of a game.tw-pddl; int: seed of a generated house


class Observation(NamedTuple):
    text: str
    admissible: list  # of str, sorted
    state: int        # digest of the world's state: equal digests, equal states
    reward: float     # 1.0 at the step that wins
    won: bool
    done: bool


class BadGame(ValueError):
    """A game that cannot be played; the message names it."""


# ---------------------------------------------------------------------------------------------------------- the games

def official_folder():
    """`json_2.1.1` of the official ALFWorld data, or None."""
    folder = os.path.join(houses.ALFWORLD_DATA, "json_2.1.1")
    return folder if os.path.isdir(folder) else None


def choose_games(games):
    """"auto" becomes "official" where ALFWorld's data is found, else "generated"."""
    if games == "auto":
        return "official" if official_folder() else "generated"
    if games == "official" and not official_folder():
        raise FileNotFoundError(
            f"no official ALFWorld games: {houses.ALFWORLD_DATA} has no folder json_2.1.1. Set ALFWORLD_DATA to the folder "
            "that contains it (`alfworld-download` fetches it), or use --games generated.")
    return games


def _official_game(split, path, root):
    """The game in this file, or BadGame with one line that says what is wrong with it."""
    name = os.path.relpath(os.path.dirname(path), root)
    try:
        with open(path) as file:
            data = json.load(file)
        if not data["solvable"]:
            raise BadGame(f"{name}: marked unsolvable")
        if "move {o} to {r}" not in data["grammar"]:
            raise BadGame(f"{name}: another ALFWorld version (`put` instead of `move`)")
        if "pddl_problem" not in data or "pddl_domain" not in data:
            raise BadGame(f"{name}: no PDDL in it")
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, BadGame) else BadGame(f"{name}: unreadable ({type(error).__name__}: {error})")
    return Game("alfworld", split, name, os.path.basename(os.path.dirname(os.path.dirname(path))).split("-")[0], path)


def list_games(env="alfworld", split="train", games="auto", task_types=None, count=None, warn=print):
    """Every game of a split, once, in an order that depends on nothing but the games' names.

    Args:
        split: "train", "valid_seen" or "valid_unseen".
        games: "official", "generated" or "auto".
        task_types: numbers (1-6) or names of ALFWorld's task types to keep; None keeps all.
        count: the first so many games only (generated: how many seeds; None: the split's usual number).
        warn: called with one line that names what was skipped, and how many.
    """
    if split not in houses.SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(houses.SPLITS)}")
    wanted = {name for name, number in TASK_TYPES.items() if not task_types or name in task_types or number in task_types}
    if choose_games(games) == "generated":
        # A seed's task type is known only after drawing it, so lists of millions stay lazy: names come when played.
        if wanted == set(TASK_TYPES):
            numbers = range(count or GENERATED_COUNT[split])
            return LazyGames(split, numbers)
        found = (generated_game(split, seed) for seed in range(GENERATED_COUNT[split]))
        limit = count or min(GENERATED_COUNT[split], 2000)
        return [g for g in _take(found, 20 * limit) if g.task_type in wanted][:limit]
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
        warn(f"skipped {len(skipped)} of {len(paths)} games: " + "; ".join(skipped[:5]) + (" ..." if skipped[5:] else ""))
    if not playable:
        raise FileNotFoundError(f"no playable games of {split} in {root}")
    return playable


def _take(iterable, n):
    for _, item in zip(range(n), iterable):
        yield item


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


# ----------------------------------------------------------------------------------------------------------- ALFWorld

@functools.lru_cache(maxsize=None)
def remember_pure_work():
    """Give TextWorld a memory, once per process. Returns the engine class built on it.

    Everything remembered is a function of its arguments alone: the translation of a PDDL problem, the parse of a
    grammar snippet or query. Deep copies become shallow ones where the copied values are never changed in place.
    """
    import fast_downward
    import textworld
    from textworld.envs.pddl import PddlEnv, logic, textgen

    # 1. PDDL -> SAS, the bulk of a reset. The optimised second translation only serves the planner, which nobody asks.
    translate = functools.lru_cache(maxsize=64)(fast_downward.pddl2sas)
    fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: \
        (None, "") if optimize else translate(domain, problem)
    # 2. Grammar snippets and queries, the bulk of a step. `list`: callers append to what they get.
    parse = functools.lru_cache(maxsize=100_000)(textgen._parse_and_convert)
    textgen._parse_and_convert = lambda text, **keywords: list(parse(text, **keywords))
    # A game's whole grammar differs from the next one's in the task sentence alone: parse it once without.
    parse_grammar = functools.lru_cache(maxsize=64)(logic._parse_and_convert)

    def grammar_of(text, **keywords):
        found = re.search(r'"(Your task is to: [^"]*)"', text)
        if not found:
            return parse_grammar(text, **keywords)
        actions, shared = parse_grammar(text.replace(found[0], '"Your task is to: UNKNOWN GOAL."'), **keywords)
        grammar = textgen.ContextSensitiveGrammar()
        grammar.update(shared)
        sentence = textgen._parse_and_convert(json.loads(found[0]), rule_name="symbols")
        grammar._rules["task"] = [textgen.ProductionRule("task", sentence, condition="")]
        return actions, grammar

    logic._parse_and_convert = grammar_of
    query = functools.lru_cache(maxsize=10_000)(textworld.logic.Rule.parse_conjunctive_query)
    textgen.Rule = type("Rule", (), {"parse_conjunctive_query": staticmethod(query)})
    # 3. Contexts: the dictionaries are extended by the receiver, their values never are.
    textgen.copy_context = lambda c: {**c, "variables": dict(c["variables"]), "mapping": dict(c["mapping"])}
    textgen.deepcopy = lambda x: [copy.copy(y) for y in x] if isinstance(x, list) else copy.copy(x)
    # 4. Each environment maps its own copy of the planner's library: 34 MB, of which 1.1 MB is ever loaded.
    fast_downward.interface.DOWNWARD_LIB_PATH = _stripped(fast_downward.interface.DOWNWARD_LIB_PATH)

    class Engine(PddlEnv):
        """`PddlEnv` that keeps the loaded game, and the command of each grounded operator."""

        def load(self, data):
            if getattr(self, "_loaded", None) == data["pddl_problem"] + data["grammar"]:
                return  # the same game again, as in a group: reset() is enough
            super().load(data)
            self._loaded, self._commands = data["pddl_problem"] + data["grammar"], {}

        def _gather_infos(self):
            """As in PddlEnv, without what is not used; a command depends on its operator and constant facts alone."""
            self.state["won"], self.state["lost"] = self._pddl_state.check_goal(), False
            self.state["_valid_actions"] = self._pddl_state.all_applicable_actions()
            self.state["_valid_commands"] = [self._command(a) for a in self.state["_valid_actions"]]
            self.state["admissible_commands"] = sorted(set(self.state["_valid_commands"]))

        def _command(self, action):
            if action.id not in self._commands:
                context = {"state": self._pddl_state, "facts": (), "entity_infos": self._entity_infos,
                           "variables": {p.name: self._entity_infos[v.name] for p, v in action.mapping.items()},
                           "mapping": action.mapping}
                action.command_template = self._logic.grammar.derive(action.command_template, context)
                names = {key: info.name for key, info in self._entity_infos.items()}
                self._commands[action.id] = action.format_command(names)
            return self._commands[action.id]

    return Engine


def _stripped(path):
    """A copy of a shared library without its symbol tables (34 MB -> 1.1 MB); the original where that fails.

    The loader reads program headers alone: cut the file after the last segment, and forget the section table.
    """
    target = os.path.join(tempfile.gettempdir(), f"libdownward-{os.path.getsize(path)}-{os.getuid()}.so")
    try:
        if not os.path.exists(target):
            with open(path, "rb") as file:
                image = bytearray(file.read())
            if image[:5] != b"\x7fELF\x02":  # 64-bit ELF only; macOS has another format
                return path
            table, = struct.unpack_from("<Q", image, 32)
            size, count = struct.unpack_from("<HH", image, 54)
            segments = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]
            image = image[:max(offset + length for _, _, offset, _, _, length in segments)]
            struct.pack_into("<Q", image, 40, 0)         # e_shoff
            struct.pack_into("<HHH", image, 58, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(target), delete=False) as file:
                file.write(image)
            os.replace(file.name, target)  # atomic: workers start at the same time
        return target
    except OSError:
        return path


class ALFWorld:
    """One ALFWorld environment: any game, one after the other (the engine object is kept; it is never given back)."""

    def __init__(self):
        engine_class = remember_pure_work()
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        self._engine = engine_class(textworld.EnvInfos(won=True, admissible_commands=True))
        self._env = AlfredDemangler(self._engine)

    def reset(self, game):
        """Load a `Game` and return its first observation. Raises BadGame where the engine cannot play it."""
        try:
            if isinstance(game.source, int):
                data = houses.generate(game.split, game.source)
            else:
                with open(game.source) as file:
                    data = json.load(file)
            self._env.load(data)
            return self._observe(self._env.reset())
        except Exception as error:  # whatever a broken file makes the translator raise
            raise BadGame(f"{game.name}: the engine cannot load it ({type(error).__name__}: {error})") from error

    def step(self, command):
        state, _, _ = self._env.step(command)
        return self._observe(state)

    def _observe(self, state):
        self.raw = state.feedback  # as the engine wrote it
        facts = self._engine._pddl_state._facts
        changing = sorted(str(fact) for signature, group in facts.items() if signature.name in DYNAMIC for fact in group)
        digest = hashlib.blake2b("|".join(changing).encode(), digest_size=8).digest()
        won = bool(state["won"])
        return Observation(state.feedback.removeprefix(WELCOME).strip(), state["admissible_commands"],
                           int.from_bytes(digest, "big"), float(won), won, won)


WORLDS = {"alfworld": ALFWorld}

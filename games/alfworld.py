"""ALFWorld on TextWorld's real `PddlEnv`, with a memory.

    world = ALFWorld()
    observation = world.reset(list_games("alfworld", "valid_unseen", games="generated")[0])
    observation = world.step("go to shelf 1")

Stock ALFWorld translates the same PDDL problem four times a reset and parses the same grammar snippets at every step.
All of that is a pure function of its text, so we remember it: `support/bench.py` measures the ratio, and `tests/test_envs.py`
replays games on both and compares every observation and every list of admissible commands.
"""

import copy
import functools
import hashlib
import json
import os
import re
import struct
import tempfile

from games import houses, oracle, planner
from games.game import BadGame, Observation

# Facts that change while one plays. `checked` is left out: the engine sets it when the agent merely looks.
DYNAMIC = {"atlocation", "inreceptacle", "opened", "holds", "isclean", "ishot", "iscool", "ison", "istoggled", "issliced"}
WELCOME = "-= Welcome to TextWorld, ALFRED! =-\n\n"


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
    parse = functools.lru_cache(maxsize=30_000)(textgen._parse_and_convert)
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
            texts = data["pddl_domain"], data["pddl_problem"], data["grammar"]
            if getattr(self, "_loaded", None) == texts:
                return  # the same game again, as in a group: reset() is enough
            self._loaded = None  # a load that fails half-way leaves no game
            super().load(data)
            self._loaded, self._commands = texts, {}

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


def undeclared(domain, problem):
    """Predicates that a PDDL problem's facts and goal use and its domain does not declare, sorted.

    The engine ignores such a fact and plays another game than was written; given such a goal, it exits.

    >>> domain = "(define (domain d) (:predicates (clear ?x)) (:action a))"
    >>> undeclared(domain, "(:init (clear a)) (:goal (not (claer b)))")
    ['claer']
    """
    words = lambda text: set(re.findall(r"\(\s*([a-z][\w-]*)", text.lower()))
    head = domain.lower().partition("(:action")[0]  # predicates, and functions such as total-cost
    facts = problem[problem.lower().find("(:init"):]
    return sorted(words(facts) - words(head) - {"and", "or", "not", "exists", "forall", "imply"})


def one_line(error):
    """An exception's kind and its first line: parsers go on to list all that they would have liked better.

    >>> one_line(ValueError("(1:5) Expected one of\\nNAME\\nNUMBER"))
    'ValueError: (1:5) Expected one of'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


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
        self._name = game.name
        try:
            if isinstance(game.source, int):
                data = houses.generate(game.split, game.source)
            else:
                with open(game.source) as file:
                    data = json.load(file)
                unknown = undeclared(data["pddl_domain"], data["pddl_problem"])
                if unknown:
                    raise BadGame(f"{game.name}: its domain does not know the predicate {unknown[0]!r}")
            self._env.load(data)
            self._last = None
            return self._observe(self._env.reset())
        except BadGame:
            raise
        except Exception as error:  # whatever a broken file makes the translator raise
            raise BadGame(f"{game.name}: the engine cannot load it ({one_line(error)})") from error

    def step(self, command):
        """The observation after a command. Raises BadGame where the game breaks: no answer in its grammar."""
        try:
            state, _, _ = self._env.step(command)
            return self._observe(state, command)
        except Exception as error:
            raise BadGame(f"{self._name}: the engine cannot play {command!r} ({one_line(error)})") from error

    def admissible(self):
        return self._last.admissible

    def distance(self):
        """Commands from here to the goal by a shortest plan: inf where none leads there, None where it was not found."""
        state = self._engine._pddl_state
        problem = planner.problem_of(state.sas)
        return planner.distance(problem, planner.state_of(problem, state._facts))

    def oracle(self, game, commands):
        return oracle.alfworld_labels(self, game, commands)

    def _observe(self, state, command=None):
        self.raw = state.feedback  # as the engine wrote it
        facts = self._engine._pddl_state._facts
        changing = sorted(str(fact) for signature, group in facts.items() if signature.name in DYNAMIC for fact in group)
        digest = hashlib.blake2b("|".join(changing).encode(), digest_size=8).digest()
        digest, won, last = int.from_bytes(digest, "big"), bool(state["won"]), self._last
        self._last = Observation(
            state.feedback.removeprefix(WELCOME).strip(), state["admissible_commands"], digest, float(won), won, won,
            accepted=last is None or command in last.admissible, effect=last is None or digest != last.state)
        return self._last

"""Distances in ALFWorld's domain: against the real engine, a search without a bound, an independent planner, and by hand."""

import importlib.util
import json
import math
import random
import re
import subprocess

import pytest

from games import houses, levels, planner
from games.pool import make_world

OFFICIAL = levels.official_folder()
needs_official = pytest.mark.skipif(not OFFICIAL, reason="needs the official ALFWorld games (set ALFWORLD_DATA)")

BY_HAND = """begin_variable
var0
-1
2
Atom awake(cat)
NegatedAtom awake(cat)
end_variable
begin_variable
var1
-1
2
Atom fed(cat)
NegatedAtom fed(cat)
end_variable
begin_variable
var2
-1
2
Atom fed(dog)
NegatedAtom fed(dog)
end_variable
begin_variable
var3
-1
2
Atom seen(cat)
NegatedAtom seen(cat)
end_variable
begin_variable
var4
0
2
Atom happy()
NegatedAtom happy()
end_variable
begin_goal
2
0 0
4 0
end_goal
begin_operator
feed cat
1
0 0
2
0 1 1 0
0 0 -1 1
1
end_operator
begin_operator
wake cat
0
1
0 0 -1 0
1
end_operator
begin_operator
look cat
0
1
0 3 -1 0
1
end_operator
begin_rule
1
1 0
4 1 0
end_rule
begin_rule
1
2 0
4 1 0
end_rule
"""


def test_the_sas_format_by_hand():
    """The goal: awake, and happy, which either animal's being fed makes true. Feeding puts the cat to sleep. What only
    looks is gone, and so is its atom."""
    operators, cases = planner.parse_sas(BY_HAND)
    assert cases == [frozenset({"awake(cat)", "fed(cat)"}), frozenset({"awake(cat)", "fed(dog)"})]
    assert operators == [
        planner.Operator(("feed", "cat"), frozenset({"awake(cat)"}), frozenset({"fed(cat)"}), frozenset({"fed(cat)"}),
                         frozenset({"awake(cat)"})),
        planner.Operator(("wake", "cat"), frozenset(), frozenset(), frozenset({"awake(cat)"}), frozenset())]


@pytest.mark.parametrize("old, new, message", [
    ("begin_goal\n2\n0 0", "begin_goal\n2\n0 1", "negated"),
    ("0\n1\n0 0 -1 0", "0\n1\n1 3 0 0 -1 0", "conditional"),
    ("NegatedAtom fed(dog)", "Atom fed(fish)", "plain atom")])
def test_what_the_planner_cannot_do_it_says(old, new, message):
    assert old in BY_HAND
    with pytest.raises(ValueError, match=message):
        planner.parse_sas(BY_HAND.replace(old, new))


def state_in(world):
    """(problem that remembers nothing, state) of where the engine is."""
    problem = planner.problem_of(world._engine._pddl_state.sas)
    return problem._replace(known={}), planner.state_of(problem, world._engine._pddl_state._facts)


def walk(world, game, rng, steps):
    """A random walk that likes to take, open, heat, ...: yields after the reset and each command. All kinds of states."""
    now = world.reset(game)
    yield now
    for _ in range(steps):
        commands = [c for c in now.admissible if c.split()[0] not in ("look", "inventory", "examine", "help")]
        handy = [c for c in commands if c.split()[0] not in ("go", "close")]
        now = world.step(rng.choice(handy if handy and rng.random() < 0.6 else commands))
        yield now
        if now.done:
            return


def games_of_each_type():
    """Two generated houses of each task type, the six types in turn."""
    found = {}
    for seed in range(60):
        game = levels.generated_game("valid_unseen", seed)
        found.setdefault(game.task_type, []).append(game)
    assert set(found) == set(levels.TASK_TYPES)
    return [games[i] for i in range(2) for games in found.values()]


def test_the_distance_obeys_bellman_in_the_real_engine():
    """d = 0 where the engine says won; elsewhere d = 1 + the least d after any admissible command. By trying them all."""
    world, rng = make_world("alfworld"), random.Random(0)
    for game in games_of_each_type()[:6]:
        commands, now = [], world.reset(game)
        for _ in range(4):
            here, after = planner.distance(*state_in(world)), {}
            assert (here == 0) == now.won
            if now.won:
                break
            for command in now.admissible:
                world.reset(game)
                for past in commands:
                    world.step(past)
                world.step(command)
                after[command] = planner.distance(*state_in(world))
            assert here == 1 + min(after.values()), (game.name, commands)
            assert all(after[c] == here for c in after if c.split()[0] in ("look", "inventory", "examine", "help"))
            # on towards the goal, or anywhere
            commands.append(min(after, key=after.get) if rng.random() < 0.7 else rng.choice(sorted(after)))
            world.reset(game)
            for past in commands:
                now = world.step(past)


def start_of(pddl_domain, pddl_problem):
    """(problem, state) at the start of a game, from the translation alone."""
    import fast_downward
    sas = fast_downward.pddl2sas(pddl_domain, pddl_problem)[1]
    problem = planner.problem_of(sas)
    values = re.search(r"begin_state\n(.*?)\nend_state", sas, re.DOTALL)[1].split()
    names = [b.split("\n")[3 + int(v)] for b, v in zip(re.findall(r"begin_variable\n(.*?)\nend_variable", sas, re.DOTALL), values)]
    return problem, sum(problem.bits.get(name.removeprefix("Atom "), 0) for name in names if name.startswith("Atom "))


def crowded(pddl_problem, together):
    """The same house as some official ones are: with so many receptacles in each place; where places are shared, the object
    that the task is about lies in two receptacles at once."""
    target, home = re.search(r"\(inReceptacle (\S+) (\S+)\)", pddl_problem).groups()  # the first to be placed
    others = [name for name in re.findall(r"\(receptacleAtLocation (\S+)", pddl_problem) if name != home]
    second = f"(inReceptacle {target} {others[-1]})\n" if together > 1 else ""
    text = re.sub(r"(receptacleAtLocation \S+ loc_)(\d+)", lambda m: m[1] + str(int(m[2]) // together), pddl_problem)
    return text.replace("(inReceptacle", second + "(inReceptacle", 1)


def test_the_bound_never_counts_too_much():
    """The search finds the same with a bound that is lower by 3, and so does one without any where the goal is near.

    Random walks through houses of all six types, two objects and places with several receptacles among them."""
    rng, near, states = random.Random(1), set(), 0
    for game in games_of_each_type():
        data = houses.generate(game.split, game.source)
        for together in (1, 2, 4):
            problem, state = start_of(data["pddl_domain"], crowded(data["pddl_problem"], together))
            for _ in range(20):
                fresh = lambda: problem._replace(known={})
                low = lambda *given: max(0, planner.bound(*given) - 3)
                found = planner.distance(fresh(), state, 100_000, low)
                assert min(planner.bound(problem, case, state) for case in problem.cases) <= found
                assert planner.distance(fresh(), state) == found
                if found <= 4:
                    assert planner.distance(fresh(), state, 100_000, lambda *_: 0) == found
                    near.add(found)
                states += 1
                able = [o for o in problem.operators[state & problem.places]
                        if state & o.need == o.need and not state & o.forbid]
                handy = [o for o in able if o.name[0] not in ("gotolocation", "closeobject")]
                step = rng.choice(handy if handy and rng.random() < 0.5 else able)
                state = state & ~step.delete | step.add
    assert states == 720 and near >= {1, 2, 3, 4}


def test_every_step_of_a_plan_brings_the_goal_one_nearer():
    """From random states: the plan found, played in the engine by its operators' names, wins in as many commands."""
    world, rng, lengths = make_world("alfworld"), random.Random(2), []
    for game in games_of_each_type()[:6]:
        for now in walk(world, game, rng, 6):
            pass
        problem, state = state_in(world)
        left = planner.distance(problem, state)
        lengths.append(left)
        for left in range(left - 1, -1, -1):
            nearer = {o.name for o in problem.operators[state & problem.places]
                      if state & o.need == o.need and not state & o.forbid
                      and problem.known.get(state & ~o.delete | o.add) == left}
            named = zip(world._engine.state["_valid_actions"], world._engine.state["_valid_commands"])
            now = world.step(next(command for action, command in named
                                  if (action.name, *(v.name for v in action.mapping.values())) in nearer))
            _, state = state_in(world)
            assert planner.distance(problem._replace(known={}), state) == left
        assert now.won
    assert max(lengths) >= 5


def optimal_plan_length(binary, sas, atoms, goal, folder):
    """By Fast Downward, A* with landmark cuts: from the state in which `atoms` are true to where all of `goal` are.

    The engine's SAS text with that state and goal, and without what landmark cuts do not support: rules for derived atoms
    (the goal is one of their cases) and conditional effects (on whether a lamp is lit, which no precondition reads).
    """
    variables = [b.split("\n") for b in re.findall(r"begin_variable\n(.*?)\nend_variable", sas, re.DOTALL)]
    first = [v[3].split(" ", 1) for v in variables]  # the kind and the atom of value 0
    value = lambda i, true: 0 if (first[i][0] == "Atom") == true else 1
    number = {atom: i for i, (_, atom) in enumerate(first)}
    lines = ["begin_version", "3", "end_version", "begin_metric", "0", "end_metric", str(len(variables))]
    for v in variables:
        lines += ["begin_variable", v[0], "-1", *v[2:], "end_variable"]
    lines += ["0", "begin_state", *(str(value(i, atom in atoms)) for i, (_, atom) in enumerate(first)), "end_state"]
    lines += ["begin_goal", str(len(goal)), *(f"{number[a]} {value(number[a], True)}" for a in goal), "end_goal"]
    operators = [b.split("\n") for b in re.findall(r"begin_operator\n(.*?)\nend_operator", sas, re.DOTALL)]
    lines += [str(len(operators))]
    for name, count, *rest in operators:
        effects = [line for line in rest[int(count) + 1:-1] if line.startswith("0 ")]
        lines += ["begin_operator", name, count, *rest[:int(count)], str(len(effects)), *effects, "1", "end_operator"]
    done = subprocess.run([binary, "--search", "astar(lmcut())"], input="\n".join(lines + ["0", ""]), text=True,
                          capture_output=True, cwd=folder)
    length = re.search(r"Plan length: (\d+) step", done.stdout)
    assert length or "unsolvable" in done.stdout or "no solution" in done.stdout, done.stdout + done.stderr
    return int(length[1]) if length else math.inf


@pytest.mark.parametrize("kind", ["generated", pytest.param("official", marks=needs_official)])
def test_fast_downward_finds_nothing_shorter(kind, tmp_path):
    """An independent optimal planner, from random states, dead ends among them: `pip install --no-deps up-fast-downward`."""
    package = importlib.util.find_spec("up_fast_downward")  # not imported: that wants more packages
    if package is None:
        pytest.skip("needs the package up-fast-downward")
    binary = f"{package.submodule_search_locations[0]}/downward/builds/release/bin/downward"
    games = games_of_each_type()[:6] if kind == "generated" else \
        levels.list_games("alfworld", "valid_unseen", "official")[::35]
    world, rng = make_world("alfworld"), random.Random(3)
    for game in games:
        for i, _ in enumerate(walk(world, game, rng, 9)):
            if i % 3 == 0:
                sas, facts = world._engine._pddl_state.sas, world._engine._pddl_state.facts
                atoms = {f"{fact.name}({', '.join(v.name for v in fact.arguments)})" for fact in facts}
                assert planner.distance(*state_in(world)) == min(
                    optimal_plan_length(binary, sas, atoms, case, tmp_path) for case in planner.parse_sas(sas)[1])


@needs_official
def test_walkthroughs_of_official_games_are_plans():
    """The distance at the start is at most the length of the game's own walkthrough, and the walkthrough leads to 0."""
    world, shorter, played = make_world("alfworld"), 0, 0
    for game in levels.list_games("alfworld", "valid_seen", "official")[::28]:
        with open(game.source) as file:
            walkthrough = json.load(file)["walkthrough"]
        rows = world.oracle(game, walkthrough)
        assert rows[0][1] <= len(walkthrough) and rows[-1][2] == 0
        assert all(after >= before - 1 for _, before, after in rows)
        played, shorter = played + 1, shorter + (rows[0][1] < len(walkthrough))
    assert played == 5 and shorter <= 1


@needs_official
def test_a_dead_end():
    """A roll of paper towels can be taken out of the garbage can, and no receptacle of this house takes it: it stays in
    the hand forever, and the salt shaker where it is. 77 of the 134 games of valid_unseen have such a thing."""
    game = next(game for game in levels.list_games("alfworld", "valid_unseen", "official", [1])
                if "SaltShaker-None-Cabinet-10" in game.name)
    rows = make_world("alfworld").oracle(
        game, ["go to garbagecan 1", "take papertowelroll 1 from garbagecan 1", "look", "go to void 1", None])
    assert rows[0] == (0, 4, 4) and rows[1] == (0, 4, math.inf) and rows[2:] == [(-1, math.inf, math.inf)] * 3

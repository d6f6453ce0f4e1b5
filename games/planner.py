"""How many commands is the goal of an ALFWorld game away? Exactly, from the real domain, for any state.

    problem = problem_of(sas)               # the engine's own translation of the game's PDDL problem, in SAS format
    steps = distance(problem, state)        # length of a shortest plan, counted in commands

The operators are those that the engine itself plays. Atoms that no way to the goal depends on are left out, and with them
what merely looks (`look`, `examine`, `inventory`). Then A* (Hart, Nilsson & Raphael 1968) with `bound` below, which never
counts too much: so the result is a shortest plan's length. tests/test_planner.py compares it with a search that knows no
bound, and with Fast Downward's optimal search. ALFWorld's own planner minimises something else, a cost in which cleaning
weighs 5 and looking nothing, and finds plans that are good, not shortest.
"""

import functools
import heapq
import itertools
import math
import re
from typing import NamedTuple

LIMIT = 20_000  # states that one search may expand


# ---------------------------------------------------------------------------------------------------- the SAS format

class Operator(NamedTuple):
    """A grounded command: words of its PDDL name; atoms needed, forbidden, added, deleted (frozensets; compiled: bits)."""
    name: tuple
    need: object
    forbid: object
    add: object
    delete: object


def parse_sas(text):
    """A planning problem in Fast Downward's SAS format: ([Operator over frozensets of atoms], [goal case, ...]).

    The goal holds where all atoms of one case hold: its quantifiers arrive as rules for derived atoms, unfolded here.
    Raises ValueError for what ALFWorld's domain does not have: variables of more than two values, negated goals,
    conditions on effects that matter.
    """
    blocks = lambda kind: [b.split("\n") for b in re.findall(rf"begin_{kind}\n(.*?)\nend_{kind}", text, re.DOTALL)]
    variables = [(lines[0], [value.split(" ", 1) for value in lines[3:]]) for lines in blocks("variable")]
    for name, values in variables:
        if sorted(value[0] for value in values) != ["Atom", "NegatedAtom"]:
            raise ValueError(f"{name} of the planning problem is not a plain atom")

    def literal(variable, value):
        """(atom, whether it is to be true)"""
        kind, atom = variables[int(variable)][1][int(value)]
        return atom, kind == "Atom"

    operators = []  # (Operator, atoms with conditional effects)
    for name, count, *lines in blocks("operator"):
        wanted = [literal(*line.split()) for line in lines[:int(count)]]
        effects, conditional = [], set()
        for line in lines[int(count) + 1:-1]:  # "number of conditions, conditions, variable, before, after"
            conditions, *_, variable, before, after = line.split()
            wanted += [literal(variable, before)] if before != "-1" else []
            if conditions == "0":
                effects.append(literal(variable, after))
            else:
                conditional.add(literal(variable, after)[0])
        pick = lambda pairs, truth: frozenset(atom for atom, true in pairs if true == truth)
        operators.append((Operator(tuple(name.split()), pick(wanted, True), pick(wanted, False),
                                   pick(effects, True), pick(effects, False)), conditional))

    rules = {}  # derived literal -> bodies; any of them makes it true
    for _, *body, head in blocks("rule"):
        variable, _, value = head.split()
        rules.setdefault(literal(variable, value), []).append([literal(*line.split()) for line in body])
    goal, = blocks("goal")
    goal = [literal(*line.split()) for line in goal[1:]]
    if not all(true for _, true in goal + [part for bodies in rules.values() for body in bodies for part in body]):
        raise ValueError("the goal of the planning problem has a negated atom")

    def unfold(literals):
        """The ways to make all of them true: a set of sets of atoms."""
        ways = [[case for body in rules[one] for case in unfold(body)] if one in rules else [frozenset(one[:1])]
                for one in literals]
        return {frozenset().union(*choice) for choice in itertools.product(*ways)}

    cases = sorted(unfold(goal), key=sorted)
    matter = frozenset().union(*cases)  # the goal's atoms, those that their operators depend on, and so forth
    while True:
        used = [(o, conditional) for o, conditional in operators if (o.add | o.delete | conditional) & matter]
        if any(conditional & matter for _, conditional in used):
            raise ValueError("a conditional effect of the planning problem matters to its goal")
        grown = matter.union(*(o.need | o.forbid for o, _ in used))
        if grown == matter:
            return [o._replace(add=o.add & matter, delete=o.delete & matter) for o, _ in used], cases
        matter = grown


# ------------------------------------------------------------------------------------------------ the search problem

class Thing(NamedTuple):
    """What a case of the goal wants of one object. Atoms are bits; a place is the bit of its `atlocation`."""
    held: int                 # the atom that it is in the hand (0: it cannot be taken)
    anywhere: int             # all atoms that say where it lies
    wants_hand: bool = False  # it must end in the hand
    into: int = 0             # or in a receptacle: the atom that it is there
    treatments: tuple = ()    # clean, hot, cool: (atom, places where it becomes so)


class Case(NamedTuple):
    """One way to reach the goal."""
    atoms: int       # it is reached where all of these are true
    things: list     # of Thing
    at: int          # where the agent must be in the end, or 0
    switches: list   # lamps: (atom, place)


class Problem(NamedTuple):
    """What `distance` needs of a game. A state is an int: the bits of its true atoms."""
    bits: dict       # atom, such as "holds(agent1, mug_1)" -> its bit
    operators: dict  # place -> operators that apply there
    places: int      # all places
    hands: int       # all atoms `holds`, of what can be put down again
    full: int        # the atom that the hand is not empty
    spots: dict      # atom `inreceptacle` -> (place, the atom that the receptacle is open, or 0)
    cases: list      # of Case
    known: dict      # state -> distance, of all states on the plans found so far


@functools.lru_cache(maxsize=64)
def problem_of(sas):
    """The Problem in a SAS text. Remembered: all episodes of a game share what has been found."""
    operators, cases = parse_sas(sas)
    atoms = sorted(frozenset().union(*cases, *(part for o in operators for part in o[1:])))
    bits = {atom: 1 << i for i, atom in enumerate(atoms)}
    all_of = lambda start: sum(bits[atom] for atom in atoms if atom.startswith(start))
    places, by_place, spots, becomes = all_of("atlocation("), {}, {}, {}
    for o in operators:
        o = Operator(o.name, *(sum(bits[atom] for atom in part) for part in o[1:]))
        place = o.need & places
        if place.bit_count() != 1:
            raise ValueError(f"{' '.join(o.name)} needs no place, or several: not ALFWorld's domain")
        if o.name[0] in ("pickupobject", "putobject"):
            thing, receptacle = o.name[3:5]
            spots[bits[f"inreceptacle({thing}, {receptacle})"]] = place, bits.get(f"opened({receptacle})", 0)
        for atom in atoms:
            if o.add & bits[atom] and atom.startswith(("isclean(", "ishot(", "iscool(", "istoggled(")):
                becomes.setdefault(atom, set()).add(place)
        # Receptacles may stand in one place: a `go to` for each, all the same to us.
        by_place.setdefault(place, {}).setdefault(o[1:], o)

    def case_of(wanted):
        things, at, switches = {}, 0, []
        for atom in sorted(wanted):
            kind, *names = re.findall(r"[^(), ]+", atom)
            name = names[-1] if kind == "holds" else names[0]
            if kind == "atlocation":
                at = bits[atom]
            elif kind == "istoggled":
                switches += [(bits[atom], place) for place in becomes[atom] if len(becomes[atom]) == 1]
            elif kind in ("holds", "inreceptacle", "isclean", "ishot", "iscool"):
                thing = things.get(name) or Thing(all_of(f"holds(agent1, {name})"), all_of(f"inreceptacle({name},"))
                things[name] = (thing._replace(wants_hand=True) if kind == "holds" else
                                thing._replace(into=bits[atom]) if kind == "inreceptacle" else
                                thing._replace(treatments=(*thing.treatments, (bits[atom], becomes.get(atom, ())))))
        return Case(sum(bits[atom] for atom in wanted), list(things.values()), at, switches)

    return Problem(bits, {place: list(found.values()) for place, found in by_place.items()}, places,
                   all_of("holds("), all_of("holdsany("), spots, [case_of(wanted) for wanted in cases], {})


def state_of(problem, facts):
    """The state in which the engine is. `facts`: {signature: propositions}, as TextWorld keeps them."""
    kinds, state = {atom.partition("(")[0] for atom in problem.bits}, 0
    for fact in (fact for signature, group in facts.items() if signature.name in kinds for fact in group):
        state |= problem.bits.get(f"{fact.name}({', '.join(v.name for v in fact.arguments)})", 0)
    return state


# ----------------------------------------------------------------------------------------------------------- the search

def bound(problem, case, state):
    """Commands that every plan for this case still takes: never too many, and mostly all of them. (int, or inf)

    What is counted is one command each: taking what is not in the hand, opening what it lies in, treating it, opening what
    it goes into, putting it down, using the lamp, emptying the hand first; and walks. There is one hand, so the walks with
    one object in it are other walks than those with another object or with none.
    """
    here, hand = state & problem.places, state & problem.hands
    steps, picks, freed, to_open, sources, arrivals = 0, False, False, set(), [], []
    walk = lambda a, b: bool(a and b and a != b)  # 0 is a place that we do not know
    for thing in case.things:
        missing = [places for atom, places in thing.treatments if not state & atom]
        held = hand > 0 and hand == thing.held
        put = thing.into and not state & thing.into
        if not (put or missing or (thing.wants_hand and not held)):
            continue
        start, end = here, 0
        if not held:
            spot = state & thing.anywhere
            if not spot or not thing.held:
                return math.inf  # it is nowhere, or cannot be taken
            steps, picks, start = steps + 1, True, 0
            if spot in problem.spots:  # in one place; in official games an object may lie in two receptacles at once
                start, lid = problem.spots[spot]
                to_open.add(lid & ~state)
                put = put or (thing.into and missing)  # taken out of where it must be: it has to go back
        if put:
            steps, freed = steps + 1, freed or held
            end, lid = problem.spots[thing.into]
            to_open.add(lid & ~state)
        elif thing.wants_hand:
            end = case.at
        via = missing[0] if missing else ()
        steps += len(missing) + min((walk(start, place) + walk(place, end) for place in via), default=walk(start, end))
        sources.append(0 if held else start)
        arrivals.append({end}.union(*missing))
    if picks and state & problem.full and not freed:
        if not hand:
            return math.inf  # in the hand is what no receptacle of this house takes: it will be there forever
        steps += 1
    steps += len(to_open - {0})
    for i, source in enumerate(sources):  # walks to what must be fetched, which may be walks with another object in hand
        steps += source not in {here, 0}.union(sources[:i], *arrivals[:i], *arrivals[i + 1:])
    off = [(atom, place) for atom, place in case.switches if not state & atom]
    visits = {case.at, *(place for _, place in off)}
    return steps + len(off) + len(visits - {here, 0}.union(sources, *arrivals))


def distance(problem, state, limit=LIMIT, bound=bound):
    """Length of a shortest plan from `state`, inf where there is none; None where `limit` states were not enough."""
    def estimate(one):
        found = problem.known.get(one)  # exact
        return min(bound(problem, case, one) for case in problem.cases) if found is None else found

    frontier, steps, parent = [(estimate(state), 0, state)], {state: 0}, {state: None}
    for _ in range(limit):
        if not frontier or frontier[0][0] == math.inf:
            return math.inf
        _, minus, now = heapq.heappop(frontier)  # of those that look equally good the one that is furthest on
        if -minus > steps[now]:
            continue  # meanwhile a shorter way there was found
        left = 0 if any(now & case.atoms == case.atoms for case in problem.cases) else problem.known.get(now)
        if left is not None:  # the rest of a shortest plan is a shortest plan: remember all of it
            while now is not None:
                problem.known[now], left, now = left, left + 1, parent[now]
            return problem.known[state]
        for o in problem.operators.get(now & problem.places, ()):
            if now & o.need == o.need and not now & o.forbid:
                after = now & ~o.delete | o.add
                if steps.get(after, math.inf) > steps[now] + 1:
                    steps[after], parent[after] = steps[now] + 1, now
                    heapq.heappush(frontier, (steps[after] + estimate(after), -steps[after], after))
    return None

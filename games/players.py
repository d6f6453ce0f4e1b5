"""Players that need no model: the expert, careful or careless, and one that picks any admissible command.

ALFWorld's expert searches, ScienceWorld's follows the simulator's own solution (experts.py). A careless one slips now and
then: its episodes are won all the same, and full of flaws, which is where reinforcement learning is to begin.
"""

import random

from games.experts import gold_expert, search_expert, things
from games.game import BadGame, most_steps


SLIPS = ("made up", "idle", "again", "wander")


def slip(rng, receptacles, last, before, want, here, kinds=SLIPS):
    """What a careless player does before the right command: a list of commands that change nothing for good, empty
    where none of the `kinds` is possible."""
    if not kinds:
        return []
    kind = rng.choice(kinds)
    if kind == "again" and last:
        return [last]
    if kind == "wander" and here:
        elsewhere = [r for r in receptacles if r != here and not want.endswith(r)]
        if elsewhere:
            return [f"go to {rng.choice(elsewhere)}", f"go to {here}"]
    if kind == "made up":
        thing = rng.choice(things(before.text) or ["book 1"])
        place = rng.choice(receptacles)
        command = rng.choice([f"take {thing} from {place}", f"open {place}", f"move {thing} to {place}", f"go to {here}"])
        if command not in before.admissible:
            return [command]
    return [rng.choice(["look", "inventory"])] if "idle" in kinds else []


COLORS = ["red", "green", "blue", "orange", "yellow", "purple"]
ROOMS = ["bathroom", "bedroom", "kitchen", "living room", "workshop", "art studio", "foundry", "hallway"]
EGGS = ["butterfly", "giant tortoise", "blue jay", "dove", "turtle", "parrot", "crocodile", "frog", "chameleon"]


def science_slip(rng, last, here, kinds=SLIPS):
    """The same in ScienceWorld, where `here` is the room last teleported to."""
    if not kinds:
        return []
    kind = rng.choice(kinds)
    if kind == "again" and last and not last.startswith("focus"):  # which is the answer, and may be given once
        return [last]
    if kind == "wander" and here:
        return [f"teleport to {rng.choice([room for room in ROOMS if room != here])}", f"teleport to {here}"]
    if kind == "made up":
        return [rng.choice([f"pick up {rng.choice(ROOMS)}", f"open {rng.choice(COLORS)} box", f"move {rng.choice(ROOMS)} to "
                            f"{rng.choice(COLORS)} box"])]
    return [rng.choice(["look around", "inventory"])] if "idle" in kinds else []


def playable(answers, warn):
    """{slot: answer} of (slot, answer) pairs, without BadGames: `warn` is called with the line of each.

    >>> playable([(0, "an observation"), (1, BadGame("trial_7: unreadable"))], warn=print)
    trial_7: unreadable
    {0: 'an observation'}
    """
    found = {}
    for slot, answer in answers:
        if isinstance(answer, BadGame):
            warn(str(answer))
        else:
            found[slot] = answer
    return found


def solutions(games, pool):
    """ScienceWorld's own solution of each game, made fit for imitation: a list of commands, or BadGame.

    Leaving steps out changes when things happen: a plant is not in flower yet, an animal not hatched. So what
    `gold_expert` makes of a solution is tried; where it does not win, it stays as it is. Ends all episodes.
    """
    gold = pool.gold_paths(games)
    short = [path if isinstance(path, BadGame) else list(gold_expert(path)) for path in gold]
    silent = lambda line: None  # whoever plays the solutions will meet it again
    first = playable(enumerate(pool.reset(games)), silent)
    now = {slot: o for slot, o in first.items() if not isinstance(gold[slot], BadGame)}
    left = {slot: list(short[slot]) for slot in now}
    while left:
        asked = [(slot, commands.pop(0)) for slot, commands in left.items() if commands]
        answers = playable(zip((slot for slot, _ in asked), pool.step(asked)), silent)
        now |= answers
        left = {slot: left[slot] for slot, o in answers.items() if left[slot] and not o.done}
    return [short[slot] if slot in now and now[slot].won else path for slot, path in enumerate(gold)]


def play_expert(games, pool, max_steps=50, batch=64, sloppy=0.0, seed=0, warn=print, kinds=lambda game: SLIPS):
    """Yields (game, turns, won) per game; turns are (observation, command, before, after, whether it was a slip).

    sloppy: chance of a `slip` before each of the expert's commands. The expert is not told of them. kinds: from a game
    to those of SLIPS that may be made in it.
    warn: called with one line for each game that cannot be played; it is left out.
    """
    rng = random.Random(seed)
    for begin in range(0, len(games), batch):
        chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
        gold = solutions(chunk, pool) if chunk[0].env == "scienceworld" else None
        first = pool.reset(chunk)
        now = playable(enumerate(first), warn)
        if gold:
            solved = playable(((slot, gold[slot]) for slot in now), warn)
            now = {slot: now[slot] for slot in solved}
        experts, turns, queue, here = {}, {s: [] for s in now}, {}, {}

        def plan(slot, want):
            """The expert's next command, and perhaps a slip before it."""
            place = here.get(slot)
            last = turns[slot][-1][1] if turns[slot] else None
            slips = []
            if rng.random() < sloppy:
                may = kinds(chunk[slot])
                slips = (science_slip(rng, last, place, may) if gold else
                         slip(rng, things(first[slot].text), last, now[slot], want, place, may))
            queue[slot] = slips + [want]

        for slot, observation in now.items():
            try:
                experts[slot] = (c for c in gold[slot]) if gold else search_expert(observation.text)
                plan(slot, next(experts[slot]))
            except (ValueError, StopIteration):  # a task it does not know, nothing it can do
                continue
        while queue:
            asked = {slot: commands.pop(0) for slot, commands in queue.items()}
            answers = playable(zip(asked, pool.step(list(asked.items()))), warn)
            for slot, command in asked.items():
                if slot not in answers:
                    del queue[slot], now[slot]
                    continue
                after = answers[slot]
                turns[slot].append((now[slot].text, command, now[slot], after, bool(queue[slot])))  # a slip: more is to come
                now[slot] = after
                if after.done or len(turns[slot]) >= most_steps(max_steps, [chunk[slot]]):
                    del queue[slot]
                elif not queue[slot]:  # the expert's own command: it sees what came of it
                    if command.startswith(("go to ", "teleport to ")):
                        here[slot] = command.split(" to ", 1)[1]
                    try:
                        plan(slot, experts[slot].send(after.text))
                    except StopIteration:
                        del queue[slot]
        for slot, observation in now.items():
            yield chunk[slot], turns[slot], observation.won


def random_agent(games, pool, max_steps, seed=0, batch=64, warn=print):
    """Yields (game, turns, won) as `play_expert` does: any admissible command, each as likely as the others."""
    for begin in range(0, len(games), batch):
        chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
        now = playable(enumerate(pool.reset(chunk)), warn)
        turns, running = {s: [] for s in now}, list(now)
        generators = {s: random.Random(f"{seed} {chunk[s].name}") for s in now}  # whatever batch or worker it is in
        for done in range(max(most_steps(max_steps, [game]) for game in chunk)):
            running = [s for s in running if most_steps(max_steps, [chunk[s]]) > done]
            possible = playable(zip(running, pool.admissible(running)), warn)
            chosen = {s: generators[s].choice(commands) for s, commands in possible.items()}
            answers = playable(zip(chosen, pool.step(list(chosen.items()))), warn)
            for s in running:
                if s in answers:
                    turns[s].append((now[s].text, chosen[s], now[s], answers[s], False))
                    now[s] = answers[s]
                else:
                    del now[s]
            running = [s for s in answers if not now[s].done]
            if not running:
                break
        for s in now:
            yield chunk[s], turns[s], now[s].won

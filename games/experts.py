"""An expert that searches: it sees only what the agent sees, the text of the observations.

ALFWorld's own `walkthrough` is planned with full knowledge of the house, so there is nothing in it to imitate for an
agent that must search. This expert reads the task, visits receptacles that may hold the object (common sense: the
table of what fits where that ALFWorld ships), opens what is closed, remembers where it saw things, and does the task.

It is a generator: it yields commands and is sent the observations.

>>> expert = search_expert("Around you, you see a desk 1, and a bed 1.\\n\\nYour task is to: put some book on desk.")
>>> next(expert)
'go to bed 1'
>>> expert.send("You arrive at bed 1. On the bed 1, you see a book 1.")
'take book 1 from bed 1'
"""

import re

from games.houses import VAL_RECEPTACLE_OBJECTS  # ALFWorld's own table

# What each receptacle may hold, in the lower case of the game's texts: the expert's common sense.
FITS = {r.lower(): {o.lower() for o in objects} for r, objects in VAL_RECEPTACLE_OBJECTS.items()}
TASKS = [  # (pattern, action on the way, device, how many)
    (r"look at (?P<obj>\w+) under the (?P<end>\w+)", "use", None, 1),
    (r"examine the (?P<obj>\w+) with the (?P<end>\w+)", "use", None, 1),
    (r"put a clean (?P<obj>\w+) in (?P<end>\w+)", "clean", "sinkbasin", 1),
    (r"clean some (?P<obj>\w+) and put it in (?P<end>\w+)", "clean", "sinkbasin", 1),
    (r"put a hot (?P<obj>\w+) in (?P<end>\w+)", "heat", "microwave", 1),
    (r"heat some (?P<obj>\w+) and put it in (?P<end>\w+)", "heat", "microwave", 1),
    (r"put a cool (?P<obj>\w+) in (?P<end>\w+)", "cool", "fridge", 1),
    (r"cool some (?P<obj>\w+) and put it in (?P<end>\w+)", "cool", "fridge", 1),
    (r"put two (?P<obj>\w+) in (?P<end>\w+)", None, None, 2),
    (r"find two (?P<obj>\w+) and put them in (?P<end>\w+)", None, None, 2),
    (r"put (?:a|some) (?P<obj>\w+) (?:in|on) (?P<end>\w+)", None, None, 1),
]


def parse_task(observation):
    """(object, destination or lamp, action on the way, device, how many) from the task sentence.

    >>> parse_task("Your task is to: heat some egg and put it in garbagecan.")
    ('egg', 'garbagecan', 'heat', 'microwave', 1)
    """
    sentence = observation.split("Your task is to: ")[-1]
    for pattern, action, device, count in TASKS:
        match = re.match(pattern, sentence)
        if match:
            return match["obj"], match["end"], action, device, count
    raise ValueError(f"the search expert does not know this kind of task: {sentence.strip()!r}")


def things(text):
    """Names after "you see": `On the desk 1, you see a pen 1, and a cd 2.` -> ['pen 1', 'cd 2']."""
    return re.findall(r"\ban? (\w+ \d+)", text.partition("you see")[2])


def kind(name):
    return name.split()[0]


def search_expert(observation):
    """A generator of commands for one episode; `send` it each observation. It ends when it knows no more to do."""
    goal, end, action, device, count = parse_task(observation)
    receptacles = things(observation.split("Your task is to")[0])
    # Look first where the object may be, in the order in which the room names the receptacles; then everywhere.
    likely = [r for r in receptacles if goal in FITS.get(kind(r), ())]
    order = likely + [r for r in receptacles if r not in likely]
    destination = next((r for r in receptacles if kind(r) == end), None)
    if action != "use" and count == 1 and not device:
        order = [r for r in order if kind(r) != end]  # an object lying there already would have won the game
    seen = {}  # receptacle -> names of what was last seen in it
    here, done = None, 0

    def visit(receptacle):
        """Go there if need be, open it if it is closed, remember its contents."""
        nonlocal here
        text = ""
        if here != receptacle:
            text = yield f"go to {receptacle}"
            here = receptacle
        if f"{receptacle} is closed" in text:
            text = yield f"open {receptacle}"
        if text:
            seen[receptacle] = things(text)

    def find(wanted, skip=()):
        """Walk to the receptacle that holds the wanted kind of thing; returns its name, or None."""
        known = [r for r, names in seen.items() if any(kind(n) == wanted for n in names)]
        for receptacle in known + [r for r in order if r not in seen] + [r for r in receptacles if r not in order]:
            if receptacle in skip or (receptacle in seen and receptacle not in known):
                continue
            yield from visit(receptacle)
            found = [n for n in seen.get(receptacle, ()) if kind(n) == wanted]
            if found:
                return found[0]
        return None

    while done < count:
        if count == 2 and destination in seen:  # one of the two may have been there from the start
            done = sum(kind(n) == goal for n in seen[destination])
            if done >= count:
                return
        name = yield from find(goal, skip=(destination,) if count == 2 else ())
        if name is None and count == 2 and destination not in seen:
            yield from visit(destination)
            continue
        if name is None:
            return
        yield f"take {name} from {here}"
        seen[here].remove(name)
        if action == "use":
            lamp = yield from find(end)
            if lamp:
                yield f"use {lamp}"
            return
        if device:
            tool = next((r for r in receptacles if kind(r) == device), None)
            if tool is None:
                return
            if here != tool:  # going is enough: the engine heats and cools in a closed device too
                yield f"go to {tool}"
                here = tool
            yield f"{action} {name} with {tool}"
        if destination is None:
            return
        yield from visit(destination)
        yield f"move {name} to {destination}"
        seen.setdefault(destination, []).append(name)
        done += count == 1
    return


def gold_expert(path):
    """ScienceWorld's own solution as a generator of commands, made fit for imitation.

    The simulator knows everything and focuses on things that it has not seen: we look around first, so that what is
    imitated can be known. It walks from room to room although the simplification used here can teleport: we do.

    >>> list(gold_expert(["open door to kitchen", "go to kitchen", "go to outside", "focus on dove", "pick up dove"]))
    ['teleport to outside', 'look around', 'focus on dove', 'pick up dove']
    """
    looked, room = True, None  # the first observation shows the room
    for command in path:
        if command.startswith("open door to ") or (command == "look around" and (looked or room)):
            continue
        if command.startswith("go to "):
            room = command.removeprefix("go to ")
            continue
        if room:
            yield f"teleport to {room}"
            looked, room = False, None
        if not looked:
            yield "look around"
            looked = True
        yield command

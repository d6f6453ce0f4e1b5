"""RLVMR's four tags for an expert's turns (Zhang et al. 2025, arXiv 2507.22844): what its cold start is made
of.

There a language model annotates expert episodes. Here rules do, from nothing but the texts that the
environment showed up to the turn and what the expert did there:

    planning    the first turn                                       find mug, clean it with sinkbasin, ...
    reflection  the last action failed, and this one is another      open desk 1 is not possible.
    explore     what the task needs is not in sight yet, and the     no mug at desk 1.
                action is new in this episode
    monitor     all others                                           mug 1 is here.
"""

import re

from games.experts import kind, parse_task, things


def tagged(tag, text):
    """What stands before the action.

    >>> tagged("monitor", "mug 1 is here.")
    '<monitor>mug 1 is here.</monitor>'
    """
    return f"<{tag}>{text}</{tag}>"


def told(text, words=20):
    """The first sentence of an observation, at most so many words of it.

    >>> told("You arrive at desk 1. On the desk 1, you see a pen 1.")
    'You arrive at desk 1.'
    """
    sentence = re.split(r"(?<=\.)\s|\n", text.strip())[0].split()
    return " ".join(sentence[:words]).rstrip(".:,") + ("." if len(sentence) <= words else " ...")


def plan(env, text):
    """The steps to the goal in a line, from the task as the first observation states it.

    >>> plan("alfworld", "You see a desk 1.\\n\\nYour task is to: heat some egg and put it in garbagecan.")
    'find egg, heat it with microwave, move it to garbagecan.'
    >>> plan("scienceworld", "Your task is to find a(n) animal. First, focus on the thing.\\n\\nThis room")
    'find a(n) animal. First, focus on the thing.'
    """
    if env == "scienceworld":
        sentences = re.split(r"(?<=\.)\s+", text.split("\n")[0].removeprefix("Your task is to "))
        while len(sentences) > 1 and len(" ".join(sentences)) > 120:
            sentences.pop()
        return " ".join(sentences)
    goal, end, action, device, count = parse_task(text)
    if action == "use":
        return f"find {goal}, take it, find {end}, use it."
    if count == 2:
        return f"find two {goal}, move each to {end}."
    return f"find {goal}, {f'{action} it with {device}, ' if device else ''}move it to {end}."


def sights(env, turns):
    """What is looked for before each turn, and what of it has just come in sight: a list of (sought or None,
    text).

    ALFWorld: the task's object until it was seen anywhere but at its destination, then, to look at it, the
    lamp. ScienceWorld, whose tasks differ more: everything, until the first thing is focused on or picked up.
    """
    found, seen, here, held, sought = [], {}, None, None, "something"
    if env == "alfworld":
        goal, end, action, *_ = parse_task(turns[0][0])
    for observation, *_ in turns:
        if env == "scienceworld":
            sought = None if re.match("You (focus|move|pick)", observation) else sought
            found.append((sought, told(observation)))
            continue
        if arrived := re.match(r"You arrive at (\w+ \d+)", observation):
            here = arrived[1]
        if here and re.match("You (arrive|open)", observation):
            seen[here] = things(observation)
        if taken := re.match(r"You pick up the (\w+ \d+) from the (\w+ \d+)", observation):
            held = taken[1]
            seen[taken[2]] = [name for name in seen.get(taken[2], []) if name != held]
        if re.match("You (move|put) ", observation):
            held = None
        known = {kind(name) for place, names in seen.items() if kind(place) != end for name in names}
        wanted = end if held and action == "use" else None if held else goal
        sought = wanted if wanted not in known else None
        sight = next((name for name in seen.get(here, ()) if kind(name) == wanted), None)
        text = f"{sight} is here." if sight else f"no {sought} at {here}." if sought and here else None
        text = f"{here} is closed." if "is closed" in observation else text or told(observation)
        found.append((sought, text))
    return found


def thoughts(env, turns):
    """(tag, text) for every turn of an expert's episode. turns: as `games.players.play_expert` gives them."""
    found, done = [], set()
    for i, ((observation, command, before, *_), (sought, text)) in enumerate(zip(turns, sights(env, turns))):
        last = turns[i - 1][1] if i else None
        if i == 0:
            found.append(("planning", plan(env, observation)))
        elif not (before.accepted and before.effect) and command != last:
            how = "changed nothing" if before.accepted else "is not possible"
            found.append(("reflection", f"{last} {how}."))
        else:
            found.append(("explore" if sought and command not in done else "monitor", text))
        done.add(command)
    return found

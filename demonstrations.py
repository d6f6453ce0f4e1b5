"""Demonstrations: experts play, carefully or carelessly, and what they did becomes training data.

ALFWorld's expert searches (expert.py); ScienceWorld's follows the simulator's own solution. A careless one slips now and
then: its episodes are won all the same, and full of flaws, which is where reinforcement learning is to begin.
"""

import json
import os
import random
import re

from tqdm import tqdm

from expert import gold_expert, search_expert, things
from rollout import Episode, Step


def slip(rng, receptacles, last, before, want, here):
    """What a careless player does before the right command: a list of commands that change nothing for good."""
    kind = rng.choice(["made up", "idle", "again", "wander"])
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
    return [rng.choice(["look", "inventory"])]


COLORS = ["red", "green", "blue", "orange", "yellow", "purple"]
ROOMS = ["bathroom", "bedroom", "kitchen", "living room", "workshop", "art studio", "foundry", "hallway"]
EGGS = ["butterfly", "giant tortoise", "blue jay", "dove", "turtle", "parrot", "crocodile", "frog", "chameleon"]


def science_slip(rng, last, here):
    """The same in ScienceWorld, where `here` is the room last teleported to."""
    kind = rng.choice(["made up", "idle", "again", "wander"])
    if kind == "again" and last and not last.startswith("focus"):  # which is the answer, and may be given once
        return [last]
    if kind == "wander" and here:
        return [f"teleport to {rng.choice([room for room in ROOMS if room != here])}", f"teleport to {here}"]
    if kind == "made up":
        return [rng.choice([f"pick up {rng.choice(ROOMS)}", f"open {rng.choice(COLORS)} box", f"move {rng.choice(ROOMS)} to "
                            f"{rng.choice(COLORS)} box"])]
    return [rng.choice(["look around", "inventory"])]


def play_expert(games, pool, max_steps=50, batch=64, sloppy=0.0, seed=0):
    """Yields (game, turns, won) per game; turns are (observation, command, before, after).

    sloppy: chance of a `slip` before each of the expert's commands. The expert is not told of them.
    """
    rng = random.Random(seed)
    for begin in range(0, len(games), batch):
        chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
        gold = pool.gold_paths(chunk) if chunk[0].env == "scienceworld" else None  # before reset: it ends all episodes
        first = pool.reset(chunk)
        now = {s: o for s, o in enumerate(first) if not isinstance(o, Exception)}
        now = {s: o for s, o in now.items() if not (gold and isinstance(gold[s], Exception))}
        experts, turns, queue, here = {}, {s: [] for s in now}, {}, {}

        def plan(slot, want):
            """The expert's next command, and perhaps a slip before it."""
            place = here.get(slot)
            last = turns[slot][-1][1] if turns[slot] else None
            slips = []
            if rng.random() < sloppy:
                slips = science_slip(rng, last, place) if gold else slip(rng, things(first[slot].text), last, now[slot], want, place)
            queue[slot] = slips + [want]

        for slot, observation in now.items():
            try:
                experts[slot] = gold_expert(gold[slot]) if gold else search_expert(observation.text)
                plan(slot, next(experts[slot]))
            except (ValueError, StopIteration):  # a task it does not know, nothing it can do
                continue
        while queue:
            asked = {slot: commands.pop(0) for slot, commands in queue.items()}
            for (slot, command), after in zip(asked.items(), pool.step(list(asked.items()))):
                turns[slot].append((now[slot].text, command, now[slot], after))
                now[slot] = after
                if after.done or len(turns[slot]) >= max_steps:
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


def rename(rng, animals=True):
    """A function that renames a ScienceWorld episode's boxes, rooms and (where their kind does not matter) animals, the
    same throughout its texts.

    >>> say = rename(random.Random(1))
    >>> say("Move it to the red box in the kitchen. Here you see a red box, a red wire and a dove egg.")
    'Move it to the green box in the art studio. Here you see a green box, a red wire and a butterfly egg.'
    """
    other = {}
    for names in [COLORS, ROOMS] + ([EGGS] if animals else []):
        other.update(zip(names, rng.sample(names, len(names))))
    box, name = "|".join(COLORS), "|".join(n for n in other if n not in COLORS)
    return lambda text: re.sub(rf"\b(?:({box})(?= box)|({name})\b)", lambda m: other[m[0]], text)


def expert_episodes(games, pool, chat, max_steps=20, progress=True, sloppy=0.0, seed=0, copies=1):
    """The expert's won episodes as `Episode`s: what the expert said counts as sampled, so losses apply as in RL.

    copies: ScienceWorld has few variations, and a policy learns them by heart; of each episode so many copies are made
    in which boxes, rooms and animals have other names. Then it must read what is meant.
    """
    remembered = {}

    def ids(text, make):
        if (text, make) not in remembered:
            remembered[text, make] = make(text)
        return remembered[text, make]

    def answer(command):
        return chat.tokenizer.encode(f"<action>{command}</action>", add_special_tokens=False) + [chat.eos]

    episodes, rng = [], random.Random(seed)
    games_played = play_expert(games, pool, max_steps, sloppy=sloppy, seed=seed)
    for game, turns, won in tqdm(games_played, total=len(games), desc="expert episodes", disable=not progress):
        if not won:
            continue
        for copy in range(copies):
            say = rename(rng, animals=game.task_type.startswith("find")) if copy else str
            episode = Episode(game, len(episodes), won=True, reward=1.0)
            for i, (observation, command, *_) in enumerate(turns):
                observation, command = say(observation), say(command)
                episode.give(chat.first_prompt(observation) if i == 0 else ids(observation, chat.next_prompt))
                start, new = len(episode.tokens), ids(command, answer)
                episode.sample(new, [0.0] * len(new))
                episode.steps.append(Step(start, start + len(new), command))
            episodes.append(episode)
    return episodes


def write_messages(games, pool, system, path, max_steps=50, sloppy=0.0, seed=0):
    """The expert's won episodes as a chat dataset, a JSON object a line: {"messages": [{"role", "content"}, ...], "game"}.

    The convention that TRL, axolotl, LLaMA-Factory and others read. Returns the number of episodes. The file appears
    whole or not at all; raises OSError.
    """
    count = 0
    with open(path + ".partial", "w") as file:
        for game, turns, won in play_expert(games, pool, max_steps, sloppy=sloppy, seed=seed):
            if not won:
                continue
            messages = [{"role": "system", "content": system}]
            for observation, command, *_ in turns:
                messages += [{"role": "user", "content": observation},
                             {"role": "assistant", "content": f"<action>{command}</action>"}]
            file.write(json.dumps({"messages": messages, "game": game.name}) + "\n")
            count += 1
    os.replace(path + ".partial", path)
    return count

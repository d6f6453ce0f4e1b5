"""What experts did (games/players.py) as training data: episodes for our cold start, or a chat dataset for any trainer.
"""

import json
import os
import random
import re
from collections import defaultdict

from tqdm import tqdm

from games.players import COLORS, EGGS, ROOMS, play_expert
from rollout import Episode, Step, judge


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

    Their steps are judged as a policy's are: a careless expert's slips are flawed steps of won episodes.

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
            episode = Episode(game, len(episodes), won=True, reward=1.0, score=turns[-1][3].score)
            tried, visited = defaultdict(set), {turns[0][2].state}
            for i, (observation, command, before, after) in enumerate(turns):
                observation, command = say(observation), say(command)
                episode.give(chat.first_prompt(observation) if i == 0 else ids(observation, chat.next_prompt))
                start, new = len(episode.tokens), ids(command, answer)
                episode.sample(new, [0.0] * len(new))
                episode.steps.append(Step(start, start + len(new), command))
                judge(episode.steps[-1], before, after, tried, visited)
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

"""What experts did (games/players.py) as training data: episodes for our cold start, or a chat dataset for
any trainer.
"""

import dataclasses
import json
import os
import random
import re
from collections import defaultdict

from tqdm import tqdm

from games.experts import FITS
from games.players import COLORS, EGGS, ROOMS, play_expert
from rollout import Episode, Step, corrected, judge
from support.corrections import obeyed, slips_of
from support.critiques import judging_messages
from support.tags import tagged, thoughts


@dataclasses.dataclass
class Demonstration(Episode):
    """An expert's episode, and what a critic says of each of its steps, where one was asked."""
    critiques: list = dataclasses.field(default_factory=list)  # (label, sentence); -1: no verdict


def rename(rng, animals=True):
    """A function that renames a ScienceWorld episode's boxes, rooms and (where their kind does not matter)
    animals, the same throughout its texts.

    >>> say = rename(random.Random(1))
    >>> say("Move it to the red box in the kitchen. Here you see a red box, a red wire and a dove egg.")
    'Move it to the green box in the art studio. Here you see a green box, a red wire and a butterfly egg.'
    """
    other = {}
    for names in [COLORS, ROOMS] + ([EGGS] if animals else []):
        other.update(zip(names, rng.sample(names, len(names))))
    box, name = "|".join(COLORS), "|".join(n for n in other if n not in COLORS)
    return lambda text: re.sub(rf"\b(?:({box})(?= box)|({name})\b)", lambda m: other[m[0]], text)


TOOLS = ["desklamp", "floorlamp", "fridge", "microwave", "sinkbasin"]  # a task needs this one and no other
OBJECTS = sorted(set().union(*FITS.values()) - set(TOOLS))
RECEPTACLES = sorted(set(FITS) - set(OBJECTS) - set(TOOLS))


def rename_house(rng):
    """A function that gives an ALFWorld episode's objects and receptacles other names and other numbers, the same
    throughout its texts; TOOLS, other numbers alone.

    >>> say = rename_house(random.Random(3))
    >>> say("On the desk 1, you see a mug 2, and a desklamp 1. Your task is to: put a clean mug in fridge.")
    'On the cabinet 25, you see a butterknife 12, and a desklamp 13. Your task is to: put a clean butterknife in fridge.'
    """
    other = {}
    for names in (OBJECTS, RECEPTACLES):
        other.update(zip(names, rng.sample(names, len(names))))
    numbers = defaultdict(lambda: [0] + rng.sample(range(1, 31), 30))  # of each kind; larger ones stay

    def renamed(found):
        name, number = found[1], int(found[2] or 0)
        return other.get(name, name) + (f" {numbers[name][number] if number <= 30 else number}" if number else "")

    return lambda text: re.sub(rf"\b({'|'.join([*other, *TOOLS])})\b(?: (\d+))?", renamed, text)


def said(tag, thought, command):
    """An answer's text.

    >>> said(None, "", "look"), said("monitor", "mug 1 is here.", "take mug 1 from bed 1")
    ('<action>look</action>', '<monitor>mug 1 is here.</monitor><action>take mug 1 from bed 1</action>')
    """
    return (tagged(tag, thought) if tag else "") + f"<action>{command}</action>"


def judged(turns):
    """The steps of an expert's turns with their flaws, as `rollout.play` judges a policy's; no tokens yet."""
    steps, tried, visited = [], defaultdict(set), {turns[0][2].state}
    for _, command, before, after, *_ in turns:
        steps.append(Step(0, 0, command))
        judge(steps[-1], before, after, tried, visited)
    return steps


def won_games(games, pool, max_steps, sloppy, seed, critic=None, correct=False, batch=64):
    """Yields (game, turns, steps, critiques, corrections) of the games that the expert wins.

    critic: from a list of (game, turns, steps) to a list with the (label, sentence)s of each; None: no
    critiques. correct: some episodes are played, and are to be shown, with instructions against flaws
    (support/corrections.py).
    """
    waiting = []

    def judge_them():
        said = critic(waiting) if critic else [[] for _ in waiting]
        for (game, turns, steps), critiques in zip(waiting, said):
            yield game, turns, steps, critiques, obeyed(game, seed, steps) if correct else ()
        waiting.clear()

    kinds = {"kinds": lambda game: slips_of(game, seed)} if correct else {}
    for game, turns, won in play_expert(games, pool, max_steps, sloppy=sloppy, seed=seed, **kinds):
        waiting += [(game, turns, judged(turns))] if won else []
        if len(waiting) == batch:
            yield from judge_them()
    yield from judge_them()


def expert_episodes(games, pool, chat, max_steps=20, progress=True, sloppy=0.0, seed=0, copies=1, critic=None,
                    correct=False, learn_slips=True):
    """The expert's won episodes as `Episode`s: what the expert said counts as sampled, so losses apply as in
    RL.

    Their steps are judged as a policy's are: a careless expert's slips (`sloppy`) are flawed steps of won
    episodes. Where `chat` is one with tags, each answer opens with one (support/tags.py). critic, correct: as
    in `won_games`.

    copies: a policy learns by heart what is where and what there is at all; of each episode so many copies are
    made in which things have other names (ScienceWorld: boxes, rooms and animals). Then it must read.
    learn_slips: False: a careless expert's slips stand in its episodes, and what it does after them is learnt; they
    themselves count as given, like observations.
    """
    remembered = {}

    def ids(text, make):
        if (text, make) not in remembered:
            remembered[text, make] = make(text)
        return remembered[text, make]

    def answer(text):
        return chat.tokenizer.encode(text, add_special_tokens=False) + [chat.eos]

    episodes, rng = [], random.Random(seed)
    played = won_games(games, pool, max_steps, sloppy, seed, critic, correct)
    for game, turns, steps, said_of, corrections in tqdm(played, total=len(games), desc="expert episodes",
                                                         disable=None if progress else True):
        chat.corrections = corrections
        openings = thoughts(game.env, turns) if chat.tags else [(None, "")] * len(turns)
        for copy in range(copies):
            say = str
            if copy:
                say = (rename_house(rng) if game.env == "alfworld" else
                       rename(rng, animals=game.task_type.startswith("find")))
            episode = Demonstration(game, len(episodes), won=True, reward=1.0, score=turns[-1][3].score,
                                    critiques=[(label, say(sentence)) for label, sentence in said_of])
            for i, (observation, command, _, _, slip) in enumerate(turns):
                observation, command = say(observation), say(command)
                episode.give(chat.first_prompt(observation) if i == 0 else ids(observation, chat.next_prompt))
                tag, thought = openings[i]
                start, new = len(episode.tokens), ids(said(tag, say(thought), command), answer)
                episode.sample(new, [0.0] * len(new)) if learn_slips or not slip else episode.give(new)
                episode.steps.append(dataclasses.replace(
                    steps[i], start=start, end=start + len(new), action=command, tag=tag))
            episodes.append(episode)
    chat.corrections = ()
    return episodes


def write_messages(games, pool, system, path, max_steps=50, sloppy=0.0, seed=0, tags=False, critic=None,
                   correct=False):
    """The expert's won episodes as a chat dataset, a JSON object a line: {"messages": [{"role", "content"},
    ...], "game"}.

    The convention that TRL, axolotl, LLaMA-Factory and others read. tags: each answer opens with one of
    RLVMR's. critic: as in `won_games`; after each episode come the conversations that ask about its steps, in
    both forms, as many about bad steps as about good ones, whichever are fewer. correct: as there; the
    instructions join the system prompt. Returns the number of episodes. The file appears whole or not at all;
    raises OSError, NoCritic.
    """
    count, rng = 0, random.Random(seed)
    try:
        with open(path + ".partial", "w") as file:
            write = lambda messages, game: file.write(
                json.dumps({"messages": messages, "game": game.name}) + "\n")
            played = won_games(games, pool, max_steps, sloppy, seed, critic, correct)
            for game, turns, _, said_of, corrections in played:
                messages = [{"role": "system", "content": corrected(system, corrections)}]
                openings = thoughts(game.env, turns) if tags else [(None, "")] * len(turns)
                for (observation, command, *_), (tag, thought) in zip(turns, openings):
                    messages += [{"role": "user", "content": observation},
                                 {"role": "assistant", "content": said(tag, thought, command)}]
                write(messages, game)
                count += 1
                for i in balanced_sample(rng, [label for label, _ in said_of]):
                    for conversation in judging_messages(messages[:2 * i + 3], *said_of[i]):
                        write(conversation, game)
        os.replace(path + ".partial", path)
    finally:
        if os.path.exists(path + ".partial"):
            os.remove(path + ".partial")
    return count


def balanced_sample(rng, labels):
    """Indices of as many 1s as 0s, all of the rarer kind, in order.

    >>> balanced_sample(random.Random(0), [1, 0, -1, 1, 1])
    [1, 3]
    """
    good, bad = ([i for i, label in enumerate(labels) if label == kind] for kind in (1, 0))
    count = min(len(good), len(bad))
    return sorted(rng.sample(good, count) + rng.sample(bad, count))

"""What a game is, and what the world answers: the types that everything else here is written in."""

from typing import NamedTuple


class Game(NamedTuple):
    """One task instance. Sorts, hashes and pickles small."""
    env: str
    split: str
    name: str
    task_type: str
    source: object  # ALFWorld: path of a game.tw-pddl, or seed of a generated house; ScienceWorld: (task, variation)


def most_steps(max_steps, games):
    """How many steps episodes of these games have together, one each; max_steps: a number for every game, or
    {task type: number} (`levels.max_steps`)."""
    return sum(max_steps[game.task_type] if isinstance(max_steps, dict) else max_steps for game in games)


class Observation(NamedTuple):
    text: str
    admissible: list        # of str, sorted; None where it is too dear to ask for at every step (ScienceWorld)
    state: int              # digest of the world's state: equal digests, equal states
    reward: float           # of this step; an episode's reward is their sum
    won: bool
    done: bool
    accepted: bool = True   # whether the world allowed the command that led here
    effect: bool = True     # whether that command changed anything (ScienceWorld: or told anything new)
    score: int = None       # ScienceWorld: 0 to 100, -100 after a fatal mistake


class BadGame(ValueError):
    """A game that cannot be played; the message names it."""

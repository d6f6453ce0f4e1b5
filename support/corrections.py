"""Prompt-based correction (`train.py --correct THRESHOLD`): an instruction against a flaw that has become
common.

A flaw that dominates hardly corrects itself (q near 1: the danger zone). An instruction in the prompt makes
another policy of the model, one that was shown to obey it, and so moves q back to where reward can tell.
After each iteration, by the flaw rates of its rollouts:

    above THRESHOLD      the instruction (rollout.CORRECTIONS) joins the system prompt of the next episodes
    up to THRESHOLD / 2  it goes; between the two nothing changes, so that it does not flicker

Each kind of flaw has its own instruction, and several may stand. Which stand is printed at each switch and
logged in metrics.jsonl (`correct_FLAW`: 1 where it stands in the *next* iteration), from where a resumed run
reads it. A run evaluates with the instructions that stand at that moment, none where none does, and a
checkpoint notes them, so that evaluate.py plays with the same; what a policy does without them shows once
they have gone.

A language model understands the instruction. Our tiny policies know no such words: `cold_start.py --correct`
shows them. In half of the expert's games some instructions are drawn; there the careless expert (`--sloppy`)
makes no slip of the kinds that they forbid. What it did has the last word: an instruction stands in an
episode's prompt only where no step has that flaw. In the other half there is none, and slips of all kinds.
"""

import random

from games.players import SLIPS
from rollout import CORRECTIONS, FLAWS, flaw_rates

CAUSES = {  # flaw -> the slips (games/players.py) that may cause it
    "malformed": (), "inadmissible": ("made up", "again"), "no_effect": ("idle", "again"),
    "repeated": ("again", "idle"), "revisited": ("wander",)}


# ------------------------------------------------------------------------------------------- in training

def standing(rates, before, threshold):
    """Which flaws have an instruction next, in the order of FLAWS. rates: {flaw: share of steps}; before:
    which had one.

    >>> rates = {"malformed": 0, "inadmissible": 0.31, "no_effect": 0.2, "repeated": 0.2, "revisited": 0.15}
    >>> standing(rates, ("repeated", "revisited"), threshold=0.3)
    ('inadmissible', 'repeated')
    """
    return tuple(name for name in FLAWS if rates[name] > (threshold / 2 if name in before else threshold))


def correct(run, episodes):
    """Choose the instructions of the next iteration by the flaws of this one's episodes; a line for each
    switch.

    Returns what metrics.jsonl keeps: {"correct_repeated": 1, ...}; without `--correct` nothing, and nothing
    changes.
    """
    if not run.args.correct:
        return {}
    rates, before = flaw_rates(episodes), run.chat.corrections
    run.chat.corrections = now = standing(rates, before, run.args.correct)
    for name in FLAWS:
        if (name in now) != (name in before):
            says = f"says from now on: {CORRECTIONS[name]}" if name in now else "no longer speaks of it"
            print(f"correct {name}: {100 * rates[name]:.0f}% of steps, the prompt {says}", flush=True)
    return {f"correct_{name}": int(name in now) for name in FLAWS}


def logged(row):
    """Which instructions stood after an iteration, from its line of metrics.jsonl.

    >>> logged({"iteration": 3, "correct_malformed": 0, "correct_repeated": 1})
    ('repeated',)
    """
    return tuple(name for name in FLAWS if row.get(f"correct_{name}"))


def check_taught(notes, folder):
    """Raises ValueError, one line, where a tiny policy was never shown the instructions.

    notes: of its folder (support.policies.notes_of).
    """
    if notes.get("prompt") == "short" and not notes.get("correct"):
        raise ValueError(f"--correct needs a policy that was shown the instructions, and {folder} was not: "
                         f"python cold_start.py --correct --sloppy 0.5 --init {folder} --out NEW, then "
                         "--model NEW")


# ------------------------------------------------------------------------------------- in the cold start

def asked_for(game, seed):
    """The flaws that an expert's episode is to avoid: none for half of the games, some for the others; by
    game and seed.

    >>> from games import levels
    >>> draws = [asked_for(levels.generated_game("train", s), seed=0) for s in range(400)]
    >>> 170 < sum(not flaws for flaws in draws) < 230, set().union(*draws) == set(FLAWS)
    (True, True)
    """
    rng = random.Random(f"{seed} corrections {game.name}")
    count = rng.choice([0, 0, 0, 1, 1, 2])
    return tuple(sorted(rng.sample(FLAWS, count), key=FLAWS.index))


def slips_of(game, seed):
    """What a careless expert may do in this game: the slips that `asked_for` leaves."""
    return tuple(kind for kind in SLIPS if not any(kind in CAUSES[name] for name in asked_for(game, seed)))


def obeyed(game, seed, steps):
    """The instructions for an episode's prompt: of those asked for, the ones that no step breaks."""
    return tuple(name for name in asked_for(game, seed) if not any(getattr(step, name) for step in steps))

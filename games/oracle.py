"""The oracle: labels from knowledge that no player has. Did this command bring the goal nearer?

    with EnvPool(2) as pool:
        for label, before, after in pool.oracle([game], [["go to desk 1", None, "look"]])[0]: ...

    label 1 (good)     the distance to the goal falls
    label 0 (bad)      it does not: no command (None), refused, without effect, a detour, a look into the wrong drawer
    label -1           not known
    before, after      commands to the goal; None where not known, inf where the goal is out of reach for good

It is for measuring (how often is a flawed action taken? do other labels agree?) and an upper bound in ablations. Mind that
who has to search must take steps that are bad here: the wrong drawer tells something and brings the goal no nearer.

**ALFWorld**: exact, see planner.py. Some houses have dead ends: a paper towel roll can be taken and nowhere be put down.
From there every label is -1; the step into it is bad.

**ScienceWorld** has no planner. It has one solution for each game ("gold path"), by an author who knows everything. Its
walks from room to room we replace by teleporting, as this simplification allows, and play it once; where it then fails,
the distance is not known. The distance is what is left of that plan from the player's room on. Limits:

* It is the length of *one* plan, which need not be shortest. Where several things would do ("find an animal") and the
  player takes another one, the distance is not known from there on; a step that then changes something has no label.
* A required subgoal reached is good, on the plan or off it. The rest of the score says little: the simulator also pays for
  optional goals, such as being in any new room, and those points alone make no step good.
* The player's place in the plan moves when its next command is carried out in the right room, or when the player sees
  what the plan would see further on. Whether the plan still works after detours is not checked at every step: support/
  label_table.py plays the rest from where episodes ended, and says how often it wins.
"""

import math

GOOD, BAD, UNKNOWN = 1, 0, -1
DEAD = "dead"  # in place of the rest of a plan: the game is lost for good


def oracle_labels(episodes, pool):
    """Labels of played episodes (`--labels oracle`): a list for each, 1 good, 0 bad, -1 unknown for each of its steps.

    episodes: of rollout.py; read are `game` and the steps' `action` (None: no command). pool: EnvPool; its own episodes end.
    """
    histories = [[step.action for step in episode.steps] for episode in episodes]
    answers = pool.oracle([episode.game for episode in episodes], histories)
    for answer in answers:
        if isinstance(answer, Exception):  # it has been played, so it can be: the games have changed meanwhile
            raise answer
    return [[found for found, _, _ in answer] for answer in answers]


def label(before, after, refused):
    """From the distances before and after a command, and whether there was none or the world refused it.

    >>> label(4, 3, False), label(4, 5, False), label(4, math.inf, False), label(None, 3, False), label(None, None, True)
    (1, 0, 0, -1, 0)
    >>> label(math.inf, math.inf, True)  # a dead end
    -1
    """
    if before == math.inf:
        return UNKNOWN
    if before is None or after is None:
        return BAD if refused else UNKNOWN
    return GOOD if after < before else BAD


def alfworld_labels(world, game, commands):
    """[(label, before, after), ...] for the commands of an episode; `world` is an ALFWorld. Raises BadGame."""
    now = world.reset(game)
    before, rows = world.distance(), []
    for command in commands:
        then = now if command is None else world.step(command)
        after = before if then.state == now.state else world.distance()
        rows.append((label(before, after, refused=then.state == now.state), before, after))
        now, before = then, after
    return rows


# -------------------------------------------------------------------------------------------------------- ScienceWorld

def plain(command):
    return " ".join(command.lower().split())


def rest_of_plan(plan, room):
    """The commands for a plan [(room, command), ...] from a room on.

    >>> rest_of_plan([("lab", "open box"), ("lab", "move egg to box")], "hall")
    ['teleport to lab', 'open box', 'move egg to box']
    """
    rest = []
    for there, command in plan:
        rest += [command] if there == room else [f"teleport to {there}", command]
        room = there
    return rest


plans = {}  # Game -> what gold_plan found


def gold_plan(world, game):
    """([(room, command), ...], {state: how many of them are done}): the gold path without its walks, up to the victory.

    The states are `Observation.state`, what the player sees. Both empty where the game is not won like this. Remembered.
    """
    if game not in plans:
        path = world.gold_path(game)
        now, plan, done = world.reset(game), [], 0
        room, states = world.room(), {now.state: 0}
        for command in path:
            if command.startswith("go to "):
                room = command.removeprefix("go to ")
            elif not command.startswith("open door to ") and command != "look around":
                plan.append((room, plain(command)))
        while done < len(plan) and not now.done:
            for command in rest_of_plan(plan[done:done + 1], world.room()):
                now = world.step(command)
            done += 1
            states.setdefault(now.state, done)
        plans[game] = (plan[:done], states) if now.won else ([], {})
    return plans[game]


def follow(world, game, commands):
    """Play an episode and say, at its start and after each command, (observation, required subgoals reached, the rest of
    the gold plan). The rest: a list of commands; None where it is not known; DEAD after a fatal mistake."""
    plan, states = gold_plan(world, game)
    now, room, reached, done = world.reset(game), world.room(), world.required_subgoals(), 0 if plan else None
    yield now, reached, rest_of_plan(plan, room) if plan else None
    for command in commands:
        now = now if command is None else world.step(command)
        before, reached = reached, world.required_subgoals()
        if states.get(now.state, -1) > (-1 if done is None else done):
            done = states[now.state]
        elif command and now.accepted and done is not None and plan[done:done + 1] == [(room, plain(command))]:
            done += 1
        elif reached > before:
            done = None  # in another way: where the plan would go on is not known
        room = world.room()
        if done == len(plan) and not now.won:
            done = None  # the plan is at its end and has not won
        yield now, reached, DEAD if now.score < 0 else [] if now.won else \
            None if done is None else rest_of_plan(plan[done:], room)


def science_labels(world, game, commands):
    """[(label, before, after), ...] for the commands of an episode; `world` is a ScienceWorld. Raises BadGame."""
    length = lambda rest: None if rest is None else math.inf if rest is DEAD else len(rest)
    trace, rows = list(follow(world, game, commands)), []
    for command, (_, had, rest), (now, has, left) in zip(commands, trace, trace[1:]):
        before, after = length(rest), length(left)
        found = label(before, after, refused=command is None or not now.accepted)
        rows.append((GOOD if has > had and left is not DEAD else found, before, after))
    return rows

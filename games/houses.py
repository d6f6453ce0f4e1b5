"""A seeded generator of small ALFWorld households, for machines without ALFWorld's data.

Each house is a PDDL problem in ALFWorld's own domain: the rooms' objects, what fits where and what can be
heated, cooled or cleaned come from ALFWorld's tables, the goals and task sentences from its goal library. The real
engine plays it like an official game. What is ours is only the layout: 5 to 8 receptacles instead of some 30.

The splits mean something:

* `train`, `valid_seen`  draw from the same kinds of house, with different seeds;
* `valid_unseen`         has a layout (set of receptacles) and a goal pair (object, destination) that no training
                         house ever shows, not even as a distractor: both are held out by a fixed hash.

>>> game = generate("train", 0)
>>> game["task_type"] in TASK_TYPES, sorted(game)
(True, ['grammar', 'name', 'pddl_domain', 'pddl_problem', 'task', 'task_type'])
>>> generate("train", 0) == game   # the seed is the game
True
"""

import functools
import os
import random
import tempfile
import zlib

# Where the official games would be (used by levels.py). Importing alfworld creates whatever folder the variable names,
# so a mistyped path would come into being, empty: let the import find one that exists.
ALFWORLD_DATA = os.environ.get("ALFWORLD_DATA") or os.path.expanduser("~/.cache/alfworld")
if not os.path.isdir(ALFWORLD_DATA):
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()

from alfworld.gen.constants import OPENABLE_CLASS_LIST, VAL_ACTION_OBJECTS, VAL_RECEPTACLE_OBJECTS  # noqa: E402
from alfworld.gen.goal_library import gdict  # noqa: E402
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH  # noqa: E402

# ALFWorld's numbering of its six task types, as in its configuration files.
TASK_TYPES = {
    "pick_and_place_simple": 1,
    "look_at_obj_in_light": 2,
    "pick_clean_then_place_in_recep": 3,
    "pick_heat_then_place_in_recep": 4,
    "pick_cool_then_place_in_recep": 5,
    "pick_two_obj_and_place": 6,
}
SPLITS = ("train", "valid_seen", "valid_unseen")

# room: (receptacles always there, receptacles to choose from, objects found there)
ROOMS = {
    "kitchen": (
        "CounterTop Fridge Microwave SinkBasin",
        "Cabinet Cabinet Drawer Drawer DiningTable GarbageCan Shelf StoveBurner SideTable",
        "Apple Bread ButterKnife Bowl Cup DishSponge Egg Fork Knife Ladle Lettuce Mug Pan Plate Pot Potato"
        " PepperShaker SaltShaker SoapBottle Spatula Spoon Tomato WineBottle Kettle Glassbottle",
    ),
    "bathroom": (
        "CounterTop SinkBasin Toilet",
        "Cabinet Cabinet Drawer BathtubBasin GarbageCan Shelf Cart SideTable Dresser",
        "Candle Cloth DishSponge HandTowel PaperTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper",
    ),
    "bedroom": (
        "Bed Desk",
        "Drawer Drawer Dresser SideTable Shelf GarbageCan ArmChair Safe Cabinet LaundryHamper",
        "AlarmClock BaseballBat BasketBall Book Bowl Box CD CellPhone Cloth CreditCard KeyChain Laptop Mug Pen Pencil"
        " Pillow TennisRacket TissueBox Vase Watch",
    ),
    "livingroom": (
        "CoffeeTable Sofa",
        "ArmChair Cabinet Cabinet DiningTable Drawer Dresser GarbageCan Ottoman Shelf SideTable Safe",
        "Book Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil Pillow Plate RemoteControl Statue"
        " TissueBox Vase Watch WateringCan",
    ),
}
TASK_ROOMS = {
    "pick_and_place_simple": tuple(ROOMS),
    "look_at_obj_in_light": ("bedroom", "livingroom"),
    "pick_clean_then_place_in_recep": ("kitchen", "kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
    "pick_two_obj_and_place": tuple(ROOMS),
}
# task: (what the object must allow, the receptacle that does it)
DEVICES = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
LAMP_HOLDERS = ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf")
HELD_OUT = 4  # one layout and one (object, receptacle) pair in this many is kept from training


def held_out(*names):
    """True if this layout or (object, receptacle) pair belongs to `valid_unseen` alone.

    crc32 rather than hash(): the same on every machine and in every process.
    """
    return zlib.crc32("/".join(names).encode()) % HELD_OUT == 0


def fits(obj, receptacle):
    return obj in VAL_RECEPTACLE_OBJECTS.get(receptacle, ())


def _draw_house(rng, split):
    """One attempt at a house; None where the draw contradicts itself (the caller draws again).

    Returns task type, target object type, destination (or "DeskLamp"), receptacle types, [(object, receptacle index)].
    """
    unseen = split == "valid_unseen"
    task = rng.choice(list(TASK_TYPES))
    room = rng.choice(TASK_ROOMS[task])
    always, optional, contents = (words.split() for words in ROOMS[room])
    receptacles = always + rng.sample(optional, rng.randint(5, 8) - len(always))
    if held_out(*sorted(receptacles)) != unseen:
        return None

    def allowed(obj, receptacle):
        """Training never shows a held-out pair; the unseen houses may show any."""
        return fits(obj, receptacle) and (unseen or not held_out(obj, receptacle))

    # The goal: an object and where it goes. In valid_unseen the pair itself is new.
    ability, device = DEVICES.get(task, (None, None))
    targets = [o for o in contents if ability is None or o in VAL_ACTION_OBJECTS[ability]]
    ends = ["DeskLamp"] if task == "look_at_obj_in_light" else sorted(set(receptacles) - {device})
    pairs = [(o, e) for o in targets for e in ends
             if (e == "DeskLamp" or fits(o, e)) and held_out(o, e) == unseen]
    if not pairs:
        return None
    target, end = rng.choice(pairs)

    placed = []
    for _ in range(2 if task == "pick_two_obj_and_place" else 1):
        homes = [i for i, r in enumerate(receptacles) if r != end and allowed(target, r)]
        if not homes:
            return None
        placed.append((target, rng.choice(homes)))
    if room in ("bedroom", "livingroom"):
        stands = [i for i, r in enumerate(receptacles) if r in LAMP_HOLDERS]
        if task == "look_at_obj_in_light" or rng.random() < 0.5:
            if not stands:
                return None
            placed.append(("DeskLamp", rng.choice(stands)))
    for obj in rng.sample([o for o in contents if o != target], rng.randint(4, 8)):  # distractors
        homes = [i for i, r in enumerate(receptacles) if allowed(obj, r)]
        for _ in range(1 if rng.random() < 0.8 else 2):
            if homes:
                placed.append((obj, rng.choice(homes)))
    return task, target, end, receptacles, placed


def _identifier(kind, number):
    """A name such as ALFWorld's own, e.g. `Sink_bar__plus_03_dot_00_..._bar_SinkBasin`.

    The demangler appends "basin" to whatever stands before the first `_bar_` if "basin" occurs anywhere in the name,
    so basins must carry the short name there.
    """
    place = f"_bar__plus_{number:02d}_dot_00_bar__plus_00_dot_00_bar__plus_00_dot_00"
    return f"{kind[:-5]}{place}_bar_{kind}" if kind.endswith("Basin") else kind + place


def _problem(task, target, end, receptacles, placed):
    """The house as a PDDL problem of ALFWorld's domain (closed containers are those not `opened`)."""
    kinds = [obj for obj, _ in placed]
    rooms = [_identifier(kind, i) for i, kind in enumerate(receptacles)]
    objects = [_identifier(kind, i) for i, kind in enumerate(kinds)]
    otypes = sorted({*kinds, "Knife", "ButterKnife", "DeskLamp", "Sink"})  # the domain names some of them itself
    rtypes = sorted({*receptacles, "SinkBasin", "Microwave", "Fridge"})
    declared = ["agent1 - agent", "loc_start - location"]
    declared += [f"{o}Type - otype" for o in otypes] + [f"{r}Type - rtype" for r in rtypes]
    declared += [f"loc_{i} - location" for i in range(len(rooms))]
    declared += [f"{name} - receptacle" for name in rooms] + [f"{name} - object" for name in objects]

    facts = ["atLocation agent1 loc_start"]
    for i, (name, kind) in enumerate(zip(rooms, receptacles)):
        facts += [f"receptacleType {name} {kind}Type", f"receptacleAtLocation {name} loc_{i}"]
        if kind in OPENABLE_CLASS_LIST:
            facts.append(f"openable {name}")
    facts += [f"canContain {r}Type {o}Type" for r in rtypes for o in otypes if fits(o, r)]
    for name, (kind, home) in zip(objects, placed):
        facts += [f"objectType {name} {kind}Type", f"inReceptacle {name} {rooms[home]}"]
        facts.append(f"objectAtLocation {name} loc_{home}")
        if kind != "DeskLamp":
            facts.append(f"pickupable {name}")
        if kind in VAL_RECEPTACLE_OBJECTS:
            facts.append(f"isReceptacleObject {name}")
        facts += [f"{ability.lower()} {name}" for ability in sorted(VAL_ACTION_OBJECTS)
                  if kind in VAL_ACTION_OBJECTS[ability]]
    # The library's template opens with the goal and closes the whole problem with a last bracket, for most tasks.
    goal = gdict[task]["pddl"].replace("#", "-").format(obj=target, recep=end, toggle=end).strip()
    goal += ")" * (goal.count("(") - goal.count(")") + 1)
    lines = "\n".join
    return (f"(define (problem house)\n(:domain alfred)\n(:objects\n{lines(declared)}\n)\n(:init\n"
            + lines(f"({fact})" for fact in facts) + f"\n)\n{goal}\n")


@functools.lru_cache(maxsize=None)
def _package_text(path):
    with open(path) as file:
        return file.read()


def generate(split, seed):
    """The game numbered `seed` of a split, as a dictionary that TextWorld's `PddlEnv.load` takes.

    Args:
        split: "train", "valid_seen" or "valid_unseen".
        seed: a whole number; the same seed gives the same game on every machine.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")  # a string seeds the same everywhere, unlike a tuple
    house = None
    while house is None:
        house = _draw_house(rng, split)
    task, target, end, receptacles, placed = house
    words = dict(obj=target.lower(), recep=end.lower(), toggle=end.lower())
    sentence = rng.choice(gdict[task]["templates"]).format(**words)
    return {
        "name": f"generated/{split}/{seed:06d}-{task}-{target}-{end}",
        "task_type": task,
        "task": sentence,
        "pddl_domain": _package_text(ALFRED_PDDL_PATH),
        "grammar": _package_text(ALFRED_TWL2_PATH).replace("UNKNOWN GOAL", sentence),
        "pddl_problem": _problem(*house),
    }

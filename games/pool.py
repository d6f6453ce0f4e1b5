"""Worker processes that play a batch of episodes, and survive what happens to worker processes.

    with EnvPool(workers=2) as pool:
        observations = pool.reset(games)                       # one episode per game, in slots 0, 1, ...
        observations = pool.step([(0, "look"), (1, "go to desk 1")])
        commands = pool.admissible([0])                        # where an Observation does not bring them

Processes and not threads: TextWorld's parsers are module globals. Requests and replies are pickles over pipes, so a
worker imports the environments alone, never the training script with its models.
"""

import os
import pickle
import select
import signal
import subprocess
import sys

from games.game import BadGame, Game

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STARTUP = 60.0  # seconds that a new worker may take to import the games' engine


def make_world(env):
    """A new environment that plays any game of `env`, one after the other. Imports its engine only now."""
    if env == "alfworld":
        from games.alfworld import ALFWorld
        return ALFWorld()
    from games.scienceworld import ScienceWorld
    return ScienceWorld()


def worker():
    """Serve pickled batches of requests on standard input until it closes. Started by EnvPool.

    A request is (slot, what): a Game (reset to it), a string (a command), or (method, argument, ...) of the world.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which finishes its write and closes us
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    worlds, env_of = {}, {}  # (env, slot) -> world; slot -> env
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        answers = []
        for slot, what in batch:
            game = what if isinstance(what, Game) else what[1] if what[0] in ("gold_path", "oracle") else None
            try:
                if game is not None:
                    env_of[slot] = game.env
                    if (game.env, slot) not in worlds:
                        worlds[game.env, slot] = make_world(game.env)
                world = worlds[env_of[slot], slot]
                if isinstance(what, Game):
                    answers.append(world.reset(what))
                elif isinstance(what, str):
                    answers.append(world.step(what))
                else:
                    answers.append(getattr(world, what[0])(*what[1:]))
            except BadGame as error:
                answers.append(error)
            except Exception as error:
                if type(error).__module__.startswith("py4j"):
                    # Without its Java machine this process is of no use. EnvPool replaces it and plays again.
                    sys.exit(f"pool.py: lost the Java machine ({type(error).__name__}: {error})")
                raise
        pickle.dump(answers, replies)
        replies.flush()


class EnvPool:
    """Plays a batch of episodes, one per slot, in worker processes (TextWorld's parsers are not thread-safe).

    A worker that dies or hangs is replaced, and its episodes are played again up to where they were, by repeating
    their commands: the games are deterministic, and the last observation is compared. `restarts` counts them.
    """

    def __init__(self, workers=2, timeout=120.0):
        self.timeout, self.restarts, self.size = timeout, 0, max(1, workers)
        self.history = {}  # slot -> [game, command, command, ...]
        self.last = {}     # slot -> latest Observation
        self.processes = [self._start() for _ in range(self.size)]
        self.owner = {}    # slot -> index of its worker

    def _start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "ENV_POOL_WORKERS": str(self.size)}
        command = [sys.executable, "-c", "from games.pool import worker; worker()"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                cwd=ROOT)

    def reset(self, games):
        """Start one episode per game, in slots 0, 1, ...; neighbours share a worker, so that a group shares its memory.

        Returns a list with an Observation, or the BadGame that its game caused, per slot.
        """
        self._assign(len(games))
        return self._ask(list(enumerate(games)))

    def step(self, commands):
        """`commands`: list of (slot, command). Returns the Observations in the same order."""
        return self._ask(list(commands))

    def admissible(self, slots):
        """The sorted admissible commands in these slots, a list for each."""
        return self._ask([(slot, ("admissible",)) for slot in slots])

    def gold_paths(self, games):
        """ScienceWorld's own solutions: for each game a list of commands, or the BadGame. Ends all episodes."""
        self._assign(len(games))
        return self._ask([(slot, ("gold_path", game)) for slot, game in enumerate(games)])

    def oracle(self, games, histories):
        """What games/oracle.py says of played episodes: for each a list of (label, distance before, distance after), one
        for each command of its history (None: an answer without one), or the BadGame. Ends all episodes."""
        answers, batch = [], 4 * self.size  # few at a time: a worker that says nothing for long is taken for dead
        for begin in range(0, len(games), batch):
            chunk = list(zip(games, histories))[begin:begin + batch]
            self._assign(len(chunk))
            answers += self._ask([(slot, ("oracle", game, list(history))) for slot, (game, history) in enumerate(chunk)])
        return answers

    def _assign(self, count):
        share = -(-count // len(self.processes))
        self.owner = {slot: slot // share for slot in range(count)}
        self.history = {slot: [] for slot in range(count)}

    def _ask(self, requests):
        by_worker = {}
        for slot, what in requests:
            by_worker.setdefault(self.owner[slot], []).append((slot, what))
        sent = {w: self._send(w, batch) for w, batch in by_worker.items()}  # all workers at once ...
        answers = {}
        for w, batch in by_worker.items():                                 # ... then wait for each
            reply = self._receive(w, patience=len(batch)) if sent[w] else None
            for _ in range(3):
                reply = self._revive(w, batch) if reply is None else reply
            if reply is None:
                raise RuntimeError(f"an environment worker died four times on {batch[0][1]!r}: see its output above")
            for (slot, what), answer in zip(batch, reply):
                answers[slot] = answer
                if isinstance(what, (Game, str)):
                    self.history[slot].append(what)
                    self.last[slot] = answer
        return [answers[slot] for slot, _ in requests]

    def _send(self, w, batch):
        try:
            pickle.dump(batch, self.processes[w].stdin)
            self.processes[w].stdin.flush()
            return True
        except OSError:  # a broken pipe: the worker is gone
            return False

    def _receive(self, w, patience):
        """The reply of worker w, or None if it died or says nothing for `timeout` + patience seconds."""
        pipe = self.processes[w].stdout
        if not select.select([pipe], [], [], self.timeout + patience)[0]:  # only its first byte can hang
            return None
        try:
            return pickle.load(pipe)
        except (EOFError, pickle.UnpicklingError, OSError):
            return None

    def _revive(self, w, batch):
        """Replace a dead worker, play its unfinished episodes again, and repeat the request that it died on."""
        self.restarts += 1
        self._stop(self.processes[w])
        self.processes[w] = self._start()
        for slot, past in self.history.items():
            if self.owner[slot] == w and past and not getattr(self.last[slot], "done", True):
                if not self._send(w, [(slot, what) for what in past]):
                    return None
                replay = self._receive(w, patience=STARTUP)
                if replay is None:
                    return None
                if replay[-1] != self.last[slot]:
                    raise RuntimeError(f"{past[0].name} did not replay to the same observation after a worker's death")
        return self._receive(w, patience=STARTUP) if self._send(w, batch) else None

    @staticmethod
    def _stop(process):
        process.kill()
        process.wait()
        process.stdout.close()
        try:
            process.stdin.close()
        except OSError:  # it died with a request half-written, which closing tries to send
            pass

    def close(self):
        for process in self.processes:
            self._stop(process)
        self.processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

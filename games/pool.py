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
PLANNING = 60.0  # and the simulator to solve one of its longest tasks


def make_world(env):
    """A new environment that plays any game of `env`, one after the other. Imports its engine only now."""
    if env == "alfworld":
        from games.alfworld import ALFWorld
        return ALFWorld()
    from games.scienceworld import ScienceWorld
    return ScienceWorld()


def game_of(what):
    """The game that a request loads, or None."""
    return what if isinstance(what, Game) else what[1] if what[0] in ("gold_path", "oracle") else None


def worker():
    """Serve pickled batches of requests on standard input until it closes. Started by EnvPool.

    A request is (slot, what): a Game (reset to it), a string (a command), ("make", env) to make its world, or
    (method, argument, ...) of that world.
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
            game = game_of(what)
            try:
                if game or what[0] == "make":
                    env_of[slot] = env = game.env if game else what[1]
                    if (env, slot) not in worlds:
                        worlds[env, slot] = make_world(env)
                world = worlds[env_of[slot], slot]
                if isinstance(what, Game):
                    answers.append(world.reset(what))
                elif isinstance(what, str):
                    answers.append(world.step(what))
                else:
                    answers.append(None if what[0] == "make" else getattr(world, what[0])(*what[1:]))
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
    A broken game may kill its worker (ALFWorld's planner is a native library, and exits). So a batch that a
    worker died on is asked again one request at a time; what kills two more by itself is a BadGame, for good.
    """

    def __init__(self, workers=2, timeout=120.0):
        self.timeout, self.restarts, self.size = timeout, 0, max(1, workers)
        self.history = {}  # slot -> [game, command, command, ...]
        self.last = {}     # slot -> latest Observation
        self.processes = [self._start() for _ in range(self.size)]
        self.owner = {}    # slot -> index of its worker
        self.deadly = {}   # Game -> the BadGame that is its answer: it kills whoever plays it

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
        """`commands`: list of (slot, command). Returns an Observation each; BadGame where a game broke."""
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
        answers, by_worker = {}, {}
        for slot, what in requests:
            if game_of(what) in self.deadly:
                answers[slot] = self.deadly[game_of(what)]
            else:
                by_worker.setdefault(self.owner[slot], []).append((slot, what))
        sent = {w: self._send(w, batch) for w, batch in by_worker.items()}  # all workers at once ...
        for w, batch in by_worker.items():                                 # ... then wait for each
            reply = self._receive(w, batch) if sent[w] else None
            if reply is None:
                self._revive(w)
            for i, (slot, what) in enumerate(batch):
                answers[slot] = reply[i] if reply is not None else self._alone(w, slot, what)
                if isinstance(what, (Game, str)):  # what a broken game was asked is never asked again
                    self.last[slot] = answers[slot]
                    self.history[slot].append(what)
                    if isinstance(answers[slot], BadGame):
                        self.history[slot] = []
        return [answers[slot] for slot, _ in requests]

    def _alone(self, w, slot, what):
        """The answer to one request of a batch that a worker died on; BadGame where it kills two more."""
        game = game_of(what) or self.history[slot][0]
        for _ in range(2):
            if game in self.deadly:  # as another episode of its group has shown
                return self.deadly[game]
            reply = self._exchange(w, [(slot, what)])
            if reply is not None:
                return reply[0]
            self._revive(w)
        if self._exchange(w, [(slot, ("make", game.env))]) is None:
            raise RuntimeError(f"workers of {game.env} die before they play anything: see their output above")
        at = f" at {what!r}" if isinstance(what, str) else ""
        self.deadly[game] = BadGame(f"{game.name}: kills or hangs the process that plays it{at}")
        return self.deadly[game]

    def _exchange(self, w, batch):
        return self._receive(w, batch, patience=STARTUP) if self._send(w, batch) else None

    def _send(self, w, batch):
        try:
            pickle.dump(batch, self.processes[w].stdin)
            self.processes[w].stdin.flush()
            return True
        except OSError:  # a broken pipe: the worker is gone
            return False

    def _receive(self, w, batch, patience=0.0):
        """The reply of worker w, or None if it died or says nothing for too long a time."""
        pipe = self.processes[w].stdout
        patience += self.timeout + sum(PLANNING if what[0] == "gold_path" else 1.0 for _, what in batch)
        if not select.select([pipe], [], [], patience)[0]:  # only its first byte can hang
            return None
        try:
            return pickle.load(pipe)
        except (EOFError, pickle.UnpicklingError, OSError):
            return None

    def _revive(self, w):
        """Replace a dead worker, and play its unfinished episodes again."""
        for _ in range(3):
            self.restarts += 1
            self._stop(self.processes[w])
            self.processes[w] = self._start()
            if all(self._replay(w, slot) for slot in self.history if self.owner[slot] == w):
                return
        raise RuntimeError("a worker died three times, playing its episodes again: see its output above")

    def _replay(self, w, slot):
        """Bring a slot of a new worker to where it was. False if the worker died again."""
        past = self.history[slot]
        if not past or getattr(self.last[slot], "done", True):
            return True
        reply = self._exchange(w, [(slot, what) for what in past])
        if reply is not None and reply[-1] != self.last[slot]:
            raise RuntimeError(f"{past[0].name} did not replay to the same observation in a new worker")
        return reply is not None

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

"""What coupling.py needs around its instruments: a policy's episodes, an optimizer's moments, arguments."""

import os
import re
from types import SimpleNamespace

import torch
from tqdm import tqdm

from classifier_loss import flaw_labels
from credit import CREDIT
from games import levels
from grpo import token_weights
from rollout import play
from support.batches import lay_out
from support.coupling_report import read_lines, write_lines
from support.flags import flags_as_trained, make_parser
from support.language_models import model_folder
from support.policies import load_policy, notes_of
from support.setup import ADAMW


def as_run(args, model, bar, **more):
    """What coupling.py hands around: the model, a bar that is told of every part done (tqdm's, or None), and
    more."""
    return SimpleNamespace(args=args, model=model, bar=bar or tqdm(disable=True), **more)


def collect(args, engine, chat, pool, games, seed, bar):
    """Every game `--group-size` times, some `--batch` episodes side by side; an episode's group is its game's
    number. Raises ValueError, one line."""
    episodes, portion = [], max(1, args.batch // args.group_size)
    for begin in range(0, len(games), portion):
        played, report = play(engine, pool, chat, games[begin:begin + portion], args.group_size,
                              args.max_steps, args.max_context, seed + begin, args.show_actions)
        for episode in played:
            episode.group += begin
            if not episode.steps:
                raise ValueError(f"--max-context {args.max_context} is too small for a first prompt and one "
                                 "answer")
        for line in report["bad_games"]:
            bar.write(f"skipped: {line}")
        episodes += played
        bar.update()
    return episodes


def prepare(args, chat, episodes):
    """Episodes as a Batch with advantages and token weights, and the (N,) mask of their actions' tokens."""
    batch, known, mask = lay_out(episodes), {}, []
    batch.labels = flaw_labels(batch.flawed)                                                    # (S,)
    batch.advantages = CREDIT[args.credit](episodes, args.advantage == "std", batch.labels)     # (S,)
    episode_of_token = batch.episode_of_step[batch.step_of_token]
    batch.token_weights = token_weights(batch.step_of_token, episode_of_token, args.weighting)  # (N,), sum 1
    for episode in episodes:
        for step in episode.steps:
            ids = tuple(episode.tokens[step.start:step.end])
            known[ids] = known.get(ids) or content(chat, list(ids))
            mask += known[ids]
    return batch, torch.tensor(mask, dtype=torch.float64)


def content(chat, ids):
    """Which tokens of an answer are the action itself, those between its tags; where there is not exactly one
    action, all but the end of turn. A list of bools."""
    decode = chat.tokenizer.decode
    found = list(re.finditer(r"<action>(.*?)</action>", decode(ids), flags=re.DOTALL))
    if len(found) != 1 or not found[0][1].strip():
        return [token != chat.eos for token in ids]
    edges = [len(decode(ids[:i])) for i in range(len(ids) + 1)]  # a token may hold a tag's end and more
    begin, end = found[0].span(1)
    return [left < end and right > begin for left, right in zip(edges, edges[1:])]


def as_adam_will(states):
    """A function from a batch's whole gradient G (tensors like the parameters) to the second moments that Adam's
    step along it divides by, bias corrected: G itself joins them first. (Without it a weight whose moments had
    faded, of a rare name's embedding, went any distance.) The run's clipping is left out.

    states: of each parameter (exp_avg_sq, steps so far); None for one that is not trained."""
    beta = ADAMW["betas"][1]

    def moments(G):
        known = [(torch.zeros_like(g), 0) if one is None else one for g, one in zip(G, states)]
        return [(beta * v.to(g.device) + (1 - beta) * g**2) / (1 - beta ** (steps + 1)) for g, (v, steps) in zip(G, known)]
    return moments


def checkpoint_moments(folder, model):
    """`as_adam_will` with the second moments that training left in a checkpoint's trainer.pt. None where there
    are none of these weights: no such file, or one of LoRA's additions."""
    path, parameters = os.path.join(folder, "trainer.pt"), list(model.parameters())
    if not os.path.exists(path):
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]
        state = saved["state"] if saved else {}  # cold_start.py's has none
    except Exception as error:  # a truncated file makes torch raise all sorts of things
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): without that file Adam's second "
                         "moments are estimated") from error
    if any(i not in state or state[i]["exp_avg_sq"].shape != p.shape for i, p in enumerate(parameters)):
        return None
    return as_adam_will([(state[i]["exp_avg_sq"], float(state[i]["step"])) for i in range(len(parameters))])


class KeptRows:
    """results.jsonl: each row is written when it is there, so that a command that was stopped goes on. Rows
    of other settings wait in results.old.jsonl until a command has theirs again; those of another policy in the
    same folder, or of other games, are replaced."""

    FREE = {"model", "out", "report", "draws", "after", "probes", "probe_count", "workers", "micro_tokens"}

    def __init__(self, path, args):
        """args: of this command; but for those that are FREE to differ, a row's must be the same."""
        self.path, self.settings = path, self._settings(vars(args))
        aside = os.path.splitext(path)[0] + ".old.jsonl"
        there, parts = read_lines(path) + read_lines(aside), ([], [])
        for row in there:
            parts[self._settings(row.get("args", {})) == self.settings].append(row)
        others, self.rows = parts
        if others or os.path.exists(aside):  # in this order: whatever happens in between, no row is lost
            write_lines(path, there)
            write_lines(aside, others)
            write_lines(path, self.rows)

    def _settings(self, args):
        args = {"held_out": "train"} | args  # rows from before there was a choice
        return {name: value for name, value in args.items() if name not in self.FREE}

    def find(self, about, games):
        """The row of this policy (`about`: its folder, weights, draw, seed) on these games; None: to be
        measured."""
        names = {game.name for game in games}
        for row in self.rows:
            if about.items() <= row.items() and set(sum(row["games"], [])) <= names:  # bad games were skipped
                return row
        return None

    def add(self, row):
        """A row that was measured, in place of one of the same draw, or of what lay in this folder before."""
        same = lambda old: old["model"] == row["model"] and (
            old["draw"] == row["draw"] or old["weights"] != row["weights"])
        self.rows = [old for old in self.rows if not same(old)] + [row]
        write_lines(self.path, self.rows)


def parse_arguments():
    parser, group = make_parser("Measure the gradient coupling of policies.")
    flag = group("most used")
    flag("--model", action="append", required=True, help="(needed) `smollm2`, a folder, hub name or .gguf file; "
         "several are paired: measured on the same games")
    flag("--draws", type=int, help="how often, each time on games and samples of its own; 0: --probes alone "
         f"(default 1; {LARGE_SAID} 3)")
    flag("--episodes", type=int, help="per draw; half of the games give the gradients, the others are held out "
         f"(default 256; {LARGE_SAID} 32)")
    flag("--probes", metavar="FILE", help="measure kernel and representation, too, on the probes in this "
         "file; where there is none, it is made")
    flag("--out", default="runs/coupling", help="folder for results and pictures; a command that was stopped goes on "
         "there (with --report each draw is measured again)")
    flag("--report", metavar="FILE", help="write a page to look at: tables, pictures, probes, held-out steps")
    flag = group("what is measured")
    flag("--group-size", type=int, default=8, help="episodes per game (G)")
    flag("--blocks", type=int, help="of games whose gradients are taken apart, for one draw's intervals (default "
         f"8, or as many as there are groups; {LARGE_SAID} 1 with several draws)")
    flag("--step", type=float, default=1e-3, help="by how many nats a step changes held-out log pi (root "
         "mean square)")
    flag("--no-adam", action="store_true", default=None, help="the plain gradient alone: half the forward passes "
         f"(default {LARGE_SAID})")
    flag("--adam", action="store_false", dest="no_adam", default=None, help="through Adam's second moments, too "
         "(default otherwise)")
    flag("--probe-count", type=int, default=256, help="of a new file of probes")
    flag("--after", nargs="+", metavar="RUN", default=[], help="folders of train.py's runs that began with "
         "the first --model: what became of each flaw, against its ratio at the start")
    flag = group("as in training")
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--level", default="L1", choices=levels.LEVELS, help="whose training games are played (probes: "
         "whose test games)")
    flag("--held-out", default="train", choices=["train", "test"], help="flaws are read in other training games, "
         "or in the level's test games: with --level L2 in kinds of task that the gradient has not seen")
    flag("--games", default="auto", choices=["auto", "official", "generated"], help="ALFWorld's")
    flag("--task-types", nargs="+", help="these only (default: all; `short` for tiny policies of ours in "
         "ScienceWorld)")
    flag("--max-steps", type=int, help="steps per episode (default as train.py)")
    flag("--credit", default="grpo", choices=list(CREDIT), help="from outcomes to advantages: credit.py")
    flag("--advantage", default="std", choices=["std", "mean"], help="divide by the group's std, or only "
         "subtract its mean")
    flag("--weighting", default="token", choices=["token", "step", "episode"], help="what counts equally in "
         "the loss")
    flags_as_trained(flag)
    flag = group("the run")
    flag("--batch", type=int, default=64, help="episodes played side by side")
    flag("--micro-tokens", type=int, default=3072, help="padded tokens per forward pass: memory, never the "
         "result")
    flag("--workers", type=int, default=os.cpu_count(), help="environment processes")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--seed", type=int, default=0, help="of games and sampling")
    # Float32 and PyTorch, since differences of nearly equal numbers are read.
    parser.set_defaults(engine="torch", precision="float32", shard=False, engine_memory=0.9,
                        tensor_parallel=1)
    args = parser.parse_args()
    for name in ("episodes", "blocks", "batch", "micro_tokens", "workers", "probe_count", "max_steps", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.group_size < 2:
        parser.error("--group-size must be at least 2: an advantage compares episodes of one game")
    if not args.step > 0:
        parser.error("--step must be positive")
    folder = os.path.dirname(os.path.abspath(args.report or args.out))
    if args.report and os.path.isdir(args.report):
        parser.error(f"--report {args.report} is a folder: name a file, such as {os.path.join(args.report, 'report.html')}")
    if args.report and not os.path.isdir(folder) and folder != os.path.abspath(args.out):  # that one will be made
        parser.error(f"--report {args.report}: there is no folder {os.path.dirname(args.report)}")
    if len(set(args.model)) < len(args.model):
        parser.error("--model: the same one twice")
    return args


LARGE = 20_000_000  # parameters; with more a processor takes hours for what takes a tiny policy two minutes
LARGE_SAID = "for language models on a CPU"


def settle(args, parameters):
    """How much is measured where nothing was said, in place, by the size of the largest model: meant to end
    within some 15 minutes on two cores. Raises ValueError where that or what was said makes no sense."""
    large, given = parameters > LARGE and args.device == "cpu", lambda name: getattr(args, name, None) is not None
    pair = 2 * args.group_size
    args.draws = args.draws if given("draws") else 3 if large else 1
    args.episodes = args.episodes if given("episodes") else 2 * pair if large else 256
    fitting = 1 if large and args.draws > 1 else min(8, args.episodes // pair)
    args.blocks = args.blocks if given("blocks") else fitting
    args.no_adam = args.no_adam if given("no_adam") else large
    if args.draws < 0 or (args.draws == 0 and not args.probes):
        raise ValueError("--draws must be at least 1, or 0 with --probes")
    if not args.draws and args.after:
        raise ValueError("--after needs --draws")
    if args.episodes % pair or args.episodes < pair * max(1, args.blocks):
        raise ValueError(f"--episodes {args.episodes}: must be a multiple of {pair}, two halves of whole groups, "
                         f"and at least {pair * max(1, args.blocks)}, a group for each of --blocks")
    if args.blocks < 1 + (args.draws == 1):
        raise ValueError("--blocks must be at least 2 for one draw, whose interval resamples them")
    if large and args.draws:
        print(f"{parameters / 1e6:.0f} million parameters on a CPU: {args.draws} draws of {args.episodes} episodes, "
              "plain gradient" + ("" if args.no_adam else " and Adam") + " (more: --draws, --episodes, --adam)", flush=True)


def choose_games(args):
    """Resolve what is automatic, in place; returns the games of all draws, none of them twice: for each draw those
    that give the gradients, then as many held out. Raises FileNotFoundError or ValueError, one line."""
    args.device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # All are opened: a mistyped one is told now, not after hours of measuring the others.
    settle(args, max(load_policy(model_folder(folder))[0].num_parameters() for folder in args.model))
    kind = levels.choose_games(args.games, args.env)
    ours = all(notes_of(folder).get("prompt") == "short" for folder in args.model)
    args.task_types = args.task_types or (["short"] if ours and args.env == "scienceworld" else None)
    args.max_steps = args.max_steps or levels.level_max_steps(args.env, args.level, kind, args.task_types)
    half = args.episodes // args.group_size // 2
    if args.held_out == "train":
        return _drawn(args, "train", 2 * half)
    first, held_out = _drawn(args, "train", half), _drawn(args, "test", half)
    return [game for d in range(0, args.draws * half, half) for game in first[d:d + half] + held_out[d:d + half]]


def _drawn(args, part, count):
    """`count` games for each draw of the level's "train" or "test", none of them twice. Raises ValueError."""
    games, does = levels.level_games(args.env, args.level, part, args.games, args.task_types), part + "s"
    if args.draws * count > len(games):
        raise ValueError(f"{args.draws} draws of {count} games each, and level {args.level} {does} on "
                         f"{len(games)} only: fewer --draws or --episodes")
    return levels.sample_games(games, args.draws * count, args.seed)

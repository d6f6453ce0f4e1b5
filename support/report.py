"""The report page: episodes, and everything known of their steps, in one HTML file that needs nothing else.

    python evaluate.py --model runs/.../checkpoint-000032 --report report.html            # add --oracle for its verdicts
    python evaluate.py --compare A B --report both.html                                   # the same games side by side

train.py writes one into the run's folder when it ends. `describe` turns played episodes into a *set*: a dictionary of plain
data; `write_report` puts sets, metrics and further sections into report.html, beside this file, the one template. What a
model or a game has written is data there and never markup: it goes into the page as JSON in which `<` is escaped, and from
there to the screen as text.
"""

import base64
import json
import math
import os

import torch

from credit import CREDIT
from rollout import FLAWS
from support.batches import forward, lay_out, make_question, micro_batches
from support.checkpoints import write_atomically
from support.controls import CONTROLS
from support.labels import LABELS
from support.logs import machine
from support.processes import is_sharded

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")


# ------------------------------------------------------------------------------------------------ what is known of a step

def texts(episode, chat):
    """What was read and what was answered: a list of (observation, answer) for an episode's steps, decoded from its tokens.

    Of the template's marks around an observation those are left out that stand around any text: around "a" as around "b".
    """
    decode = chat.tokenizer.decode
    marks = {}
    for kind, render in ((None, chat.first_prompt), (True, lambda text: chat.next_prompt(text, True)),
                         (False, lambda text: chat.next_prompt(text, False))):
        one, other = decode(render("a")), decode(render("b"))
        marks[kind] = (os.path.commonprefix([one, other]), os.path.commonprefix([one[::-1], other[::-1]])[::-1])
    found, begin = [], 0
    for step in episode.steps:
        before, after = marks[None if begin == 0 else episode.tokens[begin - 1] == chat.eos]
        text = decode(episode.tokens[begin:step.start])
        if text.startswith(before) and text.endswith(after):
            text = text[len(before):len(text) - len(after)]
        found.append((text, decode(episode.tokens[step.start:step.end])))
        begin = step.end
    return found


@torch.no_grad()
def chances(model, episodes, value_head=None, head_layer=-1, question=None, max_tokens=8192):
    """The classifier's probabilities that each step's action is good: {"head": (S,), "words": (S,)}, lists of floats.

    head: sigmoid of the value head's output. words: of the generative classifier, P("good") / (P("good") + P("bad")) by the
    words' first tokens. Each is there where `value_head` or `question` is. Both were trained on balanced classes: 0.5 is
    where they cannot tell, however common flaws are.
    """
    found = {"head": {}, "words": {}}  # episode's number -> list
    model.eval()
    for micro in micro_batches(episodes, max_tokens) if value_head or question else []:
        chosen = [episodes[e] for e in micro]
        ends = [[step.end for step in episode.steps] for episode in chosen]
        branches = None
        if question:  # which verdict continues the branch does not matter to the logits before it
            branches = [[(end, question.prompts[e.tokens[end - 1] == question.eos], question.verdicts[1])
                         for end in own] for e, own in zip(chosen, ends)]
        out = forward(model, [e.tokens for e in chosen], [e.sampled for e in chosen], branches=branches,
                      value_head=value_head, action_ends=ends, head_layer=head_layer)
        rows = {}
        if value_head:
            rows["head"] = torch.sigmoid(out["values"])                                                 # (s,)
        if question:
            good, bad = (out["verdict_logits"][:, question.verdicts[label][0]] for label in (1, 0))
            rows["words"] = torch.sigmoid(good.float() - bad.float())                                   # (s,)
        for name, row in rows.items():
            found[name] |= dict(zip(micro, (part.tolist() for part in row.cpu().split([len(own) for own in ends]))))
    return {name: [p for e in range(len(episodes)) for p in rows[e]] for name, rows in found.items() if rows}


def describe(name, episodes, chat, summary, about="", **columns):
    """Played episodes as a set of the page: plain data.

    Args:
        name: of the set, e.g. "L1". about: a line on how it was played.
        summary: `evaluate.summarize` of the episodes, with intervals, or with low and high None.
        columns: (S,) lists in the order episode, then step, each left out where it is not known: `label` 1, 0, -1;
            `oracle` (label, distance before, distance after); `head`, `words`: probabilities; `advantage`; `leak`, `own`: of
            coupling.py.
    """
    known = {key: iter(values) for key, values in columns.items() if values is not None}
    rows = []
    for episode in episodes:
        steps = []
        for step, (observation, answer) in zip(episode.steps, texts(episode, chat)):
            steps.append({
                "observation": observation, "answer": answer, "action": step.action, "tag": step.tag,
                "flaws": [i for i, flaw in enumerate(FLAWS) if getattr(step, flaw)],
                "logprob": round(sum(episode.logprobs[step.start:step.end]), 4),
                **{key: next(values) for key, values in known.items()}})
        rows.append({"game": episode.game.name, "task": episode.game.task_type, "group": episode.group, "won": episode.won,
                     "score": episode.score, "reward": episode.reward, "truncated": episode.truncated, "steps": steps})
    rates = {key: value for key, value in summary.items() if key not in ("tasks", "played", "bad_games", "skipped")}
    return {"name": name, "about": about, "summary": {**rates, "tasks": summary["tasks"]}, "episodes": rows}


# ------------------------------------------------------------------------------------------------ of a checkpoint, of a run

def check(args):
    """Before anything is played: can the page be written, and are there episodes of a policy to show? Raises ValueError.

    args: evaluate.py's."""
    saved = [one for one in args.compare or [] if one.endswith(".json")]
    if args.report and (saved or args.agent != "model"):
        raise ValueError(f"--report shows a checkpoint's steps: {saved[0] if saved else args.agent} has none")
    if args.report and not os.path.isdir(os.path.dirname(os.path.abspath(args.report))):
        raise ValueError(f"--report {args.report}: there is no folder {os.path.dirname(args.report)}")
    if args.oracle and not args.report:
        raise ValueError("--oracle goes with --report: its verdicts are shown there")


def value_head_of(checkpoint):
    """The value head that stands beside a checkpoint, in its trainer.pt; None where there is none."""
    trainer = os.path.join(checkpoint, "trainer.pt")
    weights = os.path.exists(trainer) and torch.load(trainer, map_location="cpu", weights_only=True, mmap=True)["value_head"]
    if not weights:
        return None
    head = torch.nn.Linear(weights["weight"].shape[1], 1)
    head.load_state_dict(weights)
    return head


def of_checkpoint(name, args, engine, chat, pool, episodes, result):
    """The set of an evaluated checkpoint, and the metrics of its run: (set, rows of metrics.jsonl).

    Labels are the flaws'. The classifier is the one that stands beside the checkpoint (trainer.pt; the run's config.json
    says whether the question was trained): absent where there is none. args: evaluate.py's.
    """
    from support.policies import load_policy
    played = [episode for episode in episodes if episode.steps]
    config, rows = run_of(name)
    head, question = None, make_question(chat) if config.get("classifier") in ("generative", "both") else None
    if config.get("classifier") in ("value", "both"):
        head = value_head_of(name)
    found = {}
    if head or question:
        model = getattr(engine, "model", None) or load_policy(name, args.device)[0]
        found = chances(model, played, head and head.to(model.device), config.get("head_layer", -1), question)
    oracle = None
    if args.oracle:
        answers = pool.oracle([e.game for e in played], [[step.action for step in e.steps] for e in played])
        for answer in answers:
            if isinstance(answer, Exception):  # it has been played, so it can be: the games have changed meanwhile
                raise answer
        oracle = [(label, *("never" if d == math.inf else d for d in far)) for answer in answers for label, *far in answer]
    about = (f"{result['split'] or result['level']} of {args.env}, {result['games_from']} games, each played once, seed "
             f"{args.seed}, temperature {args.temperature:g}; labels by flaws; no groups, hence no advantages")
    labels = [int(not step.flawed) for episode in played for step in episode.steps]
    near = os.path.relpath(name)
    name = near if os.path.isdir(name) and not near.startswith("..") else name
    return describe(name, played, chat, result, about, label=labels, oracle=oracle, **found), rows


def report_evaluation(args, shown, said):
    """evaluate.py's page. shown: (set, rows) of each checkpoint; said: the comparison of two as text, or ""."""
    (first, rows), *rest = shown
    if not rest:
        return write_report(args.report, first["name"], [first], rows, facts_of(args))
    for letter, (one, _) in zip("AB", shown):
        one["about"], one["name"] = f"{one['name']}: {one['about']}", letter
    sets = [one for one, _ in shown]
    write_report(args.report, "A and B on the same games", sets, facts=facts_of(args), compared=said)


def run_of(checkpoint):
    """(config, rows of metrics.jsonl) of the run that a checkpoint lies in; ({}, []) where it lies in none."""
    folder = os.path.dirname(os.path.abspath(checkpoint))
    try:
        with open(os.path.join(folder, "config.json")) as config, open(os.path.join(folder, "metrics.jsonl")) as metrics:
            return json.load(config), [json.loads(line) for line in metrics]
    except (OSError, ValueError):
        return {}, []


def report_run(run, iteration, episodes, summary):
    """report.html in the run's folder: the last evaluation, and the last iteration's episodes, which are whole groups.

    The policy that the classifier's probabilities are of is the one after the last update; log-probabilities are those of
    the sampling. summary: `evaluate.summarize` of the episodes.
    """
    args, sets = run.args, []
    judged = lambda some: {} if is_sharded(run.model) else chances(  # its weights are spread: no pass of one process
        run.model, some, run.value_head, args.head_layer, run.question, args.micro_tokens)
    for level, (result, played) in run.evaluated.items():
        played = [episode for episode in played if episode.steps]
        labels = [int(not step.flawed) for episode in played for step in episode.steps]
        about = f"the level's test games after iteration {iteration}, each played once: no groups, hence no advantages"
        sets.append(describe(f"{level}, test", played, run.chat, result, about, label=labels, **judged(played)))
    batch, std = lay_out(episodes), args.advantage == "std"
    batch.advantages = CREDIT["grpo"](episodes, std)
    batch.labels = LABELS[args.labels](batch, run)
    batch.labels = CONTROLS[args.control](batch, args.seed * 1_000_003 + iteration)
    advantages = CREDIT[args.credit](episodes, std, batch.labels)
    dependent = {"low": None, "high": None}  # episodes of one game are not independent: no interval
    summary = {**summary, **dependent, "tasks": {k: {**row, **dependent} for k, row in summary["tasks"].items()}}
    about = (f"the episodes of iteration {iteration}, {args.group_size} of each game; advantages by {args.credit}, labels by "
             f"{args.labels}" + (f" under the control {args.control}" if args.control != "none" else ""))
    sets.append(describe("training", episodes, run.chat, summary, about, label=batch.labels.tolist(),
                         advantage=advantages.tolist(), **judged(episodes)))
    with open(os.path.join(args.out, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    name = os.path.basename(os.path.normpath(args.out))
    write_report(os.path.join(args.out, "report.html"), name, sets, rows, facts_of(args))


# -------------------------------------------------------------------------------------------------------------- the page

def finite(value):
    """The same with None for numbers that JSON has no word for, and shorter floats.

    >>> finite({"a": [1, float("nan"), (0.123456789, float("inf"))]})
    {'a': [1, None, [0.123457, None]]}
    """
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def facts_of(args):
    """What a page lists of how its numbers came to be: flags that are set, and the machine. {name: text}.

    >>> from types import SimpleNamespace as flags
    >>> found = facts_of(flags(lr=0.1, task_types=["boil", "melt"], max_steps={"boil": 40, "melt": 43}, after=[], out=None))
    >>> [found.get(name) for name in ("lr", "task_types", "max_steps", "after", "out")]
    ['0.1', 'boil, melt', 'boil 40, melt 43', None, None]
    >>> "torch" in found["machine"]
    True
    """
    def text(value):
        if isinstance(value, dict):
            return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    found = {name: text(value) for name, value in vars(args).items() if name != "machine" and value not in (None, [], "")}
    return {**found, "machine": text(machine())}


def section(title, text="", head=(), rows=(), picture=None, pre=""):
    """A further section of the page: a text, a table (strings and numbers), a picture (path of a PNG, embedded), and a text
    whose columns are to stand below one another."""
    if picture:
        with open(picture, "rb") as file:
            picture = "data:image/png;base64," + base64.b64encode(file.read()).decode()
    return {"title": title, "text": text, "head": list(head), "rows": [list(row) for row in rows], "picture": picture,
            "pre": pre}


def write_report(path, title, sets=(), metrics=(), facts=None, sections=(), compared=""):
    """Write the page, whole or not at all.

    Args:
        sets: of `describe`. metrics: rows of metrics.jsonl, for the curves. facts: {name: text}, listed (`facts_of`).
        sections: of `section`.
        compared: not empty: the first two sets are of the same games, shown side by side; the comparison's text.
    Raises OSError.
    """
    kept = [{key: value for key, value in row.items() if not key.startswith(("seconds", "count"))} for row in metrics]
    for row in kept:  # an evaluation's games are not drawn
        row |= {key: {k: value[k] for k in ("success", "low", "high")}
                for key, value in row.items() if isinstance(value, dict)}
    data = {"title": title, "flaws": FLAWS, "sets": list(sets), "metrics": kept, "facts": facts or {},
            "sections": list(sections), "compared": compared}
    with open(TEMPLATE, encoding="utf-8") as file:
        before, after = file.read().split("THE-DATA")
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    write_atomically(path, before + text + after)

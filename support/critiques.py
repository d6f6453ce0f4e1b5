"""How a cold start teaches to judge (`cold_start.py --critic`): verdicts with their reasons, and the lesson
they make.

Careless experts (`--sloppy`) supply the bad actions. A step's verdict is that of `--labels flaws`: bad if
flawed. Its critique is a sentence that names the reason, from the rules (rollout.FLAWS) and what the
environment has shown up to then (`critiques`), or a language model writes both (`written`, through
support/critic.py).

Each step is asked about twice, since RL asks for the verdict at once, and a critique must come before the
verdict that it leads to. Each question is a branch right after the action (actor.pack_branches), which no
token of the episode sees. What carries loss stands in brackets:

    short   good or bad?                    [bad]                                    RL's question, its answer
    long    Say why, then: good or bad?     [mug 1 is not here.\\nbad<|im_end|>]

Both are L_cls of classifier_loss.py: eq. (5a) with the same weights, by class within outcome; the long form's
log-probability is a mean over its tokens, so that a long critique counts no more than a short one. The value
head's is eq. (5b), over all steps. All of an expert's episodes are won: no verdict can be the outcome in
disguise.
"""

import functools
import re
from typing import NamedTuple

import torch

from classifier_loss import (LEFT_OUT, balanced_weights, choose_questions, flaw_labels, generative_loss,
                             value_head_loss)
from games.experts import kind, parse_task, things
from rollout import QUESTION, VERDICTS
from support.batches import lay_out, make_question
from support.critic import NO_VERDICT, ask_about, ask_critic, parse_verdict
from support.tags import told

QUESTION_LONG = "Say why, then: good or bad?"
CRITIC = ("none", "generative", "value", "both")
NEW = "possible, and not tried before."  # what can be said for any unflawed step


# ----------------------------------------------------------------------------------------------- reasons

def critiques(env, turns, steps):
    """(label, sentence) for each step of an expert's episode: a rule's verdict, and what the game's facts
    say.

    turns: as games.players.play_expert gives them; steps: the same as judged `rollout.Step`s. Told is what
    was shown before the action, and (for a refusal in ScienceWorld, which the model must foresee) the game's
    reply.
    """
    labels = flaw_labels(torch.tensor([step.flawed for step in steps])).tolist()
    reasons = (house_reasons if env == "alfworld" else lab_reasons)(turns, steps)
    return list(zip(labels, reasons))


def by_rule(step):
    """The reason of a flaw that the world did not refuse."""
    if step.repeated:
        return f"{step.action} was tried before."
    if step.no_effect:
        return f"{step.action} tells nothing new."
    return "it leads back, and nothing is done."


def house_reasons(turns, steps):
    """ALFWorld: a sentence for each step, from a map of what was seen where."""
    task, found = parse_task(turns[0][0]), []
    here, held, seen, closed, done = None, None, {}, set(), set()
    for (text, command, *_), step in zip(turns, steps):
        if place := re.match(r"You (?:arrive at|open the) (\w+ \d+)", text):
            here = place[1]
            closed = closed - {here} if "is closed" not in text else closed | {here}
            seen |= {here: things(text)} if here not in closed else {}
        if taken := re.match(r"You pick up the (\w+ \d+) from the (\w+ \d+)", text):
            held = taken[1]
            seen[taken[2]] = [name for name in seen.get(taken[2], []) if name != held]
        if moved := re.match(r"You (?:move|put) the (\w+ \d+) \w+(?:/\w+)? the (\w+ \d+)", text):
            held = None
            seen[moved[2]] = seen.get(moved[2], []) + [moved[1]]
        if changed := re.match(r"You (clean|heat|cool) the (\w+ \d+)", text):
            done.add(changed[2])
        if step.inadmissible:
            found.append(refused(command, here, held, seen, closed))
        else:
            found.append(by_rule(step) if step.flawed else sensible(command, task, held, seen, closed, done))
    return found


def refused(command, here, held, seen, closed):
    """Why a house does not allow a command.

    here: the receptacle one stands at; held: what one carries (each None where there is none); seen:
    {receptacle: names of what was last seen in it}; closed: receptacles.

    >>> refused("take mug 1 from bed 1", "bed 1", None, {"bed 1": ["pen 1"]}, set())
    'mug 1 is not here.'
    >>> refused("take mug 1 from bed 1", "bed 1", "pen 1", {"bed 1": ["mug 1"]}, set())
    'pen 1 is in hand.'
    >>> refused("move mug 1 to bed 1", "bed 1", None, {}, set())
    'mug 1 is not in hand.'
    >>> refused("open safe 1", "bed 1", None, {}, set())
    'safe 1 is elsewhere.'
    """
    if here and command == f"go to {here}":
        return f"already at {here}."
    if asked := re.fullmatch(r"(?:open|close) (\w+ \d+)", command):
        if asked[1] != here:
            return f"{asked[1]} is elsewhere."
        if here in closed:
            return f"{here} is closed."
        return f"{here} is open." if command.startswith("open") else f"{command} is not possible."
    asked = re.fullmatch(r"(take|move|clean|heat|cool) (\w+ \d+) (?:from|to|with) (\w+ \d+)", command)
    if not asked:
        return f"{command} is not possible."
    verb, thing, place = asked.groups()
    if place != here:
        return f"{place} is elsewhere."
    if verb != "take":
        return f"{thing} is not in hand." if thing != held else f"{command} is not possible."
    if place in closed:
        return f"{place} is closed."
    if thing not in seen.get(here, ()):
        return f"{thing} is not here."
    return f"{held} is in hand." if held else f"{command} is not possible."


def sensible(command, task, held, seen, closed, done):
    """What speaks for an unflawed command in a house; `task`: as games.experts.parse_task; `done`: things
    that were cleaned, heated or cooled. The rest as `refused`.

    >>> task = parse_task("Your task is to: heat some egg and put it in garbagecan.")
    >>> sensible("go to bed 1", task, None, {}, set(), set())
    'bed 1 is not searched yet.'
    >>> sensible("go to microwave 1", task, "egg 2", {}, set(), set())
    'there it can heat egg 2.'
    >>> sensible("go to garbagecan 1", task, "egg 2", {"garbagecan 1": []}, set(), {"egg 2"})
    'egg 2 is for garbagecan 1.'
    """
    goal, end, action, device, _ = task
    verb, *rest = command.split()
    place = " ".join(rest[1:]) if verb == "go" else None
    carries = held is not None and kind(held) == goal
    if place and carries and device and kind(place) == device and held not in done:
        return f"there it can {action} {held}."
    if place and carries and kind(place) == end:
        return f"{held} is for {place}."
    if place:
        sight = next((name for name in seen.get(place, ()) if kind(name) == (end if carries else goal)), None)
        return f"{sight} is there." if sight else NEW if place in seen else f"{place} is not searched yet."
    if verb == "open":
        return f"{' '.join(rest)} is closed."
    wanted = {"take": goal, "move": goal, "clean": goal, "heat": goal, "cool": goal, "use": end}.get(verb)
    return f"the task asks for {wanted}." if rest and rest[0] == wanted else NEW


def lab_reasons(turns, steps):
    """ScienceWorld: a sentence for each step, from what was seen since one came into the room."""
    found, shown, rooms = [], "", set()
    for (text, command, before, after, *_), step in zip(turns, steps):
        shown = text if text.startswith("You teleport") else f"{shown}\n{text}"
        named = re.fullmatch(r"(?:open|pick up|focus on|move) (.+?)(?: to (.+))?", command)
        missing = [name for name in named.groups() if name and name not in shown] if named else []
        room = command.removeprefix("teleport to ")
        if step.inadmissible:
            found.append(f"no {missing[0]} in sight." if missing else told(after.text))
        elif step.flawed:
            found.append(by_rule(step))
        elif after.score > before.score:
            found.append("the score rises.")
        else:
            found.append(f"{room} is not searched yet." if room != command and room not in rooms else NEW)
        rooms.add(room)
    return found


def written(demonstrations, ask, budget, generator):
    """What a language model writes instead, of some steps: a list for each episode of (label, sentence).

    demonstrations: a list of (turns, steps). ask: `support.critic.ask_critic` with everything but the
    questions filled in; raises NoCritic. budget: how many steps it is asked about, as many flawed ones as
    others; the rest have no verdict.
    """
    places = [(e, i) for e, (_, steps) in enumerate(demonstrations) for i in range(len(steps))]
    flawed = flaw_labels(torch.tensor([demonstrations[e][1][i].flawed for e, i in places]))
    chosen = choose_questions(flawed, None, budget, generator)
    asked = [places[k] for k in chosen.nonzero()[:, 0].tolist()]
    found = [[(NO_VERDICT, "")] * len(steps) for _, steps in demonstrations]
    questions = []
    for e, i in asked:
        turns = demonstrations[e][0]
        so_far = "\n\n".join([f"{text}\n\n> {command}" for text, command, *_ in turns[:i]] + [turns[i][0]])
        questions.append(ask_about(so_far, turns[i][1], turns[i][3].text))
    for (e, i), answer in zip(asked, ask(questions)):
        found[e][i] = parse_verdict(answer)
    return found


def make_critic(args, cache):
    """Who judges by `cold_start.py`'s flags, as support.demonstrations.won_games calls it: None, the rules,
    or the language model at --critic-url, whose answers are kept in the file `cache`."""
    if args.critic == "none":
        return None
    if not args.critic_url:
        return lambda played: [critiques(game.env, turns, steps) for game, turns, steps in played]
    ask = functools.partial(ask_critic, model=args.critic_model, url=args.critic_url, cache=cache)
    generator = torch.Generator().manual_seed(args.seed)
    return lambda played: written([one[1:] for one in played], ask, args.questions * len(played), generator)


# -------------------------------------------------------------------------------------------- the lesson

class Lesson(NamedTuple):
    """What the episodes of a batch (B of them, S steps) are asked, and what each answer weighs in L_cls."""
    branches: list                # B lists of (end, question ids, answer ids), for actor.forward; or None
    answer_weights: torch.Tensor  # (Q,), of the branches in that order
    labels: torch.Tensor          # (S,) 1 good, 0 bad, -1 left out
    value_weights: torch.Tensor   # (S,)


def answer_ids(chat, label, sentence):
    """The long form's answer: critique, verdict (the tokens of the short form's), end of turn."""
    encode = lambda text: chat.tokenizer.encode(text, add_special_tokens=False)
    return encode(f"{sentence}\n" if sentence else "") + encode(VERDICTS[label]) + [chat.eos]


def make_lesson(episodes, chat, form, questions, generator):
    """The Lesson on some demonstrations (support/demonstrations.py).

    form: of CRITIC but "none". questions: steps asked about in words per episode, each in both forms.
    """
    batch = lay_out(episodes)
    said = [one for episode in episodes for one in episode.critiques]
    labels = torch.tensor([label for label, _ in said])                                         # (S,)
    asked = choose_questions(labels, batch.won, questions * len(episodes), generator)           # (S,) bool
    weights = balanced_weights(torch.where(asked, labels, LEFT_OUT), batch.won)                 # (S,), sum 1
    short, long = make_question(chat), chat.next_prompt(QUESTION_LONG)
    branches, each = [[] for _ in episodes], []
    steps = [(e, step) for e, episode in enumerate(episodes) for step in episode.steps]
    for s in asked.nonzero()[:, 0].tolist():
        (e, step), (label, sentence) = steps[s], said[s]
        answer = answer_ids(chat, label, sentence)
        branches[e] += [(step.end, short.prompts[True], short.verdicts[label]), (step.end, long, answer)]
        each += [weights[s].item(), weights[s].item() / len(answer)]
    return Lesson(branches if form != "value" else None, torch.tensor(each), labels,
                  balanced_weights(labels, batch.won))


def lesson_loss(out, lesson):
    """L_cls of what `actor.forward` found: eqs. (5a), short and long form, and (5b); scalar."""
    loss, device = 0.0, out["logprobs"].device
    if "verdicts" in out:
        loss = loss + generative_loss(out["verdicts"], lesson.answer_weights.to(device))
    if "values" in out:
        weights = lesson.value_weights.to(device)
        loss = loss + value_head_loss(out["values"], lesson.labels.to(device), weights)
    return loss


def judging_messages(messages, label, sentence):
    """The conversations of a chat dataset that ask about the last answer of `messages`: short form, long
    form.

    Assistant messages that are there to be read and not to be learnt have weight 0 (the key of OpenAI's
    fine-tuning and of axolotl).

    >>> talk = [{"role": "user", "content": "You see a bed 1."}, {"role": "assistant", "content": "look"}]
    >>> [m["content"] for m in judging_messages(talk, 0, "look tells nothing new.")[1]]
    ['You see a bed 1.', 'look', 'Say why, then: good or bad?', 'look tells nothing new.\\nbad']
    """
    read = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]
    why, verdict = f"{sentence}\n" if sentence else "", VERDICTS[label]
    return [read + [{"role": "user", "content": question},
                    {"role": "assistant", "content": answer, "weight": 1}]
            for question, answer in ((QUESTION, verdict), (QUESTION_LONG, why + verdict))]

"""Agents playing episodes: `Step`, `Episode`, the chat format, and `play`. Who samples: engines/.

An episode is ONE token sequence, the whole conversation: system prompt, observation, action, observation, ...
Tokens are *given* (prompt, observations) or *sampled* (the model's answers). The mask that tells them apart
is made here, where the tokens are, and travels to the loss: only sampled tokens are ever trained on. Ids
travel too; nothing is decoded and tokenised again, because that need not give back what was sampled.

    <|im_start|>system ... <|im_end|> <|im_start|>user OBSERVATION <|im_end|> <|im_start|>assistant   given, 0
        <action>go to bed 1</action><|im_end|>                                                      sampled, 1
    <|im_start|>user OBSERVATION <|im_end|> <|im_start|>assistant                                     given, 0
        ...

This file knows no loss.
"""

import hashlib
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

from jinja2 import TemplateError

from games.game import most_steps

SYSTEM = {"alfworld": "Do the task in this house. Reply <action>command</action>.",
          "scienceworld": "Do the task in this lab. Reply <action>command</action>."}
SYSTEM_INSTRUCT = {  # for models not cold-started on the short one; `{o}` an object, `{r}` a receptacle
    "alfworld": (
        "You are an agent in a household and must do the task you are given. Each turn you read an "
        "observation and answer with one command. You may first think briefly inside <think>...</think>; "
        "then write exactly one command inside <action>...</action>. Commands: go to {r} | open {r} | "
        "close {r} | take {o} from {r} | move {o} to {r} | use {o} | clean {o} with {r} | heat {o} with "
        "{r} | cool {o} with {r} | slice {o} with {o} | look | inventory | examine {o or r}. Name things "
        "as observations do, such as `mug 1`."),
    "scienceworld": (
        "You are an agent in a building with a laboratory and must do the task you are given. Each turn "
        "you read an observation and answer with one command. You may first think briefly inside "
        "<think>...</think>; then write exactly one command inside <action>...</action>. Commands: look "
        "around | look at {o} | look in {o} | teleport to {room} | open {o} | close {o} | pick up {o} | "
        "put down {o} | move {o} to {o} | pour {o} in {o} | dunk {o} in {o} | mix {o} | use {o} on {o} | "
        "activate {o} | deactivate {o} | connect {o} to {o} | disconnect {o} | read {o} | eat {o} | flush "
        "{o} | focus on {o} | inventory | wait | wait1. Focus only on what the task names: focusing on "
        "anything else ends it.")}
TAGS = ("planning", "explore", "reflection", "monitor")  # RLVMR's: each answer opens with one (credit.py)
SYSTEM_TAGS = {env: text.replace("Reply", "Reply <planning>, <explore>, <reflection> or <monitor>, then")
               for env, text in SYSTEM.items()}
THINK = ("You may first think briefly inside <think>...</think>; then write exactly one command inside "
         "<action>...</action>.")
THINK_TAGGED = (
    "First think briefly inside exactly one of four tags: <planning>...</planning> to lay out the steps to "
    "the goal, <explore>...</explore> to look where you have not looked, <reflection>...</reflection> to "
    "correct an action that failed, <monitor>...</monitor> to follow your plan; then write exactly one "
    "command inside <action>...</action>.")
QUESTION = "good or bad?"  # the generative classifier's, after an action
VERDICTS = ("bad", "good")  # by label: 0 bad, 1 good
NO_ACTION = "No action found."  # the observation after an answer without <action>...</action>
FLAWS = ("malformed", "inadmissible", "no_effect", "repeated", "revisited")
CORRECTIONS = {  # the instruction against each, where it has become common (support/corrections.py)
    "malformed": "Write exactly one command.",
    "inadmissible": "Only do what is possible where you are.",
    "no_effect": "Do nothing that changes nothing.",
    "repeated": "Do not repeat what you have tried.",
    "revisited": "Do not go back where you have been."}


def system_prompt(env, short=True, tags=False):
    """The system prompt: the short one or the instructions, asking for RLVMR's tags or not."""
    if short:
        return (SYSTEM_TAGS if tags else SYSTEM)[env]
    return SYSTEM_INSTRUCT[env].replace(THINK, THINK_TAGGED) if tags else SYSTEM_INSTRUCT[env]


def corrected(system, flaws):
    """A system prompt with the instructions against these flaws after it.

    >>> corrected("Do the task.", ["repeated"])
    'Do the task. Do not repeat what you have tried.'
    """
    return " ".join([system, *(CORRECTIONS[name] for name in FLAWS if name in flaws)])


@dataclass
class Step:
    """One turn. `start:end` are the positions of its sampled tokens within the episode's tokens.

    The flaws, kept apart (an action may have several):
      malformed     no single <action>...</action> in the answer; in runs with tags, no single tag before it
      inadmissible  the world does not allow the command in this state
      no_effect     admissible, and the world's state is what it was. ALFWorld: looking around counts, it
                    tells nothing that was not told on arrival; ScienceWorld: only where the answer has been
                    read before
      repeated      this command was tried before in this very state
      revisited     it leads back to a state where the episode has been before

    For the credit rules (credit.py): digests of the world's states and of the text that was answered, equal
    where those are equal. An answer without an action leaves the world as it was: same state, no reward.
    """
    start: int
    end: int
    action: str | None
    malformed: bool = False
    inadmissible: bool = False
    no_effect: bool = False
    repeated: bool = False
    revisited: bool = False
    state: int = None        # before the action
    next_state: int = None   # after it
    observation: int = None  # what the policy had just read, whatever the state behind it
    reward: float = 0.0      # of this step; an episode's reward is their sum
    tag: str = None          # of TAGS, in runs with tags; None in others and where malformed

    @property
    def flawed(self):
        return any(getattr(self, name) for name in FLAWS)


@dataclass
class Episode:
    """One game played once. `tokens`, `sampled` and `logprobs` have the same length T."""
    game: object
    group: int                                     # episodes of one game from one state share this number
    tokens: list = field(default_factory=list)     # T token ids
    sampled: list = field(default_factory=list)    # T bools: True where the model chose the token
    logprobs: list = field(default_factory=list)   # T floats: log-probability when sampled; 0.0 where given
    steps: list = field(default_factory=list)
    reward: float = 0.0                            # what the advantage is made of
    score: int = None                              # ScienceWorld's, when the episode ended
    won: bool = False
    truncated: bool = False                        # ended because the context was full

    def give(self, ids):
        self.tokens += ids
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sample(self, ids, logprobs):
        self.tokens += ids
        self.sampled += [True] * len(ids)
        self.logprobs += logprobs


def pay_success_only(episodes):
    """`--reward success`: 1 for a won episode, paid at its last step, in place of the score. In place."""
    for episode in episodes:
        for step in episode.steps:
            step.reward = 0.0
        episode.reward = float(episode.won)
        if episode.steps:
            episode.steps[-1].reward = episode.reward


def flaw_rates(episodes):
    """Share of all steps with each flaw, e.g. {"malformed": 0.0, "repeated": 0.12, ...}; of those with any
    ("flawed"); of inadmissible ones that are not the same command over again ("inadmissible_anew")."""
    steps = [step for episode in episodes for step in episode.steps]
    found = {name: sum(getattr(s, name) for s in steps) / max(1, len(steps)) for name in (*FLAWS, "flawed")}
    anew = sum(s.inadmissible and not s.repeated for s in steps)
    return found | {"inadmissible_anew": anew / max(1, len(steps))}


def digest(text):
    """64 bits that stand for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# -------------------------------------------------------------------------------------------- the chat format

class ChatFormat:
    """The tokenizer's own chat template, cut into the two pieces that a growing conversation needs.

    `eos` is the id with which the template ends an answer, never the tokenizer's word for it alone: that of
    SmolLM2's GGUF file names the token that *begins* a turn. `ends`: eos, and what else ends a turn.
    tags: whether answers must open with one of TAGS. `corrections`, which may change between episodes: the
    flaws against which an instruction stands in the system prompt.
    """

    def __init__(self, tokenizer, system, tags=False, ends=()):
        """ends: ids that end a turn besides the template's own, such as those of the generation config."""
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {tokenizer.name_or_path!r} has no chat template: use an "
                             "instruction-tuned model")
        self.tokenizer, self.system, self.tags, self.system_role = tokenizer, system, tags, True
        self.corrections = ()
        try:
            self._render("x")
        except TemplateError:  # Gemma has no system turn: the first observation opens with it instead
            self.system_role = False
        closing = self._encode(self._after_answer("USER-TURN").split("USER-TURN")[0])
        special = [i for i, token in enumerate(closing) if token in tokenizer.added_tokens_decoder]
        self.closing = special[0] + 1 if special else 0  # tokens from an answer's end to the end of its turn
        self.eos = closing[special[0]] if special else tokenizer.eos_token_id
        self.ends = {self.eos, *ends} - {None}
        if not self.ends:
            raise ValueError(f"{tokenizer.name_or_path!r}: neither chat template nor generation config says "
                             "what ends a turn")

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _render(self, *turns):
        """The template's text for user, assistant, user, ... turns, up to where the next answer starts."""
        text = corrected(self.system, self.corrections)
        system = [{"role": "system", "content": text}] if self.system_role else []
        turns = turns if system else (f"{text}\n\n{turns[0]}", *turns[1:])
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return self.tokenizer.apply_chat_template(system + turns, tokenize=False, add_generation_prompt=True)

    def _after_answer(self, content):
        """The template itself says what comes between two answers: render a marker, keep what follows it."""
        return self._render("x", "ANSWER-GOES-HERE", content).split("ANSWER-GOES-HERE")[1]

    def first_prompt(self, observation):
        """Ids from the beginning to where the assistant's first answer starts."""
        return self._encode(self._render(observation))

    def next_prompt(self, content, answer_ended=True):
        """Ids between two answers: the rest of the assistant's turn, a user turn, and the assistant's header.

        answer_ended: the answer's last token is `eos`, so that it is not given once more. An answer that ran
        out of tokens, or was ended by another of `ends`, gets it.
        """
        return self._encode(self._after_answer(content))[self.closing if answer_ended else 0:]

    def parse_action(self, ids):
        """The command in an answer, or None where there is not exactly one."""
        found = re.findall(r"<action>(.*?)</action>", self.tokenizer.decode(ids), flags=re.DOTALL)
        return found[0].strip() if len(found) == 1 and found[0].strip() else None

    def parse(self, ids):
        """(command, tag) of an answer; without tags the tag is None. With tags: <tag>...</tag> first, exactly
        one of the four, then the action. Both are None where that is not so."""
        action = self.parse_action(ids)
        if not self.tags:
            return action, None
        text, names = self.tokenizer.decode(ids), "|".join(TAGS)
        opens = re.match(rf"\s*<({names})>.*?</\1>\s*<action>", text, flags=re.DOTALL)
        if action is None or not opens or len(re.findall(rf"<(?:{names})>", text)) != 1:
            return None, None
        return action, opens[1]


# ---------------------------------------------------------------------------------------------------- playing

def judge(step, before, after, tried, visited):
    """Set a step's flaws, states and reward between two observations; `tried`, `visited`: its episode's
    memory."""
    step.state, step.next_state, step.reward = before.state, after.state, after.reward
    step.inadmissible = not after.accepted
    step.no_effect = after.accepted and not after.effect
    step.repeated = step.action in tried[before.state]
    step.revisited = after.state != before.state and after.state in visited
    tried[before.state].add(step.action)
    visited.add(after.state)


def with_actions(pool, observations):
    """{slot: text} with the admissible commands named after each observation; `observations`: {slot:
    Observation}."""
    dear = [slot for slot, o in observations.items() if o.admissible is None]
    commands = {slot: o.admissible for slot, o in observations.items() if o.admissible is not None}
    commands |= dict(zip(dear, pool.admissible(dear)))
    return {slot: f"{o.text}\n\nAdmissible commands: {' | '.join(commands[slot])}"
            for slot, o in observations.items()}


def play(engine, pool, chat, games, group_size=1, max_steps=20, max_context=math.inf, seed=0,
         show_actions=False, bar=None):
    """Play every game `group_size` times, all episodes side by side.

    Args:
        engine: has `start`, `submit` and `poll`, as TorchEngine.
        pool: a `games.pool.EnvPool`.
        games: list of Game. A game that cannot be played is left out (its group with it).
        max_steps: of an episode, or {task type: steps}.
        max_context: an episode that would outgrow this many tokens ends there, flagged `truncated`.
        show_actions: name the admissible commands in every observation.
        bar: tqdm's, told of every step; an episode that ends has played all of its max_steps.
    Returns: (episodes in the order of the games, {"sample": seconds, "env": seconds, "bad_games":
        [messages]}).
    """
    seconds = {"sample": 0.0, "env": 0.0, "bad_games": []}
    texts_of = lambda o: with_actions(pool, o) if show_actions else {s: x.text for s, x in o.items()}
    clock = time.perf_counter()
    first = pool.reset([game for game in games for _ in range(group_size)])
    by_slot, now = {}, {}  # slot -> Episode; slot -> latest observation, of running episodes
    for slot, observation in enumerate(first):
        leader = first[slot - slot % group_size]
        if isinstance(observation, Exception):
            if slot % group_size == 0:
                seconds["bad_games"].append(str(observation))
            continue
        # The advantage compares episodes of a group with one another: they must be the same task.
        if observation.text != leader.text:
            raise RuntimeError(f"the episodes of group {slot // group_size} "
                               f"({games[slot // group_size].name}) start differently")
        by_slot[slot] = Episode(games[slot // group_size], slot // group_size, score=observation.score)
        now[slot] = observation
    limit = {slot: most_steps(max_steps, [episode.game]) for slot, episode in by_slot.items()}
    tried = {slot: defaultdict(set) for slot in by_slot}
    visited = {slot: {observation.state} for slot, observation in now.items()}
    next_prompt = {}  # text -> ids; observations recur within a batch
    broken = set()    # groups whose game broke while it was played
    engine.start(seed)

    def ask(slot):
        """Have the engine continue this episode, or end it where it has no turn or no room left. Whether it
        was asked."""
        episode = by_slot[slot]
        if len(episode.steps) == limit[slot]:
            return False
        episode.truncated = len(episode.tokens) + engine.max_new_tokens > max_context
        if not episode.truncated:
            engine.submit(slot, episode.tokens)
        return not episode.truncated

    shown = texts_of(now)  # slot -> the text that the next answer will be given to
    for slot, text in shown.items():
        by_slot[slot].give(chat.first_prompt(text))
    waiting = {slot for slot in now if ask(slot)}
    seconds["env"] += time.perf_counter() - clock
    while waiting:  # episodes do not wait for one another: whoever's answer is there goes on
        clock = time.perf_counter()
        answers = engine.poll()
        seconds["sample"] += time.perf_counter() - clock

        clock = time.perf_counter()
        commands = []
        for slot, ids, logprobs in answers:
            by_slot[slot].sample(ids, logprobs)
            (action, tag), end, here = chat.parse(ids), len(by_slot[slot].tokens), now[slot].state
            by_slot[slot].steps.append(Step(end - len(ids), end, action, malformed=action is None, state=here,
                                            next_state=here, observation=digest(shown[slot]), tag=tag))
            if action is not None:
                commands.append((slot, action))
        after = dict(zip((slot for slot, _ in commands), pool.step(commands)))
        for slot in [slot for slot, answer in after.items() if isinstance(answer, Exception)]:
            if by_slot[slot].group not in broken:
                seconds["bad_games"].append(str(after[slot]))
            broken.add(by_slot[slot].group)
            del after[slot]
        texts = texts_of(after)
        for slot, *_ in answers:
            episode = by_slot[slot]
            waiting.discard(slot)
            if episode.group in broken:
                continue
            if slot in after:
                judge(episode.steps[-1], now[slot], after[slot], tried[slot], visited[slot])
                now[slot] = after[slot]
                episode.reward += after[slot].reward
                episode.won, episode.score = after[slot].won, after[slot].score
            if not now[slot].done:
                text, ended = texts.get(slot, NO_ACTION), episode.tokens[-1] == chat.eos
                shown[slot] = text
                if (text, ended) not in next_prompt:
                    next_prompt[text, ended] = chat.next_prompt(text, ended)
                episode.give(next_prompt[text, ended])
                if ask(slot):
                    waiting.add(slot)
        if bar is not None:
            bar.update(sum(1 if slot in waiting else 1 + limit[slot] - len(by_slot[slot].steps)
                           for slot, *_ in answers))
        seconds["env"] += time.perf_counter() - clock
    for episode in by_slot.values():  # what was given after the last answer is nobody's prompt
        for values in (episode.tokens, episode.sampled, episode.logprobs):
            del values[episode.steps[-1].end if episode.steps else len(values):]
    return [episode for episode in by_slot.values() if episode.group not in broken], seconds

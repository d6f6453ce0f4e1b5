"""Agents playing episodes: `Step`, `Episode`, the chat format, the PyTorch sampling engine, and `play`.

An episode is ONE token sequence, the whole conversation: system prompt, observation, action, observation, ...
Tokens are *given* (prompt, observations) or *sampled* (the model's answers). The mask that tells them apart is made
here, where the tokens are, and travels to the loss: only sampled tokens are ever trained on. Ids travel too; nothing
is decoded and tokenised again, because that need not give back what was sampled.

    <|im_start|>system ... <|im_end|>  <|im_start|>user OBSERVATION <|im_end|>  <|im_start|>assistant
                                                                                 <action>go to bed 1</action><|im_end|>
    \\________________________ given, mask 0 ________________________________/  \\________ sampled, mask 1 _________/

This file knows no loss.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

SYSTEM = {"alfworld": "Do the task in this house. Reply <action>command</action>.",
          "scienceworld": "Do the task in this lab. Reply <action>command</action>."}
SYSTEM_INSTRUCT = {  # for models that were not cold-started on the short one; `{o}` an object, `{r}` a receptacle
    "alfworld": (
        "You are an agent in a household and must do the task you are given. Each turn you read an observation and "
        "answer with one command. You may first think briefly inside <think>...</think>; then write exactly one "
        "command inside <action>...</action>. Commands: go to {r} | open {r} | close {r} | take {o} from {r} | "
        "move {o} to {r} | use {o} | clean {o} with {r} | heat {o} with {r} | cool {o} with {r} | "
        "slice {o} with {o} | look | inventory | examine {o or r}. Name things as observations do, such as `mug 1`."),
    "scienceworld": (
        "You are an agent in a building with a laboratory and must do the task you are given. Each turn you read an "
        "observation and answer with one command. You may first think briefly inside <think>...</think>; then write "
        "exactly one command inside <action>...</action>. Commands: look around | look at {o} | look in {o} | "
        "teleport to {room} | open {o} | close {o} | pick up {o} | put down {o} | move {o} to {o} | pour {o} in {o} | "
        "dunk {o} in {o} | mix {o} | use {o} on {o} | activate {o} | deactivate {o} | connect {o} to {o} | "
        "disconnect {o} | read {o} | eat {o} | flush {o} | focus on {o} | inventory | wait | wait1. Focus only on what "
        "the task names: focusing on anything else ends it.")}
NO_ACTION = "No action found."  # the observation after an answer without <action>...</action>
FLAWS = ("malformed", "inadmissible", "no_effect", "repeated", "revisited")


@dataclass
class Step:
    """One turn. `start:end` are the positions of its sampled tokens within the episode's tokens.

    The flaws, kept apart (an action may have several):
      malformed     no single <action>...</action> in the answer
      inadmissible  the world does not allow the command in this state
      no_effect     admissible, and the world's state is what it was. ALFWorld: looking around counts, it tells nothing
                    that was not told on arrival; ScienceWorld: only where the answer has been read before
      repeated      this command was tried before in this very state
      revisited     it leads back to a state where the episode has been before
    """
    start: int
    end: int
    action: str | None
    malformed: bool = False
    inadmissible: bool = False
    no_effect: bool = False
    repeated: bool = False
    revisited: bool = False

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


def flaw_rates(episodes):
    """Share of all steps with each flaw, e.g. {"malformed": 0.0, "repeated": 0.12, ...}."""
    steps = [step for episode in episodes for step in episode.steps]
    return {name: sum(getattr(s, name) for s in steps) / max(1, len(steps)) for name in FLAWS}


# ------------------------------------------------------------------------------------------------------ the chat format

class ChatFormat:
    """The tokenizer's own chat template, cut into the two pieces that a growing conversation needs."""

    def __init__(self, tokenizer, system):
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned model")
        self.tokenizer, self.system = tokenizer, system
        self.eos = tokenizer.eos_token_id

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def first_prompt(self, observation):
        """Ids from the beginning to where the assistant's first answer starts."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": observation}]
        return self._encode(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def next_prompt(self, content, answer_ended=True):
        """Ids between two answers: the rest of the assistant's turn, a user turn, and the assistant's header.

        The template itself says what comes there: render a conversation with a marker for the answer, and keep what
        follows the marker. The end-of-turn token was sampled with the answer, unless that ran out of tokens.
        """
        marker = "ANSWER-GOES-HERE"
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": "x"},
                    {"role": "assistant", "content": marker}, {"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = text.split(marker)[1]
        if answer_ended:
            text = text.removeprefix(self.tokenizer.eos_token)
        return self._encode(text)

    def parse_action(self, ids):
        """The command in an answer, or None where there is not exactly one."""
        found = re.findall(r"<action>(.*?)</action>", self.tokenizer.decode(ids), flags=re.DOTALL)
        return found[0].strip() if len(found) == 1 and found[0].strip() else None


# --------------------------------------------------------------------------------------------------- the PyTorch engine

class RaggedCache:
    """Keys and values of rows with different lengths, each row filled from the left without gaps.

    Stands where transformers expects its `Cache`: each layer calls `update`. What lies right of a row's length is
    rubbish from padding; the attention mask never lets it be seen, and the row's next tokens overwrite it.
    """

    def __init__(self):
        self.layers = {}  # layer -> [keys, values], each (B, heads, capacity, head_dim): attention reads it in order
        self.at = None    # (B, q) where the current forward pass writes
        self.limit = 0    # columns that the current forward pass reads

    def update(self, keys, values, layer, *_, **__):  # each (B, heads, q, head_dim)
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        stored = self.layers.setdefault(layer, [None, None])
        for i, new in enumerate((keys, values)):
            if stored[i] is None or stored[i].shape[2] < self.limit:
                grown = new.new_zeros(*new.shape[:2], 2 * self.limit, new.shape[3])
                if stored[i] is not None:
                    grown[:, :, :stored[i].shape[2]] = stored[i]
                stored[i] = grown
            stored[i][rows, :, self.at] = new.transpose(1, 2)  # indexing puts (B, q) first: (B, q, heads, head_dim)
        return stored[0][:, :, :self.limit], stored[1][:, :, :self.limit]

    def keep(self, rows):
        for stored in self.layers.values():
            stored[0], stored[1] = stored[0][rows], stored[1][rows]

    def get_seq_length(self, *_):
        return 0  # positions are always passed explicitly


class TorchEngine:
    """Samples answers for many conversations at once; the KV cache lives on from turn to turn.

    `generate` is the interface that every engine has: conversations as ids in, new ids and their log-probabilities
    out. Rows that no longer take part are dropped from the cache, so that finished episodes cost nothing.
    """

    def __init__(self, model, eos, temperature=1.0, max_new_tokens=24):
        self.model, self.eos = model, eos
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.trunk, self.head = model.get_decoder(), model.get_output_embeddings()
        self.device = next(model.parameters()).device

    def start(self, seed):
        """Forget all conversations. `seed` makes the sampling repeat."""
        self.cache, self.rows, self.lengths = RaggedCache(), None, None
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @torch.inference_mode()
    def generate(self, rows, sequences):
        """Continue conversations until each has ended its turn.

        Args:
            rows: names of the conversations (the same number means the same conversation, longer by now).
            sequences: their full token ids so far.
        Returns: a list of (new ids, log-probabilities under the sampling distribution), in the order of `rows`.
        """
        self.model.eval()
        if self.rows is None:
            self.rows, self.lengths = list(rows), torch.zeros(len(rows), dtype=torch.long, device=self.device)
        elif self.rows != list(rows):  # some have finished
            place = {row: i for i, row in enumerate(self.rows)}
            index = torch.tensor([place[row] for row in rows], device=self.device)
            self.cache.keep(index)
            self.rows, self.lengths = list(rows), self.lengths[index]

        known = self.lengths.tolist()
        chunks = [ids[n:] for ids, n in zip(sequences, known)]  # what the cache has not seen
        widths = torch.tensor([len(c) for c in chunks], device=self.device)
        width = max(len(c) for c in chunks)
        batch = torch.tensor([c + [0] * (width - len(c)) for c in chunks], device=self.device)  # (B, q)
        hidden = self._forward(batch)                                                           # (B, q, D)
        hidden = hidden[torch.arange(len(rows), device=self.device), widths - 1]                # (B, D)
        self.lengths = self.lengths + widths

        ids, logprobs = [[] for _ in rows], [[] for _ in rows]
        running = [True] * len(rows)
        for i in range(self.max_new_tokens):
            token, logprob = self._choose(self.head(hidden).float())                            # (B,), (B,)
            for b, (t, l) in enumerate(zip(token.tolist(), logprob.tolist())):
                if running[b]:
                    ids[b].append(t)
                    logprobs[b].append(l)
                    running[b] = t != self.eos
            if not any(running) or i == self.max_new_tokens - 1:
                break
            # Rows whose turn has ended ride along: what they write lies beyond their length.
            hidden = self._forward(token[:, None])[:, 0]
            self.lengths = self.lengths + torch.tensor(running, device=self.device)
        return list(zip(ids, logprobs))

    def _forward(self, batch):
        """Hidden states (B, q, D) of the next q tokens of each row; row b's tokens start at position lengths[b]."""
        positions = self.lengths[:, None] + torch.arange(batch.shape[1], device=self.device)   # (B, q)
        self.cache.at, self.cache.limit = positions, int(positions.max()) + 1
        columns = torch.arange(self.cache.limit, device=self.device)
        visible = columns <= positions[:, :, None]                                             # (B, q, limit)
        return self.trunk(input_ids=batch, position_ids=positions, attention_mask=visible[:, None],
                          past_key_values=self.cache, use_cache=True).last_hidden_state

    def _choose(self, logits):
        """Sample from softmax(logits / temperature), or take the largest at temperature 0; (B, V) -> (B,), (B,)."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            token = logprobs.argmax(dim=-1)
        else:
            token = torch.multinomial(logprobs.exp(), 1, generator=self.generator)[:, 0]
        return token, logprobs.gather(1, token[:, None])[:, 0]


# -------------------------------------------------------------------------------------------------------------- playing

def judge(step, before, after, tried, visited):
    """Set the flaws of a step between two observations; `tried` and `visited` are this episode's memory."""
    step.inadmissible = not after.accepted
    step.no_effect = after.accepted and not after.effect
    step.repeated = step.action in tried[before.state]
    step.revisited = after.state != before.state and after.state in visited
    tried[before.state].add(step.action)
    visited.add(after.state)


def play(engine, pool, chat, games, group_size=1, max_steps=20, max_context=2048, seed=0):
    """Play every game `group_size` times, all episodes side by side.

    Args:
        engine: has `start` and `generate`, as TorchEngine.
        pool: an `env_pool.EnvPool`.
        games: list of Game. A game that cannot be played is left out (its group with it).
        max_context: an episode that would outgrow this many tokens ends there, flagged `truncated`.
    Returns: (episodes in the order of the games, {"sample": seconds, "env": seconds, "bad_games": [messages]}).
    """
    seconds = {"sample": 0.0, "env": 0.0, "bad_games": []}
    clock = time.perf_counter()
    first = pool.reset([game for game in games for _ in range(group_size)])
    by_slot, now = {}, {}  # slot -> Episode; slot -> latest observation, of running episodes
    for slot, observation in enumerate(first):
        game, leader = games[slot // group_size], first[slot - slot % group_size]
        if isinstance(observation, Exception):
            if slot % group_size == 0:
                seconds["bad_games"].append(str(observation))
            continue
        # The advantage compares episodes of a group with one another: they must be the same task.
        if observation.text != leader.text:
            raise RuntimeError(f"the episodes of group {slot // group_size} ({game.name}) start differently")
        by_slot[slot] = Episode(game, slot // group_size)
        by_slot[slot].give(chat.first_prompt(observation.text))
        now[slot] = observation
    seconds["env"] += time.perf_counter() - clock
    tried = {slot: defaultdict(set) for slot in by_slot}
    visited = {slot: {observation.state} for slot, observation in now.items()}
    next_prompt = {}  # text -> ids; observations recur within a batch

    engine.start(seed)
    for _ in range(max_steps):
        slots = [s for s in now if len(by_slot[s].tokens) + engine.max_new_tokens <= max_context]
        for s in set(now) - set(slots):
            by_slot[s].truncated = True
            del now[s]
        if not slots:
            break
        clock = time.perf_counter()
        answers = engine.generate(slots, [by_slot[s].tokens for s in slots])
        seconds["sample"] += time.perf_counter() - clock

        commands = []
        for s, (ids, logprobs) in zip(slots, answers):
            episode = by_slot[s]
            episode.sample(ids, logprobs)
            action = chat.parse_action(ids)
            end = len(episode.tokens)
            episode.steps.append(Step(end - len(ids), end, action, malformed=action is None))
            if action is not None:
                commands.append((s, action))
        clock = time.perf_counter()
        after = dict(zip((s for s, _ in commands), pool.step(commands)))
        seconds["env"] += time.perf_counter() - clock

        for s in slots:
            episode, text = by_slot[s], NO_ACTION
            if s in after:
                judge(episode.steps[-1], now[s], after[s], tried[s], visited[s])
                text, now[s] = after[s].text, after[s]
                episode.reward += after[s].reward
                episode.won, episode.score = after[s].won, after[s].score
                if after[s].done:
                    del now[s]
                    continue
            ended = episode.tokens[-1] == chat.eos
            if (text, ended) not in next_prompt:
                next_prompt[text, ended] = chat.next_prompt(text, ended)
            episode.give(next_prompt[text, ended])
    for episode in by_slot.values():  # what was given after the last answer is nobody's prompt
        for values in (episode.tokens, episode.sampled, episode.logprobs):
            del values[episode.steps[-1].end if episode.steps else len(values):]
    return list(by_slot.values()), seconds

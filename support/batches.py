"""Episodes laid end to end: the flat tensors that the losses take, and the part of them that a micro-batch needs.

    E episodes    |      0      |        1         |  2  | ...      a group: episodes of one game
    S steps       |  0  |   1   |  2  |  3  |  4   |  5  | ...      one action each
    N tokens      | ttt | ttttt | ttt | ttt | tttt | ttt | ...      sampled ones only: no padding, no mask

A micro-batch is a matter of memory, never of the objective: every weight is computed over the whole batch of an
optimizer step first, so the parts' losses add up to the batch's loss (tests/test_update.py compares the gradients).
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from actor import forward
from rollout import QUESTION, VERDICTS
from support.processes import is_sharded, own_share, through_root

forward = through_root(forward)
PER_STEP = ("advantages", "labels", "true_labels", "value_weights", "question_weights")
PER_TOKEN = ("token_weights", "old_logprobs", "ref_logprobs", "importance")


class Question(NamedTuple):
    """The generative classifier's question as token ids."""
    prompts: dict    # what stands between an answer and the verdict, by whether the answer ended (True) or was cut (False)
    verdicts: dict   # 1: ids of "good", 0: ids of "bad"
    eos: int         # ends a turn

    def says_good(self, logits):
        """(Q, V) logits where the verdicts begin -> (Q,) bool: is "good" likelier than "bad"?"""
        return logits[:, self.verdicts[1][0]] > logits[:, self.verdicts[0][0]]


def make_question(chat):
    """The question in a chat's format."""
    ids = [chat.tokenizer.encode(word, add_special_tokens=False) for word in VERDICTS]
    return Question({ended: chat.next_prompt(QUESTION, ended) for ended in (True, False)}, {0: ids[0], 1: ids[1]}, chat.eos)


@dataclass
class Batch:
    """What the losses need to know of some episodes. The fields that are None are filled in by whoever computes them."""
    episodes: list
    group: torch.Tensor                      # (E,) long: number of the episode's group
    reward: torch.Tensor                     # (E,) float
    episode_of_step: torch.Tensor            # (S,) long, 0 .. E-1
    step_of_token: torch.Tensor              # (N,) long, 0 .. S-1
    won: torch.Tensor                        # (S,) bool: the step's episode succeeded
    flawed: torch.Tensor                     # (S,) bool
    advantages: torch.Tensor = None          # (S,)
    labels: torch.Tensor = None              # (S,) long: 1 good, 0 bad, -1 left out
    true_labels: torch.Tensor = None         # (S,) what they are before a control changes them
    value_weights: torch.Tensor = None       # (S,) in the value head's loss
    question_weights: torch.Tensor = None    # (S,) in the generative loss; 0: not asked
    token_weights: torch.Tensor = None       # (N,), all together sum to 1
    old_logprobs: torch.Tensor = None        # (N,) under the policy that sampled
    ref_logprobs: torch.Tensor = None        # (N,) under the reference, for the KL
    importance: torch.Tensor = None          # (N,) where the sampler is not the trainer

    @property
    def sequences(self):
        return [e.tokens for e in self.episodes]

    @property
    def sampled(self):
        return [e.sampled for e in self.episodes]

    @property
    def action_ends(self):
        return [[step.end for step in e.steps] for e in self.episodes]

    def branches(self, question):
        """The questions asked about these steps, as `actor.forward` takes them; None without a generative classifier."""
        if question is None:
            return None
        found = [[] for _ in self.episodes]
        for s in (self.question_weights > 0).nonzero()[:, 0].tolist():
            e = int(self.episode_of_step[s])
            step = self.episodes[e].steps[s - int((self.episode_of_step < e).sum())]
            ended = self.episodes[e].tokens[step.end - 1] == question.eos
            found[e].append((step.end, question.prompts[ended], question.verdicts[int(self.labels[s])]))
        return found

    def part(self, chosen, device=None):
        """The same of some episodes (indices, in this order), on `device`."""
        first_step = torch.bincount(self.episode_of_step, minlength=len(self.episodes)).cumsum(0).tolist()
        steps = torch.cat([torch.arange(([0] + first_step)[e], first_step[e]) for e in chosen])
        last = torch.bincount(self.step_of_token, minlength=len(self.episode_of_step)).cumsum(0).tolist()
        tokens = torch.cat([torch.arange(([0] + last)[s], last[s]) for s in steps.tolist()])
        found = lay_out([self.episodes[e] for e in chosen])
        for names, index in ((PER_STEP, steps), (PER_TOKEN, tokens)):
            for name in names:
                if getattr(self, name) is not None:
                    setattr(found, name, getattr(self, name)[index])
        if device is not None:
            for field in fields(found):
                if isinstance(getattr(found, field.name), torch.Tensor):
                    setattr(found, field.name, getattr(found, field.name).to(device))
        return found


def lay_out(episodes):
    """A Batch with everything that the episodes say of themselves."""
    numbers = {g: i for i, g in enumerate(sorted({e.group for e in episodes}))}
    steps = [(e, step) for e, episode in enumerate(episodes) for step in episode.steps]
    return Batch(
        episodes,
        torch.tensor([numbers[e.group] for e in episodes]), torch.tensor([e.reward for e in episodes]),
        torch.tensor([e for e, _ in steps]),
        torch.arange(len(steps)).repeat_interleave(torch.tensor([step.end - step.start for _, step in steps])),
        torch.tensor([episodes[e].won for e, _ in steps]), torch.tensor([step.flawed for _, step in steps]),
        old_logprobs=torch.tensor([l for e in episodes for l, s in zip(e.logprobs, e.sampled) if s]))


def deal(batch, shares):
    """Lists of episode indices, one for each optimizer step: whole groups, the first, the one after next, and so on."""
    found = [(batch.group % shares == i).nonzero()[:, 0].tolist() for i in range(shares)]
    return [chosen for chosen in found if chosen]


def micro_batches(episodes, max_tokens):
    """Indices of episodes of similar length, at most `max_tokens` padded tokens together (at least one episode)."""
    order = sorted(range(len(episodes)), key=lambda i: -len(episodes[i].tokens))
    batches, width = [], 0
    for i in order:
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(episodes[i].tokens)  # the longest comes first
        batches[-1].append(i)
    return batches


@torch.no_grad()
def sampled_logprobs(model, batch, temperature, max_tokens, accelerator=None):
    """(N,) log-probabilities of the batch's sampled tokens under `model`; NaN where another process computes."""
    model.eval()
    found = torch.full((len(batch.step_of_token),), torch.nan)
    episode_of_token = batch.episode_of_step[batch.step_of_token]
    micros = micro_batches(batch.episodes, max_tokens)
    for micro, ours in own_share(micros, accelerator, is_sharded(model)):
        part = batch.part(micro)
        logprobs = forward(model, part.sequences, part.sampled, temperature)["logprobs"].cpu()
        for e, one in zip(micro, logprobs.split([sum(mask) for mask in part.sampled]) if ours else []):
            found[episode_of_token == e] = one
    return found

"""support/lesson.py: the numbers on the page are the loop's."""

import re

import torch

from grpo import grpo_loss
from rollout import Episode
from support import lesson


def test_the_tokens_parts_add_up_to_the_loss(model, episodes):
    group = episodes[:2]  # one game: one won, one lost
    head = torch.nn.Linear(model.config.hidden_size, 1)
    batch, logprobs, each, (good, parts) = lesson.numbers_of(model, group, head)
    assert len(each) == sum(sum(e.sampled) for e in group) and torch.allclose(batch.token_weights.sum(), torch.tensor(1.0))
    A = torch.cat([torch.full((sum(e.sampled),), a) for e, a in zip(group, (1.0, -1.0))])
    ratio = (logprobs - batch.old_logprobs).exp()
    assert torch.allclose(each, -(ratio * A) / len(A), atol=1e-5)  # far from the clip's edge: the policy that sampled
    whole, _ = grpo_loss(logprobs, batch.old_logprobs, A, batch.token_weights)
    assert torch.allclose(each.sum(), whole, atol=1e-6)
    flawed = torch.tensor([step.flawed for episode in group for step in episode.steps])
    assert torch.allclose(parts, -batch.value_weights * torch.where(flawed, 1 - good, good).log(), atol=1e-6)
    state = model.get_decoder()(input_ids=torch.tensor([group[0].tokens])).last_hidden_state[0, group[0].steps[0].end - 1]
    assert torch.allclose(good[0], torch.sigmoid(head(state)).squeeze(), atol=1e-5)  # read from the action's last token


def test_the_page_has_a_row_for_every_step_and_every_token(model, episodes, chat):
    group = episodes[:2]
    group[0].steps[1].action = "take | `mug`"  # what would end a cell of the table, or its code
    text = lesson.page(group, chat, model, "COMMAND")
    assert "`take \\| 'mug'`" in text and "COMMAND" in text
    steps = [line for line in text.splitlines() if line.startswith(tuple(f"| {k} | `" for k in range(1, 10)))]
    flawed = next(step for step in group[0].steps if step.flawed)
    tokens = [line for line in text.splitlines() if line.startswith("| `") and "| 1 |" in line]
    assert len(steps) == len(group[0].steps) and len(tokens) == flawed.end - flawed.start
    assert "## The loss" not in text
    text = lesson.page(group, chat, model, "COMMAND", torch.nn.Linear(model.config.hidden_size, 1), coef=0.5)
    grpo, classifier, total = re.search(r"L = .* = (\S+) \+ 0.5 \* (\S+) = (\S+)", text).groups()
    assert abs(float(grpo) + 0.5 * float(classifier) - float(total)) < 2e-5


def test_only_episodes_won_in_spite_of_a_flaw_are_worth_showing(episodes):
    won, lost = episodes[:2]
    assert lesson.worth_showing(won) and not lesson.worth_showing(lost)
    assert not lesson.worth_showing(Episode(None, 0, won=True))

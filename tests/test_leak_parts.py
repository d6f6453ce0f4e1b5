"""experiments/leak_parts.py: its leak is coupling.py's, its baseline is what it says."""

from types import SimpleNamespace

import pytest
import torch

import coupling
import rollout
from actor import forward
from experiments import leak_parts
from helpers import make_batch


@pytest.fixture
def setting(model, episodes):
    """args, run and a batch of three groups, won and lost: unflawed, repeated and inadmissible steps."""
    for episode in episodes:
        for k, step in enumerate(episode.steps):
            step.malformed = step.no_effect = step.revisited = False
            step.repeated, step.inadmissible = k == 1, k == 2
    batch = make_batch(episodes, torch.tensor([1.0, -1.0, 0.7, -0.7, 0.4, -1.3]))
    args = SimpleNamespace(temperature=1.0, micro_tokens=4096, blocks=1, step=1e-3)
    return args, SimpleNamespace(model=model.double(), bar=SimpleNamespace(update=lambda: None)), batch


def test_leak_and_own_are_those_of_coupling(setting):
    args, run, batch = setting
    mask = torch.ones(len(batch.step_of_token), dtype=torch.float64)
    found, _ = coupling.split_update(args, run, batch, batch, mask)
    leak, own = found["plain"]["change"][:, 0]                                                    # (S,) each
    (D, k), H = leak_parts.directions(args, run, batch), leak_parts.targets(args, run, batch, mask)
    ours = leak_parts.effects(D, k, H)
    inadmissible = torch.tensor([step.inadmissible for episode in batch.episodes for step in episode.steps])
    for kind, chosen in (("inadmissible", inadmissible), ("flawed", batch.flawed), ("good", ~batch.flawed)):
        assert ours[kind]["leak"] == pytest.approx(leak[chosen].mean().item(), rel=0.02, abs=1e-3), kind
        assert ours[kind]["own"] == pytest.approx(own[chosen].mean().item(), rel=0.02, abs=1e-3), kind


def by_hand(run, batch, weights):
    """The gradient of sum over tokens weights log pi, one backward pass over all episodes."""
    logprobs = forward(run.model, batch.sequences, batch.sampled)["logprobs"]
    return torch.autograd.grad((weights * logprobs).sum(), list(run.model.parameters()))


def test_praise_blame_and_first_attempts_by_hand(setting):
    args, run, batch = setting
    for episode in batch.episodes[:2]:
        episode.steps[2].repeated = True  # two of six inadmissible steps are repeats
    mask = torch.rand(len(batch.step_of_token)).double()
    (D, k), H = leak_parts.directions(args, run, batch), leak_parts.targets(args, run, batch, mask)
    ours, steps = leak_parts.effects(D, k, H), [step for episode in batch.episodes for step in episode.steps]
    A, unflawed = batch.advantages[batch.step_of_token], ~batch.flawed[batch.step_of_token]
    for kind, chosen, count in (("anew", [s.inadmissible and not s.repeated for s in steps], 4),
                                ("inadmissible", [s.inadmissible for s in steps], 6)):
        assert sum(chosen) == count
        h = by_hand(run, batch, mask.float() / count * torch.tensor(chosen)[batch.step_of_token])
        for name, kept in (("praise", A > 0), ("blame", A < 0)):
            d = by_hand(run, batch, batch.token_weights * A * (kept & unflawed))
            dot = sum((x * y).sum().item() for x, y in zip(d, h))
            assert abs(dot) > 1e-4 and ours[kind][name] == pytest.approx(dot, rel=1e-3, abs=1e-6), (kind, name)


def test_how_much_less_reward_gives_by_hand():
    """State 7: unflawed 1.0 and 0.0, inadmissible -0.5 and (over again) -1.5; state 8 of the same game: inadmissible 2.0 alone;
    state 7 of another game: unflawed 9.0. Over all steps 0.0 - 10/3; in the same state (-1.0 and -2.0) / 2; anew -1.0."""
    step = lambda state, **flaws: rollout.Step(0, 1, "a", state=state, **flaws)
    first = [step(7), step(7), step(7, inadmissible=True), step(7, inadmissible=True, repeated=True), step(8, inadmissible=True)]
    batch = SimpleNamespace(episodes=[rollout.Episode(None, 0, steps=first), rollout.Episode(None, 1, steps=[step(7)])],
                            advantages=torch.tensor([1.0, 0.0, -0.5, -1.5, 2.0, 9.0]))
    assert leak_parts.punished(batch) == pytest.approx((-10 / 3, -1.5, -1.0))


def test_centred_is_what_centred_advantages_give(setting):
    args, run, batch = setting
    mask = torch.ones(len(batch.step_of_token), dtype=torch.float64)
    (D, k), H = leak_parts.directions(args, run, batch), leak_parts.targets(args, run, batch, mask)
    before = leak_parts.effects(D, k, H)
    batch.advantages = batch.advantages + k
    assert float((batch.token_weights * batch.advantages[batch.step_of_token]).sum()) == pytest.approx(0.0, abs=1e-6)
    D, rest = leak_parts.directions(args, run, batch)
    after = leak_parts.effects(D, rest, H)
    for kind in before:
        assert abs(k) > 0.05 and after[kind]["leak"] == pytest.approx(before[kind]["leak, centred"], rel=1e-4, abs=1e-6)
        assert after[kind]["own"] == pytest.approx(before[kind]["own, centred"], rel=1e-4, abs=1e-6)

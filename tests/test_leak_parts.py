"""experiments/leak_parts.py: its leak is coupling.py's, its baseline is what it says."""

from types import SimpleNamespace

import pytest
import torch

import coupling
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
        assert ours[kind]["praise"] * ours[kind]["blame"] != 0.0


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

"""What each control leaves alone, and what it destroys."""

import copy
from types import SimpleNamespace

import pytest
import torch

import train
from helpers import advantages_of, make_batch, update
from support.batches import make_question
from support.controls import CONTROLS, Detached, classifier_coef
from support.processes import clip_gradients


def fake(steps=4000, seed=0):
    """Steps with a flaw in 30% of those of won episodes and 70% of those of lost ones; the action's text tells it."""
    generator = torch.Generator().manual_seed(seed)
    won = torch.rand(steps, generator=generator) < 0.3
    labels = (torch.rand(steps, generator=generator) > torch.where(won, 0.3, 0.7)).long()
    labels[::10] = -1
    actions = [SimpleNamespace(action=f"take mug {i % 50} from desk {label}") for i, label in enumerate(labels.tolist())]
    return SimpleNamespace(won=won, labels=labels, episodes=[SimpleNamespace(steps=actions)])


def agreement(a, b):
    both = (a >= 0) & (b >= 0)
    return (a == b)[both].float().mean().item()


@pytest.mark.parametrize("name", list(CONTROLS))
def test_what_the_labels_say_afterwards(name):
    batch = fake()
    labels = CONTROLS[name](batch, 1)
    assert torch.equal(labels == -1, batch.labels == -1)  # nobody is added, nobody left out
    if name in ("none", "stop-gradient"):
        assert torch.equal(labels, batch.labels)
        return
    if name == "shuffled":  # counts of all four cells stay, also within each outcome; which step it was does not
        for outcome in (batch.won, ~batch.won):
            assert torch.equal(labels[outcome].sort().values, batch.labels[outcome].sort().values)
            share = (batch.labels[outcome & (batch.labels >= 0)]).float().mean().item()
            by_chance = share**2 + (1 - share)**2
            assert agreement(labels[outcome], batch.labels[outcome]) == pytest.approx(by_chance, abs=0.05)
    else:
        assert agreement(labels, batch.labels) == pytest.approx(0.5, abs=0.12 if name == "per-text" else 0.05)
    again, other = CONTROLS[name](batch, 1), CONTROLS[name](batch, 2)
    assert torch.equal(labels, again) and torch.equal(labels, other) == (name == "per-text")
    texts = [step.action for step in batch.episodes[0].steps]
    known = {}
    consistent = all(known.setdefault(t, l) == l for t, l in zip(texts, labels.tolist()) if l >= 0)
    assert consistent == (name == "per-text")


def test_stop_gradient_teaches_the_head_and_leaves_the_trunk_alone(model, episodes):
    for episode in episodes:
        episode.reward = 1.0  # no advantage: L_cls alone
    batch = make_batch(episodes, advantages_of(episodes))
    for kind, touched in ((Detached, False), (torch.nn.Linear, True)):
        head = kind(32, 1)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.0)
        update(model, head, optimizer, batch, classifier_coef=0.5)
        assert head.weight.grad.abs().max() > 0
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()) == touched


def test_random_target_disturbs_as_much_as_the_true_labels_would(model, chat, episodes):
    head, batch = torch.nn.Linear(32, 1), make_batch(episodes, advantages_of(episodes))
    batch.true_labels, batch.labels = batch.labels, CONTROLS["random-target"](batch, 3)
    args = SimpleNamespace(control="random-target", classifier="both", classifier_coef=0.3, clip=0.2, kl_coef=0.0, questions=3,
                           labels="flaws", weighting="token", temperature=1.0, micro_tokens=8192, head_layer=-1, epo=0.0)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.0)
    run = SimpleNamespace(args=args, model=model, value_head=head, optimizer=optimizer, question=make_question(chat),
                          shared=None, turn_entropies=[])
    coef = classifier_coef(args, run, batch, train.gradients, train.weigh, 5)

    def length(labels, coef):
        twin = copy.copy(batch)
        twin.labels = labels
        train.gradients(args, run, train.weigh(args, twin, 5), grpo_coef=0.0, classifier_coef=coef)
        return clip_gradients(list(model.parameters()), 1e9)

    assert coef != 0.3 and length(batch.labels, coef) == pytest.approx(length(batch.true_labels, 0.3), rel=1e-3)
    args.control = "shuffled"
    assert classifier_coef(args, run, batch, train.gradients, train.weigh, 5) == 0.3


def test_the_head_reads_the_layer_it_is_told_to(model, episodes):
    """Layer 0, the embeddings: no attention, so no gradient above; the last is what it reads by default."""
    from actor import forward
    batch, head = make_batch(episodes, advantages_of(episodes)), torch.nn.Linear(32, 1)
    values = {}
    for layer in (-1, 0, 1, 2):
        values[layer] = forward(model, batch.sequences, batch.sampled, value_head=head, action_ends=batch.action_ends,
                                head_layer=layer)["values"]
    by_hand = [model.get_input_embeddings()(torch.tensor(e.tokens[step.end - 1])) for e in episodes for step in e.steps]
    assert torch.allclose(values[0], head(torch.stack(by_hand))[:, 0], atol=1e-5)
    assert torch.allclose(values[-1], values[2], atol=1e-5) and not torch.allclose(values[1], values[2], atol=1e-3)
    model.zero_grad()
    values[1].sum().backward()
    layers = model.get_decoder().layers
    assert layers[0].mlp.up_proj.weight.grad.abs().max() > 0 and layers[1].mlp.up_proj.weight.grad is None

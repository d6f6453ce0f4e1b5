"""Hidden states, their distances and the linear probe, against what is worked out by hand."""

import numpy
import pytest
import torch

from games import levels
from support import probes, representation


def make(flawed, game, action="go"):
    return probes.Probe([], [], action, flawed, str(game), "look")


def test_hidden_states_are_those_that_choose_and_end_the_action(model, chat, pool):
    games = [levels.generated_game("valid_unseen", seed) for seed in range(6)]
    seen = probes.encode(probes.make_probes(games, pool, 15, count=4), chat)[:2]
    states = representation.hidden_states(model, seen)
    assert states.shape == (2, 3, 2, 32)
    for n, probe in enumerate(seen):
        at = [t for t, counts in enumerate(probe.mask) if counts]
        last = model.model(input_ids=torch.tensor([probe.tokens])).last_hidden_state[0].double()
        assert torch.allclose(states[0, -1, n], last[at[0] - 1], atol=1e-5)
        assert torch.allclose(states[1, -1, n], last[at[-1]], atol=1e-5)
        word = model.model.embed_tokens.weight[probe.tokens[at[-1]]].double()
        assert torch.allclose(states[1, 0, n], word)
        shorter = probe._replace(tokens=probe.tokens[:at[0]], mask=[False] * (at[0] - 1) + [True])
        if at[0] - 1 > 0:  # before the action nothing of it has been seen
            cut = representation.hidden_states(model, [shorter])
            assert torch.allclose(cut[1, :, 0], states[0, :, n], atol=1e-5)


def test_distances_by_hand():
    """Without centring the constant, a hundred in each direction, would make all of them alike."""
    three = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    states = torch.cat([three, torch.tensor([[0.0, 3.0], [0.0, -3.0]])]) + 100.0  # the mean is (100, 100)
    seen = [make(False, 1), make(False, 2), make(True, 3, "look"), make(True, 4), make(False, 5, "look")]
    found = representation.distances(states, seen)
    # A: probes 1-4 and 2-4 (cosines -1/sqrt 2 and +1/sqrt 2), look 3-5 (a vanishing one: 0). B: 1-2, opposite
    assert found["A"][0] == pytest.approx(1.0) and found["B"][0] == pytest.approx(2.0)
    assert found["A - B"][0] == pytest.approx(-1.0)
    states[3] = 100.0 + three[0] * 7  # now in the direction of the first: cosines 1 and -1 with the two
    states[4] = 100.0 - three[0] * 7
    found = representation.distances(states, seen[:1] + [make(False, 2, "look")] + seen[2:])
    # A: go 1-4 alike, look 2-3 and 3-5 with the vanishing one. B: look 2-5, alike
    assert found["A"][0] == pytest.approx((0.0 + 1.0 + 1.0) / 3) and found["B"][0] == pytest.approx(0.0)


def test_intervals_of_a_distance_hold_it_and_turn_round_with_it():
    rng = numpy.random.default_rng(0)
    label = numpy.repeat([1.0, -1.0], 30)
    states = torch.tensor(rng.normal(size=(60, 3)) + label[:, None] * [2.0, 0, 0])
    seen = [make(y < 0, game) for game, y in enumerate(label)]
    found = representation.distances(states, seen)
    for value, low, high in found.values():
        assert low < value < high
    assert found["A - B"][1] > 0  # good and flawed are in opposite directions


def test_linear_accuracy_is_that_on_other_games():
    """What tells good from flawed everywhere is found; what tells it in the fitted games alone is not."""
    rng, games = numpy.random.default_rng(0), 40
    seen = [make(flawed, game) for game in range(games) for flawed in (True, True, True, False, False, False)]
    label, game = torch.tensor([1.0 if p.flawed else -1.0 for p in seen]), [int(p.game) for p in seen]
    noise = torch.tensor(rng.normal(size=(len(seen), 4)), dtype=torch.float32)
    shared = torch.cat([noise, 2 * label[:, None]], 1)
    own = torch.cat([noise, label[:, None] * torch.eye(games)[game] * 5], 1)  # another direction in each game
    value, low, high = representation.linear_accuracy(shared, seen)
    assert value > 0.9 and low <= value <= high
    value, low, high = representation.linear_accuracy(own, seen)
    assert low < 0.5 < high


def test_linear_accuracy_counts_both_classes_alike():
    """Nine of ten probes are good, and nothing tells which: saying `good` always is right in half of the
    classes."""
    seen = [make(game % 10 == 0, game) for game in range(200)]
    value, *_ = representation.linear_accuracy(torch.zeros(200, 2), seen)
    assert value == pytest.approx(0.5)


def test_the_table_names_every_layer(model, chat, pool):
    games = [levels.generated_game("valid_unseen", seed) for seed in range(12)]
    seen = probes.encode(probes.make_probes(games, pool, 15, count=24), chat)
    found = representation.representation(model, seen)
    assert [len(found[place]) for place in representation.PLACES] == [3, 3]
    first = found["before"][0]  # the embedding of one and the same token: nothing to tell apart
    assert first["accuracy"] == (0.5, 0.5, 0.5) and first["A"][0] == pytest.approx(1.0)
    text = representation.representation_table(found)
    assert text.count("layer 2") == 2 and text.count("embeddings") == 2

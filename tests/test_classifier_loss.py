"""Labels, class balance, both losses by hand, and the branches' mask."""

import math

import pytest
import torch

from classifier_loss import (balanced_choice, class_weights, generative_loss, outcome_labels, rule_labels, value_head_loss)
from actor import pack_branches


def test_labels():
    won, flawed = torch.tensor([True, True, False, False]), torch.tensor([False, True, False, True])
    assert rule_labels(won, flawed).tolist() == [1, 0, -1, 0]
    assert outcome_labels(torch.tensor([0.5, -0.5, 0.0])).tolist() == [1, 0, -1]


def test_each_class_counts_half():
    weights = class_weights(torch.tensor([1, 1, 1, 0, -1]))
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2, 0])
    assert class_weights(torch.tensor([1, -1, 1])).tolist() == pytest.approx([0.5, 0, 0.5])  # one class alone
    assert class_weights(torch.tensor([-1, -1])).tolist() == [0, 0]


def test_losses_by_hand():
    assert generative_loss(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.5])).item() == pytest.approx(1.5 * math.log(2))
    values, labels = torch.tensor([0.0, math.log(3.0), 9.0]), torch.tensor([1, 0, -1])
    loss = value_head_loss(values, labels, torch.tensor([0.5, 0.5, 0.0]))
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4), rel=1e-5)  # sigmoid(log 3) = 3/4


def test_balanced_choice_prefers_the_rare_class_and_keeps_the_cap():
    labels = torch.tensor([1, 1, 1, 0, -1, 1, 1, 0, -1])
    episode = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    for seed in range(20):
        chosen = balanced_choice(labels, episode, 2, torch.Generator().manual_seed(seed))
        assert chosen[3] and chosen[7]                              # the rare ones always
        assert torch.bincount(episode[chosen], minlength=3).tolist() == [2, 2, 0]
        assert not chosen[labels == -1].any()


def test_branch_mask_is_what_the_docstring_says():
    tokens, positions, mask, starts = pack_branches([[1, 2, 3, 4, 5, 6], [7, 8]], [[(3, [9, 9]), (6, [9])], []])
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 6, 9, 9, 9], [7, 8] + [0] * 7] and starts == [[6, 8], []]
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 6]
    visible = [[j for j in range(9) if mask[0, 0, i, j]] for i in range(9)]
    assert visible[:6] == [list(range(i + 1)) for i in range(6)]
    assert visible[6:] == [[0, 1, 2, 6], [0, 1, 2, 6, 7], [0, 1, 2, 3, 4, 5, 8]]
    assert mask[1, 0, 1].nonzero()[:, 0].tolist() == [0, 1]
    assert pack_branches([[1, 2]], [[]])[2] is None

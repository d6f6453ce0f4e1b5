"""Advantages and the clipped loss against numbers computed by hand."""

import math

import pytest
import torch

from grpo import group_advantages, grpo_loss, k3, token_weights


def test_advantages_by_hand():
    # group 0: rewards 1 0 0 -> mean 1/3, population std sqrt(2)/3; group 1 interleaved, without variance
    rewards, groups = torch.tensor([1.0, 5.0, 0.0, 0.0, 5.0]), torch.tensor([0, 1, 0, 0, 1])
    advantages, signal = group_advantages(rewards, groups, eps=0.0)
    root2 = math.sqrt(2)
    assert advantages[[0, 2, 3]].tolist() == pytest.approx([root2, -root2 / 2, -root2 / 2])
    assert advantages[[1, 4]].tolist() == [0.0, 0.0] and signal.tolist() == [True, False]
    plain, _ = group_advantages(rewards, groups, normalize_std=False)
    assert plain.tolist() == pytest.approx([2 / 3, 0, -1 / 3, -1 / 3, 0])


def test_equal_rewards_are_no_signal_whatever_their_last_bit():
    """The mean of eight rewards of 0.99 missed them by one bit of float32: a "variance", and an advantage of +0.107
    for each of the eight episodes."""
    for hundredths in range(101):
        for size in range(2, 17):
            rewards, groups = torch.full((size,), hundredths / 100), torch.zeros(size, dtype=torch.long)
            advantages, signal = group_advantages(rewards, groups)
            assert not signal.any() and not advantages.any(), (hundredths, size)


def test_population_std_not_sample_std():
    advantages, _ = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), eps=0.0)
    assert advantages.tolist() == pytest.approx([1.0, -1.0])  # the sample std would give 0.707


def test_constant_rewards_give_exactly_zero_despite_rounding():
    """0.1 summed three times is not 0.3: a mean that is off by one ulp must not become an advantage of 1e-8 / eps."""
    advantages, signal = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long))
    assert advantages.tolist() == [0.0] * 3 and not signal.any()


def test_token_weights_by_hand():
    # episode 0: steps of 1 and 3 tokens; episode 1: one step of 2 tokens
    steps, episodes = torch.tensor([0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert token_weights(steps, episodes, "token").tolist() == pytest.approx([1 / 6] * 6)
    assert token_weights(steps, episodes, "step").tolist() == pytest.approx([1 / 3] + [1 / 9] * 3 + [1 / 6] * 2)
    assert token_weights(steps, episodes, "episode").tolist() == pytest.approx([1 / 8] * 4 + [1 / 4] * 2)
    with pytest.raises(ValueError, match="choose token, step or episode"):
        token_weights(steps, episodes, "turn")


def test_loss_by_hand():
    # ratios 1.5, 0.5, 1.5, 0.5 with advantages +, +, -, -: clipped are the 1st (above, +) and the 4th (below, -)
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantages, weights = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([0.1, 0.2, 0.4, 0.3])
    loss, stats = grpo_loss(ratio.log(), torch.zeros(4), advantages, weights, clip=0.2)
    assert loss.item() == pytest.approx(-(0.1 * 1.2 * 2 + 0.2 * 0.5 * 2 - 0.4 * 1.5 * 2 - 0.3 * 0.8 * 2), rel=1e-5)
    assert stats["clip_fraction"].item() == pytest.approx(0.1 + 0.3)
    assert stats["ratio"].item() == pytest.approx(0.15 + 0.1 + 0.6 + 0.15)


def test_gradient_stops_where_clipped_and_is_reinforce_at_ratio_one():
    logprobs = torch.tensor([1.5, 0.5, 1.0]).log().requires_grad_()
    advantages, weights = torch.tensor([1.0, -1.0, 0.7]), torch.full((3,), 1 / 3)
    grpo_loss(logprobs, torch.zeros(3), advantages, weights, clip=0.2)[0].backward()
    assert logprobs.grad[:2].tolist() == [0.0, 0.0]
    assert logprobs.grad[2].item() == pytest.approx(-0.7 / 3)


def test_k3_by_hand_and_its_gradient():
    # pi = 0.2, ref = 0.5: d = log 2.5, k3 = 2.5 - log 2.5 - 1; dk3/dlogpi = 1 - exp(d) = -1.5
    logprobs = torch.tensor([0.2]).log().requires_grad_()
    value = k3(logprobs, torch.tensor([0.5]).log())
    assert value.item() == pytest.approx(1.5 - math.log(2.5), rel=1e-5)
    value.sum().backward()
    assert logprobs.grad.item() == pytest.approx(-1.5, rel=1e-5)


def test_k3_averages_to_the_kl():
    pi, ref = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    expected = (pi * k3(pi.log(), ref.log())).sum()  # expectation by enumeration
    assert expected.item() == pytest.approx((pi * (pi / ref).log()).sum().item(), rel=1e-5)


def test_kl_enters_the_loss_with_its_coefficient():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    arguments = (logprobs, logprobs, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]))
    plain, _ = grpo_loss(*arguments)
    with_kl, stats = grpo_loss(*arguments, ref_logprobs=ref, kl_coef=0.1)
    assert (with_kl - plain).item() == pytest.approx(0.1 * stats["kl"].item(), rel=1e-4)
    assert stats["kl"].item() == pytest.approx(0.5 * (math.exp(-0.5) + 0.5 - 1) + 0.5 * (math.exp(1) - 1 - 1), rel=1e-5)

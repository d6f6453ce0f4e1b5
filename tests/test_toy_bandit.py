"""Closed forms against enumeration, flows against autograd, the edge of the danger zone against simulation."""

import itertools

import numpy as np
import pytest
import torch

import toy_bandit as toy
import toy_network as network


def enumerate_groups(q, r, p, G):
    """Every group of G samples with its probability: (flawed (G,), rewards (G,), chance). 4^G cases, by brute force."""
    for flawed in itertools.product((0, 1), repeat=G):
        for rewards in itertools.product((0, 1), repeat=G):
            chance = 1.0
            for f, R in zip(flawed, rewards):
                success = p - r if f else p
                chance *= (q if f else 1 - q) * (success if R else 1 - success)
            yield np.array(flawed), np.array(rewards, float), chance


@pytest.mark.parametrize("seed", range(5))
def test_closed_forms_against_enumeration(seed):
    rng = np.random.default_rng(seed)
    q, p, G = rng.uniform(0.05, 0.95), rng.uniform(0.3, 0.95), int(rng.integers(2, 6))
    r = rng.uniform(0.05, p)
    exact = mean = std = positive = push = 0.0
    for flawed, rewards, chance in enumerate_groups(q, r, p, G):
        centered = rewards - rewards.mean()
        exact += chance * (flawed * (rewards - (p - q * r))).mean()
        mean += chance * (flawed * centered).mean()
        std += chance * (flawed * centered).mean() / (rewards.std() or 1.0)
        positive += chance * ((flawed * centered).sum() > 1e-12)
        push += chance * (flawed * centered).sum()
    assert toy.expected_advantage(q, r) == pytest.approx(exact)
    assert toy.expected_advantage_group(q, r, G) == pytest.approx(mean)
    assert toy.expected_advantage_std(q, r, p, G) == pytest.approx(std)
    assert toy.group_push(q, r, p, G)[0] == pytest.approx(positive)
    assert toy.group_push(q, r, p, G)[2] == pytest.approx(push)
    assert exact < 0 and mean < 0 and std < 0


def test_monte_carlo_lies_within_its_interval():
    """Three means at 4 standard errors: false alarm about once in 5,000 seeds; the seed is fixed."""
    q, r, p, G = 0.3, 0.4, 0.8, 6
    samples = toy.sample_advantages(q, r, p, G, 50_000, np.random.default_rng(0))
    exact = (toy.expected_advantage(q, r), toy.expected_advantage_group(q, r, G), toy.expected_advantage_std(q, r, p, G))
    error = 4 * samples.std(1) / 50_000**0.5
    assert (np.abs(samples.mean(1) - exact) < error).all() and (error < 0.01).all()


def test_groups_needed_against_simulation():
    q, r, p, G = 0.3, 0.3, 0.8, 8
    n, rng = toy.groups_needed(q, r, p, G), np.random.default_rng(1)
    sums = np.array([toy.sample_advantages(q, r, p, G, n, rng)[1].sum() for _ in range(3000)])
    assert 0.02 < (sums >= 0).mean() < 0.09  # 5% by the normal approximation


@pytest.mark.parametrize("seed", range(5))
def test_flow_is_the_gradient_of_the_value(seed):
    """d pi/dt = J^T grad_z V with the softmax's Jacobian J, both from autograd."""
    rng = np.random.default_rng(seed)
    logits, r = torch.tensor(rng.normal(size=3), requires_grad=True), torch.tensor(rng.uniform(size=3))
    gradient, = torch.autograd.grad(-(torch.softmax(logits, 0) * r).sum(), logits)
    jacobian = torch.autograd.functional.jacobian(lambda z: torch.softmax(z, 0), logits.detach())
    assert toy.flow(torch.softmax(logits, 0).detach().numpy(), r.numpy()) == pytest.approx((jacobian @ gradient).numpy())


def test_the_good_action_can_shrink_and_escapes_in_the_end():
    start, r = [0.01, 0.19, 0.80], [0.0, 1.0, 0.1]
    times, path, escape = toy.run_flow(start, r)
    assert toy.flow(start, r)[0] < 0 and path[:, 0].min() < 0.01 and escape is not None and path[-1, 0] > 0.9
    small = toy.run_flow(start, r, stride=0.005, most=120_000)[2]
    assert escape == pytest.approx(small, rel=0.05)  # the step is small enough


def test_pushing_down_feeds_the_likeliest():
    before = np.array([0.1, 0.2, 0.7])
    gain = toy.negative_step(before, 1, 0.1) - before
    assert gain[1] < 0 < gain[2] and gain.argmax() == 2
    logits = torch.tensor(np.log(before), requires_grad=True)
    torch.log_softmax(logits, 0)[1].backward()
    expected = torch.softmax(logits.detach() - 0.1 * logits.grad, 0).numpy()
    assert toy.negative_step(before, 1, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("q, r_flawed", [(0.05, 0.5), (0.2, 0.3), (0.9, 0.4)])
def test_the_edge_of_the_danger_zone(q, r_flawed):
    edge = toy.danger_edge(q, r_flawed, 0.5, 0.6)
    assert toy.net_push(edge, q, r_flawed, 0.5, 0.6) == pytest.approx(0.0, abs=1e-12)
    below = toy.simulate_two_states(edge - 0.02, q, r_flawed, 0.5, 0.6, time=0.1)[0]
    above = toy.simulate_two_states(edge + 0.02, q, r_flawed, 0.5, 0.6, time=0.1)[0]
    assert below[-1] < q < above[-1]


def test_measured_coupling_of_equal_and_of_orthogonal_states():
    states = torch.eye(24)[:16]
    policy = network.SmallPolicy(torch.cat([states[:1], states[:1], states[1:]]), seed=0)
    assert network.coupling(policy, [0], [1]) == pytest.approx(1.0, abs=1e-5)
    assert network.coupling(policy, [0], [5]) < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_the_remedy_lowers_rho_and_the_flaw(seed):
    torch.set_num_threads(1)
    alone = network.train_small(seed=seed, measure=1000)
    assert alone["peak"] > 0.5 > alone["flaw"][0]
    for form in ("generative", "value"):
        helped = network.train_small(form, coef=1.0, seed=seed, measure=1000)
        assert helped["rho"][-1] < alone["rho"][-1] - 0.1 and helped["flaw"][-1] < 0.05

"""Closed forms against enumeration, flows against closed forms, the split update against differences."""

import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch

import toy_bandit as toy
import toy_network as network


def enumerate_groups(q, r, p, G):
    """Every group of G samples with its probability, 4^G cases: (flawed (G,), rewards (G,), chance)."""
    for flawed in itertools.product((0, 1), repeat=G):
        for rewards in itertools.product((0, 1), repeat=G):
            chance = 1.0
            for f, R in zip(flawed, rewards):
                success = p - r if f else p
                chance *= (q if f else 1 - q) * (success if R else 1 - success)
            yield np.array(flawed), np.array(rewards, float), chance


# ------------------------------------------------------------------------------ 1. the expected advantage

@pytest.mark.parametrize("seed", range(5))
def test_closed_forms_against_enumeration(seed):
    rng = np.random.default_rng(seed)
    q, p, G = rng.uniform(0.05, 0.95), rng.uniform(0.3, 0.95), int(rng.integers(2, 6))
    r = rng.uniform(0.05, p)
    exact = mean = std = positive = push = won = lost = 0.0
    for flawed, rewards, chance in enumerate_groups(q, r, p, G):
        centered, advantage = rewards - rewards.mean(), rewards - (p - q * r)
        exact += chance * (flawed * advantage).mean()
        won += chance * (flawed * rewards * advantage).mean()
        lost += chance * (flawed * (1 - rewards) * advantage).mean()
        mean += chance * (flawed * centered).mean()
        std += chance * (flawed * centered).mean() / (rewards.std() or 1.0)
        positive += chance * ((flawed * centered).sum() > 1e-12)
        push += chance * (flawed * centered).sum()
    assert toy.expected_advantage(q, r) == pytest.approx(exact)
    assert toy.expected_advantage_by_outcome(q, r, p) == pytest.approx((won, lost))
    assert toy.expected_advantage_group(q, r, G) == pytest.approx(mean)
    assert toy.expected_advantage_std(q, r, p, G) == pytest.approx(std)
    assert toy.group_push(q, r, p, G)[0] == pytest.approx(positive)
    assert toy.group_push(q, r, p, G)[2] == pytest.approx(push)
    assert exact < 0 and mean < 0 and std < 0 and lost < 0 < won


@pytest.mark.parametrize("q, r, p", [(1.0, 0.3, 0.3), (0.4, 0.0, 0.0), (0.4, 0.0, 1.0), (0.0, 0.5, 1.0)])
def test_without_variance_there_is_no_advantage(q, r, p):
    """All samples succeed, or all fail. Regression: P(flawed | success) divided by a probability of 0."""
    assert toy.expected_advantage_std(q, r, p, 8) == 0.0
    assert toy.groups_needed(q, r, p, 8) == math.inf  # nothing to punish, however many groups


def test_monte_carlo_lies_within_its_interval():
    """Three means at 4 standard errors: false alarm about once in 5,000 seeds; the seed is fixed."""
    q, r, p, G = 0.3, 0.4, 0.8, 6
    samples = toy.sample_advantages(q, r, p, G, 50_000, np.random.default_rng(0))
    exact = (toy.expected_advantage(q, r), toy.expected_advantage_group(q, r, G),
             toy.expected_advantage_std(q, r, p, G))
    error = 4 * samples.std(1) / 50_000**0.5
    assert (np.abs(samples.mean(1) - exact) < error).all() and (error < 0.01).all()


def test_groups_needed_against_simulation():
    q, r, p, G = 0.3, 0.3, 0.8, 8
    n, rng = toy.groups_needed(q, r, p, G), np.random.default_rng(1)
    sums = np.array([toy.sample_advantages(q, r, p, G, n, rng)[1].sum() for _ in range(3000)])
    assert 0.02 < (sums >= 0).mean() < 0.09  # 5% by the normal approximation


# ------------------------------------------------------------------------------------ 2. squeezing, flows

@pytest.mark.parametrize("seed", range(5))
def test_flow_is_the_gradient_of_the_value(seed):
    """d pi/dt = J^T grad_z V with the softmax's Jacobian J, both from autograd."""
    rng = np.random.default_rng(seed)
    logits, r = torch.tensor(rng.normal(size=3), requires_grad=True), torch.tensor(rng.uniform(size=3))
    gradient, = torch.autograd.grad(-(torch.softmax(logits, 0) * r).sum(), logits)
    jacobian = torch.autograd.functional.jacobian(lambda z: torch.softmax(z, 0), logits.detach())
    flow = toy.flow(torch.softmax(logits, 0).detach().numpy(), r.numpy())
    assert flow == pytest.approx((jacobian @ gradient).numpy())


def log_odds_time(odds):
    """2 z + 2 sinh z, the integral of 1 / (q (1 - q)) over the log odds z: c t where dz/dt = c q (1 - q)."""
    z = np.log(odds)
    return 2 * z + 2 * np.sinh(z)


@pytest.mark.parametrize("good, r", [(0.3, 0.5), (0.01, 0.2), (1e-4, 1.0)])
def test_escape_time_in_closed_form(good, r):
    """Two actions: d(z_good - z_flawed)/dt = 2 r q (1 - q). Regression: Euler steps were 0.3 to 1% off."""
    exact = (log_odds_time(0.9 / 0.1) - log_odds_time(good / (1 - good))) / (2 * r)
    times, path, escape = toy.run_flow([good, 1 - good], [0.0, r])
    assert escape == pytest.approx(exact, rel=1e-6) and path[-1, 0] == pytest.approx(0.9, rel=1e-6)
    middle = len(path) // 2
    at = (log_odds_time(path[middle, 0] / path[middle, 1]) - log_odds_time(good / (1 - good))) / (2 * r)
    assert times[middle] == pytest.approx(at, rel=1e-6)


def test_flow_against_an_independent_integration():
    """Three actions, in probabilities, not logits: Euler steps of two lengths, extrapolated to length 0."""
    start, r, end = np.array([0.1, 0.45, 0.45]), np.array([0.0, 1.0, 0.1]), 20.0
    coarse, fine = start, start
    for _ in range(20_000):
        coarse = coarse + end / 20_000 * toy.flow(coarse, r)
        for _ in range(2):
            fine = fine + end / 40_000 * toy.flow(fine, r)
    times, path, _ = toy.run_flow(start, r)
    i = times.searchsorted(end)
    def slope(z):
        return toy.push_on_logits(toy.softmax(z), r)
    last = toy.runge_kutta(slope, np.log(path[i - 1]), end - times[i - 1])
    assert toy.softmax(last) == pytest.approx(2 * fine - coarse, rel=1e-6)


def test_the_good_action_can_shrink_and_escapes_in_the_end():
    start, r = [0.01, 0.19, 0.80], [0.0, 1.0, 0.1]
    _, path, escape = toy.run_flow(start, r)
    assert toy.flow(start, r)[0] < 0 and path[:, 0].min() < 0.01 and path[-1, 0] == pytest.approx(0.9)
    assert escape == pytest.approx(toy.run_flow(start, r, stride=0.005)[2], rel=1e-6)


def test_pushing_down_feeds_the_likeliest():
    before = np.array([0.1, 0.2, 0.7])
    gain = toy.negative_step(before, 1, 0.1) - before
    assert gain[1] < 0 < gain[2] and gain.argmax() == 2
    logits = torch.tensor(np.log(before), requires_grad=True)
    torch.log_softmax(logits, 0)[1].backward()
    expected = torch.softmax(logits.detach() - 0.1 * logits.grad, 0).numpy()
    assert toy.negative_step(before, 1, 0.1) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- 3. coupling

@pytest.mark.parametrize("q, r_prime", [(0.05, 0.5), (0.2, 0.3), (0.9, 0.4)])
def test_the_edge_of_the_danger_zone(q, r_prime):
    edge = toy.danger_edge(q, r_prime, 0.5, 0.6)
    assert toy.net_push(edge, q, r_prime, 0.5, 0.6) == pytest.approx(0.0, abs=1e-12)
    below = toy.simulate_two_states(edge - 0.02, q, r_prime, 0.5, 0.6, time=0.1)[0]
    above = toy.simulate_two_states(edge + 0.02, q, r_prime, 0.5, 0.6, time=0.1)[0]
    assert below[-1] < q < above[-1]


def test_two_states_in_closed_form():
    """Uncoupled, 2 z + 2 sinh z is linear in time. Wholly coupled and opposed alike, nothing moves."""
    q_prime, q_s = toy.simulate_two_states(0.0, 0.3, 0.4, 0.2, 0.7, time=30.0)
    for path, slope in ((q_prime, -0.4), (q_s, 0.7)):
        moved = log_odds_time(path / (1 - path)) - log_odds_time(path[0] / (1 - path[0]))
        assert moved == pytest.approx(slope * np.linspace(0, 30, len(path)), rel=1e-6)
    assert toy.simulate_two_states(1.0, 0.3, 0.5, 0.3, 0.5, time=10.0) == pytest.approx(0.3)


def test_coupled_states_against_an_independent_integration():
    """Euler steps of two lengths on (q', q_s) themselves, extrapolated to length 0."""
    def euler(steps):
        q = np.array([0.1, 0.5])
        for _ in range(steps):
            own = np.array([-0.5, 0.6]) * q * (1 - q)
            q = q + 10.0 / steps * q * (1 - q) * (own + 0.7 * own[::-1])
        return q
    path = toy.simulate_two_states(0.7, 0.1, 0.5, 0.5, 0.6, time=10.0)
    assert path[:, -1] == pytest.approx(2 * euler(20_000) - euler(10_000), rel=1e-6)


def test_measured_coupling_of_equal_and_of_other_states():
    policy = network.SmallPolicy(range(2))
    policy.states = torch.eye(24)[:16].repeat(2, 1, 1)
    policy.states[:, 1] = policy.states[:, 0]
    assert network.coupling(policy, [0], [1]) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (network.coupling(policy, [0], [5]) < 0.9).all()


class LogLinear(torch.nn.Module):
    """Two states, f or not f: log odds of f = theta . feature, features of the two states with cosine rho."""

    def __init__(self, rho, q_s, q_prime):
        super().__init__()
        self.features = torch.tensor([[1.0, 0.0], [rho, (1 - rho**2) ** 0.5]], dtype=torch.float64)  # s, s'
        odds = torch.tensor([q_s / (1 - q_s), q_prime / (1 - q_prime)], dtype=torch.float64).log()
        self.theta = torch.nn.Parameter(torch.linalg.solve(self.features, odds)[None])              # (1, 2)

    def log_policy(self):
        z = self.theta @ self.features.T
        return torch.stack([torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)], -1)


@pytest.mark.parametrize("q_s, r_s, q, r", [(0.5, 0.5, 0.1, 0.5), (0.3, 0.4, 0.2, 0.3), (0.6, 0.2, 0.9, 0.3)])
def test_split_update_in_closed_form(q_s, r_s, q, r):
    """Two log-linear states: leak = rho r_s q_s (1 - q_s) - r' q'^2 (1 - q'), own = -r' q' (1 - q')^2 and
    net = net_push, all times 1 - q', the derivative of log pi(f|s') in its log odds, and halved as means over
    two states. The ratio passes 1 where rho passes the edge of the danger zone."""
    success = torch.tensor([[0.8, 0.8 - r_s], [0.8 - r, 0.8]], dtype=torch.float64)
    flawed = torch.tensor([[False, False], [True, False]])
    edge = toy.danger_edge(q, r, q_s, r_s)
    for rho in (0.1, edge - 0.01, edge + 0.01, 0.9):
        if not 0 <= rho < 1:
            continue
        split = network.split_update(LogLinear(rho, q_s, q), success, flawed)
        unit = (1 - q) / 2
        assert split["own"].item() == pytest.approx(-unit * r * q * (1 - q) ** 2)
        leak = rho * r_s * q_s * (1 - q_s) - r * q**2 * (1 - q)
        assert split["leak"].item() == pytest.approx(unit * leak)
        assert split["net"].item() == pytest.approx(unit * toy.net_push(rho, q, r, q_s, r_s))
        assert (split["ratio"].item() > 1) == (rho > edge)


@pytest.fixture(scope="module")
def trained():
    """Three policies on their way, in float64: states and actions are no longer alike."""
    policy = network.SmallPolicy(range(3), start=0.3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    for _ in range(8):
        optimizer.zero_grad()
        (-(policy.log_policy().exp() * network.success_table()).sum(2).mean(1).sum()
         + network.classification_loss(policy, "value", torch.arange(4).expand(3, 16, 4),
                                       (~network.IS_FLAWED).long().expand(3, 16, 4))).backward()
        optimizer.step()
    policy.states = policy.states.double()
    return policy.double()


def moved(policy, direction, size):
    """A copy of the policies, each with its parameters moved by size * its row of direction (N, P)."""
    policy, at = copy.deepcopy(policy), 0
    with torch.no_grad():
        for p in policy.parameters():
            n = p[0].numel()
            p += size * direction[:, at:at + n].view_as(p)
            at += n
    return policy


@pytest.mark.parametrize("acting", [slice(None), torch.arange(16) % 2 == 0])
def test_the_parts_add_up_to_the_policy_gradient(trained, acting):
    """The gradient of the mean success over the states acted in, by autograd."""
    success = network.success_table().double()
    G_u, G_f = network.split_gradient(trained, success, acting=acting if torch.is_tensor(acting) else None)
    value = (trained.log_policy().exp() * success)[:, acting].sum(2).mean(1)
    whole = network.gradient(value, trained)
    assert torch.allclose(G_u + G_f, whole, rtol=1e-9, atol=1e-12) and G_f.norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("held_out", [None, torch.arange(16) % 2 == 1])
def test_leak_and_own_against_finite_differences(trained, held_out):
    """A real step along each part, on copies of the weights: log pi of flawed actions moves as predicted."""
    success = network.success_table().double()
    read = network.IS_FLAWED if held_out is None else network.IS_FLAWED & held_out[:, None]
    weight = trained.log_policy().exp().detach() * read
    def flaw(policy):
        return ((weight * policy.log_policy()).sum((1, 2)) / weight.sum((1, 2))).detach()
    split = network.split_update(trained, success, held_out=held_out)
    parts = network.split_gradient(trained, success, acting=None if held_out is None else ~held_out)
    for name, part in zip(("leak", "own", "net"), (*parts, sum(parts))):
        change = (flaw(moved(trained, part, 1e-5)) - flaw(moved(trained, part, -1e-5))) / 2e-5
        assert split[name] == pytest.approx(change, rel=1e-6)
    assert (split["own"] < 0).all() and (split["leak"] > 0).all()  # punished itself, raised by the rest
    assert split["ratio"] == pytest.approx(-split["leak"] / split["own"])


def test_the_ratio_tells_which_way_one_exact_update_moves_the_flaw():
    """Once f is worth much in s and costs little in s', once the reverse: flaws that grow and that shrink."""
    signs = set()
    for r_s, r_prime in ((0.5, 0.1), (0.05, 0.7)):
        path = network.train_small(steps=1, rate=1e-3, measure=1, r_s=r_s, r_prime=r_prime, start=0.3)
        grew = path["flaw"][1] > path["flaw"][0]
        assert ((path["ratio"][0] > 1) == grew).all()
        signs |= set(grew.tolist())
    assert signs == {True, False}


# ------------------------------------------------------------------------------------------ 4. the remedy

def uniform_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(1, *shape, generator=generator)


def test_class_balance_and_losses_by_hand():
    """Three good and one bad action were taken in the first seed, none bad in the second."""
    labels = torch.tensor([[[1, 1], [0, 1]], [[1, 1], [1, 1]]])
    weights = network.class_balance(labels)
    assert weights[0].flatten().tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6])
    assert weights[1].flatten().tolist() == pytest.approx([1 / 4] * 4)

    policy = network.SmallPolicy([0])
    actions, labels = torch.tensor([[[0, 2]] * 16]), torch.tensor([[[0, 1]] + [[1, 1]] * 15])
    for form in ("generative", "value"):
        odds = policy.classify(form)[0].detach().double().numpy()
        good = [np.log1p(np.exp(-odds[s, k])) for s in range(16) for k in (0, 2) if (s, k) != (0, 0)]
        expected = np.mean(good) / 2 + np.log1p(np.exp(odds[0, 0])) / 2
        loss = network.classification_loss(policy, form, actions, labels)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_sampled_policy_gradient_is_the_exact_one_times_one_minus_1_over_G():
    """The mean over 3,000 draws of G = 4 within 5 standard errors, in each of the 64 logits of one policy."""
    N, G = 3000, 4
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 16, 4, generator=generator).repeat(N, 1, 1).requires_grad_()
    def uniform(*shape):
        return torch.rand(N, *shape, generator=generator)
    pi = torch.softmax(logits, -1).detach()
    actions = torch.multinomial(pi.view(-1, 4), G, replacement=True, generator=generator).view(N, 16, G)
    success = network.success_table()
    loss = network.sampled_policy_loss(torch.log_softmax(logits, -1), actions, success, uniform)
    sampled, = torch.autograd.grad(loss, logits)
    exact, = torch.autograd.grad(-(torch.softmax(logits, -1) * success).sum(2).mean(1).sum(), logits)
    error = 5 * sampled.std(0) / N**0.5
    assert ((sampled.mean(0) - (1 - 1 / G) * exact[0]).abs() < error).all()
    assert (error < 0.2 * exact[0].abs().max()).all()


def test_actions_are_drawn_from_the_policy_and_only_taken_ones_are_labelled(monkeypatch):
    """What train_small hands to the classifier: the taken actions alone, bad where the rule flags them."""
    seen = []
    def record(policy, form, actions, labels, stop_gradient):
        seen.append((actions, labels, policy.log_policy().exp().detach()))
        return policy.value.sum() * 0.0
    monkeypatch.setattr(network, "classification_loss", record)
    network.train_small("value", G=500, steps=3, seeds=range(2))
    for actions, labels, pi in seen:
        assert torch.equal(labels == 0, (actions == 0) & (torch.arange(16) >= 12)[:, None])
        for k in range(4):  # 5 standard errors
            share, error = (actions == k).float().mean(2), (pi[..., k] * (1 - pi[..., k]) / 500).sqrt()
            assert ((share - pi[..., k]).abs() < 5 * error + 1e-3).all()


def test_labels_told():
    rule = (~network.IS_FLAWED)[None]
    assert torch.equal(network.labels_told(rule, None, 0.0, uniform_of(0)), rule)
    wrong = torch.cat([network.labels_told(rule, None, 0.3, uniform_of(seed)) != rule for seed in range(50)])
    assert 0.27 < wrong.float().mean() < 0.33
    per_action = network.labels_told(rule, "per action", 0.0, uniform_of(0))[0]
    assert (per_action == per_action[0]).all() and per_action[0].sum() == 2
    per_pair = [network.labels_told(rule, "per pair", 0.0, uniform_of(seed))[0] for seed in range(20)]
    assert all(told.sum() == rule.sum() for told in per_pair)
    assert any((told != told[0]).any() and (told != rule[0]).any() for told in per_pair)


def test_seeds_do_not_touch_one_another():
    for arguments in ({}, dict(form="generative", G=4), dict(form="value", G=4, control="shuffled")):
        together = network.train_small(steps=20, measure=20, seeds=range(3), **arguments)
        alone = network.train_small(steps=20, measure=20, seeds=[1], **arguments)
        assert together["flaw"][:, 1] == pytest.approx(alone["flaw"][:, 0], abs=1e-4)


def test_controls_leave_the_trunk_alone():
    """Stop-gradient: the path is bit for bit that without a classifier, while the head learns to tell."""
    alone = network.train_small(G=8, steps=150, measure=150)
    stopped = network.train_small("value", G=8, control="stop gradient", steps=150, measure=150)
    assert torch.equal(alone["flaw"], stopped["flaw"]) and torch.equal(alone["rho"], stopped["rho"])
    assert (stopped["accuracy"].mean(0) > 0.7).all()
    learnt = network.train_small("value", G=8, steps=150, measure=150)
    assert not torch.equal(alone["flaw"], learnt["flaw"])


@pytest.mark.parametrize("G", [0, 8])
def test_the_remedy_lowers_rho_and_the_flaw_and_shuffled_labels_do_not(G):
    """Eight seeds, theory and training. The remedy comes late, and fails in some seeds: the finding."""
    torch.set_num_threads(1)
    alone = network.train_small(G=G, steps=600, measure=600)
    helped = network.train_small("generative", G=G, steps=600, measure=600)
    assert (alone["flaw"][0] < 0.2).all() and (alone["flaw"][-1] > 0.95).all()
    assert (helped["rho"][-1] < alone["rho"][-1] - 0.05).all()
    assert (helped["flaw"][-1] < 0.1).sum() >= 5 and (helped["flaw"].max(0).values > 0.5).all()
    if G:
        shuffled = network.train_small("generative", G=G, control="shuffled", steps=600, measure=600)
        assert (shuffled["flaw"][-1] > 0.95).all()


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in ((["--out", str(tmp_path / "file" / "x")], "cannot write"),
                             (["--seed", "-1"], "--seed: a number")):
        monkeypatch.setattr(sys, "argv", ["toy_bandit.py", *arguments])
        with pytest.raises(SystemExit) as end:
            toy.main()
        assert words in f"{end.value.code} {capsys.readouterr().err}"

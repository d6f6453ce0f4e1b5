"""Why flaws survive GRPO, and what helps: the paper's argument on problems small enough to compute exactly.

    python toy_bandit.py                  # four tables, four figures in runs/toy, a minute on a laptop

1. *Negative expected advantage.* Inside successful episodes an outcome reward praises a flawed step. In those
   that the flaw makes fail it punishes it more: the expectation over both is negative.
2. *Squeezing.* Pushing an action down moves its mass to the likeliest one; good actions win in the end.
3. *Gradient coupling.* Similar prompts share their gradient: an action right here rises where it is wrong.
4. *The remedy.* Learning to tell good actions from bad ones makes representations differ; coupling falls. It
   does not keep the flaw from rising; it makes it go, not in every seed, and less often where labels err.

Parts 1 to 3 are here; the small network of parts 3 and 4, whose coupling is measured, is in toy_network.py;
all drawing in support/toy_figures.py. Each claim is computed in closed form or by integrating the exact
gradient flow (Runge-Kutta, relative error below 1e-6, tested against closed forms), then checked by sampling
or simulation. Where the paper (arXiv 2509.23870) states a claim without its condition, the figures show where
it holds and where it does not. Every function can be imported and used without running anything.

    p              success probability after a good action
    q, r           part 1: how often the policy takes the flawed action; what it costs, success being p - r
    V, A           value of the policy in a state; advantage of an action over it, both in success probability
    G              samples in a group, whose mean replaces V
    f              part 3: one action, right in some states and flawed in others
    s:  q_s, r_s   a state where f is right: taken with q_s, worth r_s more than the rest
    s': q', r'     a state where f is flawed: taken with q', it costs r' (in code q_prime, r_prime)
    rho            the coupling: cosine between grad log pi(f|s) and grad log pi(f|s')
    rho*           `danger_edge`: the flaw grows where rho is above it
"""

import argparse
import math
import os
from math import comb

import numpy as np
import torch

import toy_network

# =============================================================== 1. the expected advantage of a flawed action
#
# One decision: a flawed action is taken with probability q and lowers the success probability from p to p-r.


def expected_advantage(q, r):
    """E[1{flawed} A] with the exact value as baseline: the lemma q r (q - 1) <= 0.

    V = p - q r, so the flawed action has advantage A = (p - r) - V = -r (1 - q), with probability q.

    >>> round(expected_advantage(0.5, 0.4), 3)
    -0.1
    """
    return q * r * (q - 1.0)


def expected_advantage_by_outcome(q, r, p):
    """The lemma in two halves, E[1{flawed, success} A] >= 0 and E[1{flawed, failure} A] <= 0.

    A = 1 - V in a success, -V in a failure: inside a successful episode a flawed step *is* praised.

    >>> won, lost = expected_advantage_by_outcome(0.5, 0.4, 0.8)
    >>> round(won, 3), round(lost, 3), round(won + lost, 3)
    (0.08, -0.18, -0.1)
    """
    value = p - q * r
    return q * (p - r) * (1 - value), -q * (1 - p + r) * value


def expected_advantage_group(q, r, G):
    """The same with the mean of the sample's own group of G as baseline: the factor 1 - 1/G.

    A_i = R_i - (1/G) sum_j R_j = (1 - 1/G) R_i - (1/G) sum_{j != i} R_j, and the others are independent of i.
    """
    return (1.0 - 1.0 / G) * expected_advantage(q, r)


def expected_advantage_std(q, r, p, G):
    """The same with division by the group's population standard deviation (groups without variance give 0).

    Given m successes in the group, std(m) = sqrt(m/G (1 - m/G)), a success has advantage (1 - m/G)/std(m) and
    a failure -(m/G)/std(m). Whether a sample is flawed depends on its own outcome alone: the group's mean is
        (m/G)(1 - m/G)/std(m) * (P(flawed|success) - P(flawed|failure)) = std(m) * (...),
    and the bracket is <= 0, because a flawed action makes failure likelier. Where all samples succeed, or
    none does, no group has variance: 0.

    >>> expected_advantage_std(q=1.0, r=0.3, p=0.3, G=8), expected_advantage_std(q=0.5, r=0.0, p=1.0, G=8)
    (0.0, 0.0)
    """
    success = p - q * r
    if not 0.0 < success < 1.0:
        return 0.0
    bracket = q * (p - r) / success - q * (1 - p + r) / (1 - success)
    m = np.arange(G + 1)
    chance = np.array([comb(G, k) for k in m]) * success**m * (1 - success) ** (G - m)
    return float((chance * np.sqrt(m / G * (1 - m / G))).sum() * bracket)


def group_outcomes(q, r, p, G):
    """All that can happen in a group: arrays (flawed samples f, their successes a, the others' b, chance)."""
    f, a, b = (x.ravel() for x in np.mgrid[:G + 1, :G + 1, :G + 1])
    possible = (a <= f) & (b <= G - f)
    f, a, b = f[possible], a[possible], b[possible]
    choose = np.array([[comb(n, k) for k in range(G + 1)] for n in range(G + 1)], float)
    def binomial(k, n, x):
        return choose[n, k] * x**k * (1 - x) ** (n - k)
    return f, a, b, binomial(f, G, q) * binomial(a, f, p - r) * binomial(b, G - f, p)


def group_push(q, r, p, G):
    """What one finite group does to the flaw: (P(summed advantage > 0), P(= 0), mean, standard deviation).

    The summed advantage of the flawed samples is a - f (a + b) / G. Its mean is negative; a group may differ.
    """
    f, a, b, chance = group_outcomes(q, r, p, G)
    push = a - f * (a + b) / G
    mean = (chance * push).sum()
    return (chance[push > 1e-12].sum(), chance[np.abs(push) <= 1e-12].sum(), mean,
            np.sqrt((chance * (push - mean) ** 2).sum()))


def groups_needed(q, r, p, G, confidence=1.645):
    """How many groups until their summed push on the flaw is negative with 95% (normal approximation).

    Infinity where there is nothing to punish: q or r is 0, or q is 1.
    """
    mean, std = G * expected_advantage_group(q, r, G), group_push(q, r, p, G)[3]
    return math.ceil((confidence * std / mean) ** 2) if mean < 0 else math.inf


def sample_advantages(q, r, p, G, groups, rng):
    """Monte Carlo: per group the mean of 1{flawed} A for the three baselines; (3, groups)."""
    flawed = rng.random((groups, G)) < q
    reward = (rng.random((groups, G)) < np.where(flawed, p - r, p)).astype(float)
    centered = reward - reward.mean(1, keepdims=True)
    std = reward.std(1, keepdims=True)
    normalized = np.divide(centered, std, out=np.zeros_like(centered), where=std > 0)
    return np.stack([(flawed * a).mean(1) for a in (reward - (p - q * r), centered, normalized)])


def table_1(rng):
    print("1. Expected advantage of the flawed action, E[1{flawed} A]  (40,000 groups, 95% interval)")
    print(f"{'q':>5} {'r':>5} {'p':>5} {'G':>3} | {'in won':>7} {'in lost':>7} | {'exact V':>8} "
          f"{'sampled':>18} | {'group mean':>8} {'sampled':>16} | {'with std':>8} {'sampled':>18} | "
          "reinforced groups")
    for q, r, p, G in ((0.2, 0.3, 0.8, 4), (0.2, 0.3, 0.8, 8), (0.5, 0.5, 0.9, 8), (0.9, 0.3, 0.6, 8),
                       (0.05, 0.2, 0.5, 16)):
        won, lost = expected_advantage_by_outcome(q, r, p)
        exact = (expected_advantage(q, r), expected_advantage_group(q, r, G),
                 expected_advantage_std(q, r, p, G))
        samples = sample_advantages(q, r, p, G, 40_000, rng)
        mean, half = samples.mean(1), 1.96 * samples.std(1) / samples.shape[1] ** 0.5
        cells = " | ".join(f"{e:>8.4f} {m:>9.4f} ± {h:.4f}" for e, m, h in zip(exact, mean, half))
        print(f"{q:5.2f} {r:5.2f} {p:5.2f} {G:3d} | {won:+7.3f} {lost:+7.3f} | {cells} | "
              f"{100 * group_push(q, r, p, G)[0]:9.1f}% {groups_needed(q, r, p, G):6d}")
    print("   in won, in lost: the parts of it from successful and from failed episodes. reinforced: the\n"
          "   chance that one group raises the flaw. groups: so many, and the expectation wins (95%).\n")


# ==================================================================================== 2. the squeezing effect
#
# Three actions under softmax: good (r = 0), mildly and severely flawed. Does the mass of the good one grow?


def push_on_logits(policy, r):
    """dz/dt under the exact policy gradient, for (..., K) policies and (K,) losses r of success probability.

    The value is V = p - sum_j pi_j r_j, and action k alone is worth p - r_k, so
        dz_k/dt = dV/dz_k = pi_k A_k,   A_k = (p - r_k) - V = sum_j pi_j r_j - r_k.
    """
    policy, r = np.asarray(policy), np.asarray(r)
    return policy * ((policy * r).sum(-1, keepdims=True) - r)


def flow(policy, r):
    """d pi / dt = pi_k (pi_k A_k - sum_j pi_j^2 A_j): what `push_on_logits` does to the (..., K) policy.

    >>> bool(flow([0.01, 0.19, 0.80], [0.0, 1.0, 0.1])[0] < 0)   # the good action shrinks, for a while
    True
    """
    push = push_on_logits(policy, r)
    return policy * (push - (policy * push).sum(-1, keepdims=True))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def runge_kutta(slope, z, step):
    """One classical step of dz/dt = slope(z): a path's error falls with the fourth power of `step`."""
    a = slope(z)
    b = slope(z + step / 2 * a)
    c = slope(z + step / 2 * b)
    d = slope(z + step * c)
    return z + step / 6 * (a + 2 * b + 2 * c + d)


def run_flow(start, r, until=0.9, stride=0.05, most=20_000):
    """Follow the exact gradient flow, each step as long as moves no logit by more than about `stride`.

    Steps are halved where the good action would pass `until`, so that the path ends there to a relative 1e-9.
    Returns (times (T,), path (T, K), escape: the time when the good action reaches `until`, or None).
    """
    def slope(z):
        push = push_on_logits(softmax(z), r)
        return push - push.mean()                   # a shift of all logits changes nothing
    logits, now, longest = np.log(np.asarray(start, float)), 0.0, math.inf
    times, path = [now], [softmax(logits)]
    for _ in range(most):
        step = min(stride / np.abs(slope(logits)).max(), longest)
        after = runge_kutta(slope, logits, step)
        if softmax(after)[0] > until:
            if step <= 1e-9 * now:
                return np.array(times), np.array(path), now
            longest = step / 2
            continue
        logits, now = after, now + step
        times.append(now)
        path.append(softmax(logits))
    return np.array(times), np.array(path), None


def negative_step(policy, action, rate):
    """Policy after one gradient step that makes `action` less likely: z -= rate * grad log pi(action).

    The gradient of log pi(a) in the logits is e_a - pi: pushing a down pushes every other logit up *in
    proportion to its own probability*: the likeliest action gains most, good or not (Ren & Sutherland 2024).
    """
    return softmax(np.log(policy) - rate * (np.eye(len(policy))[action] - policy))


def table_2():
    r = np.array([0.0, 1.0, 0.1])  # good, severe, mild
    print("2. Squeezing: good / severe / mild flaw (r = 0, 1, 0.1), exact gradient flow")
    print(f"{'start (good, severe, mild)':>28} {'d good/dt':>11} {'lowest good':>12} {'escape time':>12}   "
          "good after one sampled push-down of the severe flaw")
    for start in ([0.01, 0.19, 0.80], [0.10, 0.45, 0.45], [0.05, 0.80, 0.15], [0.30, 0.10, 0.60],
                  [0.001, 0.199, 0.80]):
        _, path, escape = run_flow(start, r)
        squeezed = negative_step(np.array(start), 1, 0.5)
        print(f"{str(tuple(start)):>28} {flow(start, r)[0]:>+11.5f} {path[:, 0].min():>12.1e} "
              f"{escape or math.inf:>12,.0f}   "
              f"{start[0]:.4f} -> {squeezed[0]:.4f}, mild {start[2]:.2f} -> {squeezed[2]:.4f}")
    print("   `The good action grows` holds in the end; where d good/dt is negative, not at once.\n")


# ======================================================================================= 3. gradient coupling
#
# Action f is right in state s (taken with probability q_s, worth r_s) and flawed in state s' (q', costs r').


def net_push(rho, q_prime, r_prime, q_s, r_s):
    """d z'(f) / dt: its own correction, and what leaks over from the state where f is right.

    With log-linear policies and feature similarity rho between (s, f) and (s', f):
        dz'(f) = pi'(f) A'(f) + rho pi(f) A(f) = -r' q' (1 - q') + rho r_s q_s (1 - q_s).
    """
    return -r_prime * q_prime * (1 - q_prime) + rho * r_s * q_s * (1 - q_s)


def danger_edge(q_prime, r_prime, q_s, r_s):
    """rho*, above which the flaw grows although its expected advantage is negative: net_push = 0.

    >>> [round(danger_edge(q, 0.5, 0.5, 0.5), 2) for q in (0.02, 0.1, 0.5)]      # a rare flaw has a low edge
    [0.08, 0.36, 1.0]
    """
    return r_prime * q_prime * (1 - q_prime) / (r_s * q_s * (1 - q_s))


def simulate_two_states(rho, q_prime, r_prime, q_s, r_s, time=60.0, step=0.1):
    """Both states under gradient flow with the kernel [[1, rho], [rho, 1]].

    Returns the paths of q' and q_s, (2, time/step + 1).
    """
    def slope(z):
        q = 1 / (1 + np.exp(-z))
        own = np.array([-r_prime, r_s]) * q * (1 - q)
        return own + rho * own[::-1]
    z = [np.log([q_prime / (1 - q_prime), q_s / (1 - q_s)])]
    for _ in range(round(time / step)):
        z.append(runge_kutta(slope, z[-1], step))
    return 1 / (1 + np.exp(-np.array(z).T))


def table_3(alone):
    """alone: the small network's paths under the exact policy gradient, from toy_network.train_small."""
    print("3. Coupling: f is right in s (q_s = 0.5, r_s = 0.5) and flawed in s' (r' = 0.5)")
    print(f"{'q´ at start':>12} {'edge rho*':>10} | flaw after one unit of time, rho* - 0.1:   rho* + 0.1:   "
          "highest later, rho* + 0.1:")
    for q in (0.02, 0.05, 0.10, 0.20, 0.80, 0.95):
        edge = danger_edge(q, 0.5, 0.5, 0.5)
        below, above = (simulate_two_states(edge + d, q, 0.5, 0.5, 0.5)[0] for d in (-0.1, 0.1))
        print(f"{q:12.2f} {edge:10.3f} | {below[10]:40.4f} {above[10]:13.4f} {above.max():17.4f}"
              + ("" if edge - 0.1 >= 0 else "   (rho* - 0.1 is negative: opposed gradients)"))
    start = {name: alone[name][0].mean() for name in ("rho", "leak", "own")}
    mean = alone["flaw"].mean(1)
    ratio = alone["ratio"][0]
    print(f"   Small network, {toy_network.RIGHT} states s and {toy_network.FLAWED} states s', eight seeds: "
          f"rho measured {start['rho']:.2f},\n   leak {start['leak']:+.2f} and own correction "
          f"{start['own']:+.2f} nats per unit step, -leak/own {ratio.min():.1f} to {ratio.max():.1f}: "
          "the danger zone.\n   The flaw's expected advantage is negative, yet it grows from "
          f"{mean[0]:.2f} to {mean[-1]:.2f}.\n")


def main():
    parser = argparse.ArgumentParser(description="The theory of GCD in four tables and four figures.")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; the network's first of eight")
    parser.add_argument("--out", default="runs/toy", help="folder for the figures")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed: a number from 0")
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    try:
        os.makedirs(args.out, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise PermissionError(13, "no right to write there")
    except OSError as error:
        raise SystemExit(f"toy_bandit.py: cannot write to --out {args.out}: {error.strerror}")
    from support import toy_figures  # here, so that importing this file needs no matplotlib

    table_1(np.random.default_rng(args.seed))
    table_2()
    seeds = range(args.seed, args.seed + 8)
    paths = {setting: {name: toy_network.train_small(seeds=seeds, **arm) for name, arm in arms.items()}
             for setting, arms in toy_network.ARMS.items()}
    alone = paths["theory"]["policy gradient alone"]
    table_3(alone)
    toy_network.table_4(paths)
    toy_figures.expected_advantage(args.out, expected_advantage, group_push, groups_needed)
    toy_figures.squeezing(args.out, flow, run_flow)
    toy_figures.gradient_coupling(args.out, net_push, danger_edge, simulate_two_states, alone)
    toy_figures.remedy(args.out, paths)
    print(f"four figures in {args.out}")


if __name__ == "__main__":
    main()

"""Why flaws survive GRPO, and what helps: the argument of the paper on problems small enough to compute exactly.

    python toy_bandit.py                    # four tables, four figures in runs/toy, under a minute on a laptop

1. *Negative expected advantage.* An outcome reward already punishes a flawed middle step, in expectation.
2. *Squeezing.* Pushing an action down moves its mass to the likeliest one; good actions win all the same, in the end.
3. *Gradient coupling.* Similar prompts share their gradient: an action that is right here is raised where it is wrong.
4. *The remedy.* Learning to classify actions as good or bad makes the representations differ, and the coupling falls.

Parts 1 to 3 are here; the small network of parts 3 and 4, whose coupling is measured, is in toy_network.py.

Each claim is computed in closed form or by exact gradient flow, then checked by sampling or simulation. Where the
paper (arXiv 2509.23870) states a claim without its condition, the figure shows where it holds and where it does not.
Every function can be imported and used without running anything.
"""

import argparse
import os
from math import comb

import numpy as np
import torch

from toy_network import VARIANTS, train_small

# ===================================================================== 1. the expected advantage of a flawed action
#
# One decision: a flawed action is taken with probability q and lowers the success probability from p to p - r.


def expected_advantage(q, r):
    """E[1{flawed} A] with the exact value as baseline: the lemma q r (q - 1) <= 0.

    V = p - q r, so the flawed action's advantage is A = (p - r) - V = -r (1 - q); it is taken with probability q.

    >>> round(expected_advantage(0.5, 0.4), 3)
    -0.1
    """
    return q * r * (q - 1.0)


def expected_advantage_group(q, r, G):
    """The same with the mean of the sample's own group of G as baseline: the factor 1 - 1/G.

    A_i = R_i - (1/G) sum_j R_j = (1 - 1/G) R_i - (1/G) sum_{j != i} R_j, and the others are independent of i.
    """
    return (1.0 - 1.0 / G) * expected_advantage(q, r)


def expected_advantage_std(q, r, p, G):
    """The same with division by the group's population standard deviation (groups without variance give 0).

    Given m successes in the group, std(m) = sqrt(m/G (1 - m/G)), a success has advantage (1 - m/G)/std(m) and a
    failure -(m/G)/std(m). Whether a sample is flawed depends on its own outcome alone, so the mean over the group is
        (m/G)(1 - m/G)/std(m) * (P(flawed|success) - P(flawed|failure)) = std(m) * (...),
    and the bracket is <= 0, because a flawed action makes failure likelier.
    """
    success = p - q * r
    bracket = q * (p - r) / success - q * (1 - p + r) / (1 - success)
    m = np.arange(G + 1)
    chance = np.array([comb(G, k) for k in m]) * success**m * (1 - success) ** (G - m)
    return float((chance * np.sqrt(m / G * (1 - m / G))).sum() * bracket)


def group_outcomes(q, r, p, G):
    """All that can happen in one group: arrays (flawed samples f, successes among them a, among the rest b, chance)."""
    def binomial(n, x):
        k = np.arange(n + 1)
        return np.array([comb(n, j) for j in k]) * x**k * (1 - x) ** (n - k)
    rows = []
    for f, chance in enumerate(binomial(G, q)):
        joint = chance * np.outer(binomial(f, p - r), binomial(G - f, p))
        rows += [(f, a, b, joint[a, b]) for a in range(f + 1) for b in range(G - f + 1)]
    return np.array(rows).T


def group_push(q, r, p, G):
    """What one finite group does to the flaw: (P(summed advantage > 0), P(= 0), mean, standard deviation).

    The summed advantage of the flawed samples is a - f (a + b) / G. Its mean is negative; a single group may differ.
    """
    f, a, b, chance = group_outcomes(q, r, p, G)
    push = a - f * (a + b) / G
    mean = (chance * push).sum()
    return (chance[push > 1e-12].sum(), chance[np.abs(push) <= 1e-12].sum(), mean,
            np.sqrt((chance * (push - mean) ** 2).sum()))


def groups_needed(q, r, p, G, confidence=1.645):
    """How many groups until their summed push on the flaw is negative with 95% (normal approximation)."""
    *_, mean, std = group_push(q, r, p, G)
    return int(np.ceil((confidence * std / mean) ** 2))


def sample_advantages(q, r, p, G, groups, rng):
    """Monte Carlo: per group the mean of 1{flawed} A for the three baselines; (3, groups)."""
    flawed = rng.random((groups, G)) < q
    reward = (rng.random((groups, G)) < np.where(flawed, p - r, p)).astype(float)
    centered = reward - reward.mean(1, keepdims=True)
    std = reward.std(1, keepdims=True)
    normalized = np.divide(centered, std, out=np.zeros_like(centered), where=std > 0)
    return np.stack([(flawed * a).mean(1) for a in (reward - (p - q * r), centered, normalized)])


def part_1(rng, plt, out):
    print("1. Expected advantage of the flawed action, E[1{flawed} A]   (Monte Carlo: 95% interval, 40,000 groups)")
    print(f"{'q':>5} {'r':>5} {'p':>5} {'G':>3} | {'exact V':>8} {'sampled':>18} | {'group mean':>10} {'sampled':>18} | "
          f"{'with std':>8} {'sampled':>18} | reinforced  groups")
    for q, r, p, G in ((0.2, 0.3, 0.8, 4), (0.2, 0.3, 0.8, 8), (0.5, 0.5, 0.9, 8), (0.9, 0.3, 0.6, 8), (0.05, 0.2, 0.5, 16)):
        exact = (expected_advantage(q, r), expected_advantage_group(q, r, G), expected_advantage_std(q, r, p, G))
        samples = sample_advantages(q, r, p, G, 40_000, rng)
        mean, half = samples.mean(1), 1.96 * samples.std(1) / samples.shape[1] ** 0.5
        cells = " | ".join(f"{e:>8.4f} {m:>9.4f} ± {h:.4f}" for e, m, h in zip(exact, mean, half))
        print(f"{q:5.2f} {r:5.2f} {p:5.2f} {G:3d} | {cells} | {100 * group_push(q, r, p, G)[0]:8.1f}%  {groups_needed(q, r, p, G):5d}")
    print("   'reinforced': the chance that one group raises the flaw; 'groups': so many, and the expectation wins (95%).\n")

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    qs = np.linspace(0.01, 0.99, 60)
    for r, style in ((0.1, ":"), (0.3, "--"), (0.6, "-")):
        axes[0].plot(qs, expected_advantage(qs, r), "k" + style if style != "-" else "k-", label=f"r = {r}")
    axes[0].set(title="In expectation\na flaw is always punished", xlabel="q: how often the flaw is taken", ylabel="E[1{flawed} A] = q r (q - 1)")
    axes[0].axhline(0, color="grey", lw=0.8)
    axes[0].legend()
    for G, color, style in ((4, "#0072B2", "-"), (8, "#D55E00", "--"), (16, "#009E73", "-."), (64, "#000000", ":")):
        axes[1].plot(qs, [group_push(q, 0.2, 0.7, G)[0] for q in qs], color=color, ls=style, label=f"G = {G}")
    axes[1].axhline(0.5, color="grey", lw=0.8)
    axes[1].set(title="Yet one group may reinforce it\n(r = 0.2, p = 0.7)", xlabel="q", ylabel="P(summed advantage of the flaw > 0)", ylim=(0, 0.6))
    axes[1].legend()
    for r, color, style in ((0.1, "#0072B2", "-"), (0.2, "#D55E00", "--"), (0.4, "#009E73", "-.")):
        axes[2].semilogy(qs, [groups_needed(q, r, 0.7, 8) for q in qs], color=color, ls=style, label=f"r = {r}")
    axes[2].set(title="Groups until the expectation wins\n(G = 8, p = 0.7)", xlabel="q", ylabel="groups, for 95%")
    axes[2].legend()
    figure.savefig(os.path.join(out, "1_expected_advantage.png"), dpi=110)


# ============================================================================================ 2. the squeezing effect
#
# Three actions under softmax: good (r = 0), mildly and severely flawed. Does the mass of the good one grow?


def flow(policy, r):
    """d pi / dt under the exact policy gradient, for (..., K) policies and (K,) losses r of success probability.

    The value is V = p - sum_j pi_j r_j, and action k alone is worth p - r_k, so A_k = (p - r_k) - V = sum_j pi_j r_j - r_k.
    Logits follow dz_k/dt = pi_k A_k; softmax then gives d pi_k/dt = pi_k (pi_k A_k - sum_j pi_j^2 A_j).

    >>> bool(flow([0.01, 0.19, 0.80], [0.0, 1.0, 0.1])[0] < 0)   # the good action shrinks, for a while
    True
    """
    policy, r = np.asarray(policy), np.asarray(r)
    advantage = (policy * r).sum(-1, keepdims=True) - r
    push = policy * advantage
    return policy * (push - (policy * push).sum(-1, keepdims=True))


def run_flow(start, r, until=0.9, stride=0.01, most=60_000):
    """Follow the flow by Euler steps on the logits, each as long as moves no logit by more than `stride`.

    Returns (times (T,), path (T, K), escape: the time when the good action's probability passes `until`, or None).
    """
    logits, r, now, times, path = np.log(np.asarray(start, float)), np.asarray(r), 0.0, [], []
    for _ in range(most):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        times.append(now)
        path.append(policy)
        if policy[0] > until:
            return np.array(times), np.array(path), now
        slope = policy * ((policy * r).sum() - r)
        step = stride / np.abs(slope - slope.mean()).max()
        logits, now = logits + step * slope, now + step
    return np.array(times), np.array(path), None


def negative_step(policy, action, rate):
    """Policy after one gradient step that makes `action` less likely: z -= rate * grad log pi(action).

    The gradient of log pi(a) in the logits is e_a - pi: pushing a down pushes every other logit up *in proportion to
    its own probability*, so the likeliest action gains most, good or not (Ren & Sutherland 2024).
    """
    logits = np.log(policy) - rate * (np.eye(len(policy))[action] - policy)
    policy = np.exp(logits - logits.max())
    return policy / policy.sum()


def part_2(rng, plt, out):
    r = np.array([0.0, 1.0, 0.1])  # good, severe, mild
    print("2. Squeezing: good / severe / mild flaw (r = 0, 1, 0.1), exact gradient flow")
    print(f"{'start (good, severe, mild)':>28} {'d good/dt':>11} {'lowest good':>12} {'escape time':>12}   good after one sampled push-down of the severe flaw")
    for start in ([0.01, 0.19, 0.80], [0.10, 0.45, 0.45], [0.05, 0.80, 0.15], [0.30, 0.10, 0.60], [0.001, 0.199, 0.80]):
        _, path, escape = run_flow(start, r)
        squeezed = negative_step(np.array(start), 1, 0.5)
        print(f"{str(tuple(start)):>28} {flow(start, r)[0]:>+11.5f} {path[:, 0].min():>12.5f} {escape or float('inf'):>12,.0f}   "
              f"{start[0]:.4f} -> {squeezed[0]:.4f}, mild {start[2]:.2f} -> {squeezed[2]:.4f}")
    print("   The claim `good grows` holds in the end; where the first column is negative it does not hold at once.\n")

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    grid = np.linspace(0.003, 0.994, 140)
    good, mild = np.meshgrid(grid, grid)
    severe = 1 - good - mild
    inside = severe > 0.002
    policies = np.stack([good, np.where(inside, severe, 0.3), mild], -1)
    slope = np.where(inside, flow(policies, r)[..., 0], np.nan)
    axes[0].contourf(good, mild, slope, levels=[-1, 0, 1], colors=["#bbbbbb", "white"])
    axes[0].contour(good, mild, slope, levels=[0], colors="k", linewidths=1)
    for start, color in (([0.01, 0.19, 0.80], "#D55E00"), ([0.05, 0.80, 0.15], "#0072B2"), ([0.2, 0.3, 0.5], "#009E73"), ([0.03, 0.37, 0.6], "#CC79A7")):
        _, path, _ = run_flow(start, r)
        axes[0].plot(path[:, 0], path[:, 2], color=color)
        axes[0].plot(*path[0, [0, 2]], "o", color=color)
    axes[0].plot([0, 1], [1, 0], "k-", lw=0.8)
    axes[0].set(title="Grey: the good action shrinks at first", xlabel="good", ylabel="mildly flawed", xlim=(0, 1), ylim=(0, 1))
    for start, style in (([0.01, 0.19, 0.80], "-"), ([0.01, 0.80, 0.19], "--")):
        times, path, _ = run_flow(start, r)
        for k, color, name in ((0, "#009E73", "good"), (1, "#D55E00", "severe"), (2, "#0072B2", "mild")):
            axes[1].plot(times, path[:, k], color=color, ls=style, label=f"{name}, from {start[k]:.2f}")
    axes[1].set(title="Squeezed towards the mild flaw first, then out", xlabel="time", ylabel="probability", xscale="symlog")
    axes[1].legend(fontsize=7)
    starts = np.geomspace(1e-3, 0.3, 12)
    for mild_r, style in ((0.05, ":"), (0.1, "--"), (0.3, "-")):
        times = [run_flow([g, (1 - g) * 0.2, (1 - g) * 0.8], [0, 1, mild_r])[2] for g in starts]
        axes[2].loglog(starts, [t or np.nan for t in times], "k" + style, label=f"mild r = {mild_r}")
    axes[2].set(title="Escape time: until good > 0.9", xlabel="initial probability of the good action", ylabel="time")
    axes[2].legend()
    figure.savefig(os.path.join(out, "2_squeezing.png"), dpi=110)


# ============================================================================================= 3. gradient coupling
#
# Action f is right in state s (taken with probability q_s, worth r_s) and flawed in state s' (q', costs r').


def net_push(rho, q_flawed, r_flawed, q_right, r_right):
    """d z'(f) / dt: its own correction, and what leaks over from the state where f is right.

    With log-linear policies and feature similarity rho between (s, f) and (s', f):
        dz'(f) = pi'(f) A'(f) + rho pi(f) A(f) = -r' q' (1 - q') + rho r_s q_s (1 - q_s).
    """
    return -r_flawed * q_flawed * (1 - q_flawed) + rho * r_right * q_right * (1 - q_right)


def danger_edge(q_flawed, r_flawed, q_right, r_right):
    """The similarity above which the flaw grows although its expected advantage is negative: net_push = 0.

    >>> round(danger_edge(0.1, 0.5, 0.5, 0.5), 2), round(danger_edge(0.5, 0.5, 0.5, 0.5), 2)   # a rare flaw: low edge
    (0.36, 1.0)
    """
    return r_flawed * q_flawed * (1 - q_flawed) / (r_right * q_right * (1 - q_right))


def simulate_two_states(rho, q_flawed, r_flawed, q_right, r_right, time=60.0, dt=0.02):
    """Both states under gradient flow with the kernel [[1, rho], [rho, 1]]; paths of (q', q_s), each (T,)."""
    z = np.log([q_flawed / (1 - q_flawed), q_right / (1 - q_right)])
    path = []
    for _ in range(int(time / dt)):
        q = 1 / (1 + np.exp(-z))
        path.append(q)
        own = np.array([-r_flawed, r_right]) * q * (1 - q)
        z = z + dt * (own + rho * own[::-1])
    return np.array(path).T


def part_3(rng, plt, out, seed):
    print("3. Coupling: f is right in s (q_s = 0.5, r_s = 0.5) and flawed in s' (r' = 0.5)")
    print(f"{'q´ at start':>12} {'edge rho*':>10} | flaw at the end of the first time unit: {'rho* - 0.1':>12} {'rho* + 0.1':>12}   highest later, rho* + 0.1")
    for q in (0.02, 0.05, 0.10, 0.20, 0.80, 0.95):
        edge = danger_edge(q, 0.5, 0.5, 0.5)
        below, above = (simulate_two_states(edge + d, q, 0.5, 0.5, 0.5)[0] for d in (-0.1, 0.1))
        print(f"{q:12.2f} {edge:10.3f} | {'':39} {below[50]:12.4f} {above[50]:12.4f}   {above.max():.4f}"
              + ("" if edge - 0.1 >= 0 else "   (rho* - 0.1 is negative: opposed gradients)"))
    alone = train_small(seed=seed)
    pushed = 0.5 * 0.1 * 0.9
    print(f"   A small network on 12 states where f is right and 4 where it is flawed: cosine of policy gradients {alone['rho'][0]:.2f};")
    print(f"   expected advantage of the flaw {-pushed:.3f} < 0, yet it grows from {alone['flaw'][0]:.2f} to {alone['peak']:.2f}.\n")

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    qs, rhos = np.meshgrid(np.linspace(0.005, 0.995, 200), np.linspace(0, 1, 200))
    push = net_push(rhos, qs, 0.5, 0.5, 0.5)
    axes[0].contourf(qs, rhos, push, levels=[0, 1], colors=["#bbbbbb"])
    for r_flawed, style in ((0.5, "-"), (0.25, "--"), (0.1, ":")):
        axes[0].plot(qs[0], np.minimum(danger_edge(qs[0], r_flawed, 0.5, 0.5), 1.02), "k" + style, label=f"edge, r' = {r_flawed}")
    axes[0].set(title="Danger zone (grey, r' = 0.5): the flaw grows", xlabel="q': how often the flaw is taken", ylabel="similarity rho", ylim=(0, 1))
    axes[0].legend(loc="center")
    for q, color in ((0.05, "#0072B2"), (0.2, "#D55E00")):
        edge = danger_edge(q, 0.5, 0.5, 0.5)
        for d, style in ((-0.1, "--"), (0.1, "-")):
            path = simulate_two_states(edge + d, q, 0.5, 0.5, 0.5, time=40)[0]
            axes[1].semilogy(np.arange(len(path)) * 0.02, path, color=color, ls=style, label=f"from {q}, rho = {edge + d:.2f}")
    axes[1].set(title="Both sides of the edge, simulated", xlabel="time", ylabel="probability of the flaw")
    axes[1].legend(fontsize=8)
    axes[2].plot(alone["flaw"], color="#D55E00", label="f where it is flawed")
    axes[2].plot(alone["right"], color="#009E73", ls="--", label="f where it is right")
    axes[2].plot(alone["at"], alone["rho"], "k:", label="measured rho")
    axes[2].set(title="A small network, rho measured", xlabel="update", ylabel="probability, cosine", ylim=(0, 1.03), xscale="symlog", xlim=(0, 1000))
    axes[2].legend(fontsize=8)
    figure.savefig(os.path.join(out, "3_gradient_coupling.png"), dpi=110)


def part_4(rng, plt, out, seed):
    print("4. The remedy: the same network, 1000 updates   (final: mean over the states)")
    print(f"{'':36} {'rho start':>9} {'rho end':>8} {'flaw peak':>10} {'flaw end':>9} {'right end':>10}   flaw below 2% after")
    paths = {}
    for name, arguments in VARIANTS:
        paths[name] = path = train_small(seed=seed, **arguments)
        gone = "never" if path["gone"] is None else f"{path['gone']} updates"
        print(f"{name:36} {path['rho'][0]:9.2f} {path['rho'][-1]:8.2f} {path['peak']:10.3f} {path['flaw'][-1]:9.3f} {path['right'][-1]:10.3f}   {gone}")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    styles = [("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":"), ("#CC79A7", (0, (5, 1)))]
    panels = [("The flaw, with and without the classifier", [0, 1, 3, 4, 6], "flaw"),
              ("The coupling falls most where one classifies", [0, 3, 6, 10, 13], "rho"),
              ("Noisy labels, and what sceptics ask for", [7, 8, 9, 13, 14], "flaw")]
    for axis, (title, chosen, key) in zip(axes, panels):
        for (color, style), i in zip(styles, chosen):
            path = paths[VARIANTS[i][0]]
            axis.plot(path["at"] if key == "rho" else range(len(path[key])), path[key], color=color, ls=style, label=VARIANTS[i][0])
        axis.set(title=title, xlabel="update", ylabel={"flaw": "probability of the flaw", "rho": "measured rho"}[key], ylim=(0, 1.03))
        axis.legend(fontsize=7)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_xlim(0, 1000)
    figure.savefig(os.path.join(out, "4_remedy.png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description="The theory of GCD in four tables and four figures.")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, of the states and of the small network")
    parser.add_argument("--out", default="runs/toy", help="folder for the figures")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"toy_bandit.py: cannot write to --out {args.out}: {error.strerror}")
    rng = np.random.default_rng(args.seed)
    part_1(rng, plt, args.out)
    part_2(rng, plt, args.out)
    part_3(rng, plt, args.out, args.seed)
    part_4(rng, plt, args.out, args.seed)
    print(f"\nfigures in {args.out}: " + ", ".join(sorted(n for n in os.listdir(args.out) if n.endswith(".png"))))


if __name__ == "__main__":
    main()

"""The four figures of toy_bandit.py: drawing alone. What is drawn, functions or paths, is handed in.

Grey zones and line styles carry what colours do (Wong's palette), so that the figures read without colour.
"""

import os

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from toy_network import mean_and_half  # noqa: E402

BLUE, RED, GREEN, PINK, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"


def three_panels(height=4.2):
    return plt.subplots(1, 3, figsize=(13, height), constrained_layout=True)


def save(figure, out, name):
    figure.savefig(os.path.join(out, name), dpi=110)
    plt.close(figure)


def expected_advantage(out, advantage, group_push, groups_needed):
    """Figure 1, from toy_bandit's functions: the expectation, single groups, how many groups it takes."""
    figure, axes = three_panels()
    qs = np.linspace(0.01, 0.99, 60)
    for r, style in ((0.1, ":"), (0.3, "--"), (0.6, "-")):
        axes[0].plot(qs, advantage(qs, r), color=BLACK, ls=style, label=f"r = {r}")
    axes[0].axhline(0, color="grey", lw=0.8)
    axes[0].set(title="Over won and lost episodes together\na flaw is always punished",
                xlabel="q: how often the flaw is taken", ylabel="E[1{flawed} A] = q r (q - 1)")
    for G, color, style in ((4, BLUE, "-"), (8, RED, "--"), (16, GREEN, "-."), (64, BLACK, ":")):
        axes[1].plot(qs, [group_push(q, 0.2, 0.7, G)[0] for q in qs], color=color, ls=style, label=f"G = {G}")
    axes[1].axhline(0.5, color="grey", lw=0.8)
    axes[1].set(title="Yet one group may reinforce it\n(r = 0.2, p = 0.7)", xlabel="q", ylim=(0, 0.6),
                ylabel="P(summed advantage of the flaw > 0)")
    for r, color, style in ((0.1, BLUE, "-"), (0.2, RED, "--"), (0.4, GREEN, "-.")):
        needed = [groups_needed(q, r, 0.7, 8) for q in qs]
        axes[2].semilogy(qs, needed, color=color, ls=style, label=f"r = {r}")
    axes[2].set(title="Groups until the expectation wins\n(G = 8, p = 0.7)", xlabel="q",
                ylabel="groups, for 95%")
    axes[0].legend(loc="center", bbox_to_anchor=(0.5, 0.31))
    axes[1].legend(loc="center", bbox_to_anchor=(0.5, 0.68), ncols=2)
    axes[2].legend(loc="upper center")
    save(figure, out, "1_expected_advantage.png")


def squeezing(out, flow, run_flow):
    """Figure 2, from toy_bandit's functions: where the good action shrinks, two paths, the time to escape."""
    r = np.array([0.0, 1.0, 0.1])  # good, severe, mild
    figure, axes = three_panels()
    good, mild = np.meshgrid(*[np.linspace(0.003, 0.994, 140)] * 2)
    severe = 1 - good - mild
    slope = flow(np.stack([good, np.maximum(severe, 0.002), mild], -1), r)[..., 0]
    slope[severe < 0.002] = np.nan
    axes[0].contourf(good, mild, slope, levels=[-1, 0, 1], colors=["#bbbbbb", "white"])
    axes[0].contour(good, mild, slope, levels=[0], colors="k", linewidths=1)
    for start, color, style in (([0.01, 0.19, 0.80], RED, "-"), ([0.05, 0.80, 0.15], BLUE, "--"),
                                ([0.20, 0.30, 0.50], GREEN, "-."), ([0.03, 0.37, 0.60], PINK, ":")):
        _, path, _ = run_flow(start, r)
        axes[0].plot(path[:, 0], path[:, 2], color=color, ls=style)
        axes[0].plot(*path[0, [0, 2]], "o", color=color)
    axes[0].plot([0, 1], [1, 0], "k-", lw=0.8)
    axes[0].text(0.3, 0.85, "dots: starts; lines: their paths", fontsize=9)
    axes[0].set(title="Grey: the good action shrinks at first", xlabel="good action (r = 0)",
                ylabel="mildly flawed (r = 0.1); the rest: severely (r = 1)", xlim=(0, 1), ylim=(0, 1))
    for start, style in (([0.01, 0.19, 0.80], "-"), ([0.01, 0.80, 0.19], "--")):
        times, path, _ = run_flow(start, r)
        for k, color, name in ((0, GREEN, "good"), (1, RED, "severe"), (2, BLUE, "mild")):
            label = f"{name}, from {start[k]:.2f}"
            axes[1].loglog(times[1:], path[1:, k], color=color, ls=style, label=label)
    axes[1].set(title="Squeezed towards the mild flaw, then out", xlabel="time", ylabel="probability")
    axes[1].legend(fontsize=8, loc="lower left")
    starts = np.geomspace(1e-3, 0.3, 12)
    for mild_r, style in ((0.05, ":"), (0.1, "--"), (0.3, "-")):
        times = [run_flow([g, (1 - g) * 0.2, (1 - g) * 0.8], [0, 1, mild_r])[2] for g in starts]
        axes[2].loglog(starts, [t or np.nan for t in times], "k" + style, label=f"mild r = {mild_r}")
    axes[2].set(title="Escape time: until good = 0.9", xlabel="initial probability of the good action",
                ylabel="time")
    axes[2].legend()
    save(figure, out, "2_squeezing.png")


def gradient_coupling(out, net_push, danger_edge, simulate_two_states, alone):
    """Figure 3, from toy_bandit's functions and the small network's paths without any remedy."""
    figure, axes = three_panels()
    qs, rhos = np.meshgrid(np.linspace(0.005, 0.995, 200), np.linspace(0, 1, 200))
    axes[0].contourf(qs, rhos, net_push(rhos, qs, 0.5, 0.5, 0.5), levels=[0, 1], colors=["#bbbbbb"])
    for r_prime, style in ((0.5, "-"), (0.25, "--"), (0.1, ":")):
        axes[0].plot(qs[0], danger_edge(qs[0], r_prime, 0.5, 0.5), "k" + style)
        axes[0].text(0.5, danger_edge(0.3, r_prime, 0.5, 0.5) - 0.02, f"edge rho*, r' = {r_prime}",
                     ha="center", va="top", fontsize=9)
    axes[0].set(title="Danger zone (grey, r' = 0.5): the flaw grows", ylabel="coupling rho", ylim=(0, 1.02),
                xlabel="q': how often the flaw is taken")
    for q, color in ((0.05, BLUE), (0.2, RED)):
        edge = danger_edge(q, 0.5, 0.5, 0.5)
        for d, style, side in ((-0.1, "--", "below"), (0.1, "-", "above")):
            path = simulate_two_states(edge + d, q, 0.5, 0.5, 0.5, time=40)[0]
            axes[1].semilogy(np.linspace(0, 40, len(path)), path, color=color, ls=style,
                             label=f"rho = {edge + d:.2f}, {side} rho*")
    axes[1].set(title="Both sides of the edge, simulated", xlabel="time", ylabel="q'", ylim=(0.02, 0.6),
                yticks=(0.02, 0.05, 0.1, 0.2, 0.5), yticklabels=("0.02", "0.05", "0.1", "0.2", "0.5"))
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8, ncols=2, loc="upper center")
    for key, at, color, style, label in (("flaw", None, RED, "-", "f where it is flawed"),
                                         ("right", None, GREEN, "--", "f where it is right"),
                                         ("rho", alone["at"], BLACK, ":", "rho, measured")):
        x = np.arange(len(alone[key])) if at is None else at
        axes[2].plot(x, alone[key], color=color, lw=0.7, alpha=0.3)
        axes[2].plot(x, alone[key].mean(1), color=color, ls=style, lw=2, label=label)
    axes[2].set(title="A small network: eight seeds, their mean", xlabel="update", xlim=(0, 100),
                ylabel="probability, cosine", ylim=(0, 1.03))
    axes[2].legend(fontsize=8, loc="lower right")
    save(figure, out, "3_gradient_coupling.png")


def remedy(out, paths):
    """Figure 4, means of eight seeds with 95% t intervals.

    paths: {setting: {arm: what toy_network.train_small returned}}.
    """
    theory, training = paths["theory"], paths["training"]
    value, stop, shuffled = (training[name] for name in ("+ value head, lambda 1", "  with stop-gradient",
                                                         "  with shuffled labels"))
    figure, axes = three_panels(height=5.2)
    panels = [
        ("Theory: exact gradient, true labels", "flaw",
         [(theory["policy gradient alone"], BLACK, "-", "policy gradient alone"),
          (theory["+ value head, lambda 0.3"], BLUE, ":", "+ value head, lambda 0.3"),
          (theory["+ value head, lambda 1"], BLUE, "-", "+ value head, lambda 1"),
          (theory["+ generative, lambda 1"], RED, "--", "+ generative, lambda 1"),
          (theory["stronger cold start"], GREEN, "-.", "stronger cold start")]),
        ("Training: taken actions, labels by rules", "flaw",
         [(training["GRPO alone"], BLACK, "-", "GRPO alone"),
          (value, BLUE, "-", "+ value head, lambda 1"),
          (training["+ generative, lambda 1"], RED, "--", "+ generative, lambda 1"),
          (stop, GREEN, (0, (1, 3)), "value head, stop-gradient"),
          (shuffled, PINK, (0, (4, 4)), "value head, shuffled labels")]),
        ("The coupling, in training", "rho",
         [(training["GRPO alone"], BLACK, "-", "GRPO alone"),
          (value, BLUE, "-", "+ value head, lambda 1"),
          (training["+ generative, lambda 1"], RED, "--", "+ generative, lambda 1"),
          (shuffled, PINK, (0, (4, 4)), "value head, shuffled labels"),
          (training["  with random labels by state"], GREEN, "-.", "value head, random labels by state")]),
    ]
    for axis, (title, key, lines) in zip(axes, panels):
        for path, color, style, label in lines:
            x = path["at"] if key == "rho" else np.arange(len(path[key]))
            mean, half = mean_and_half(path[key])
            if key == "flaw":
                label += f" (goes in {(path[key][-1] < 0.02).sum()} of 8 seeds)"
            axis.plot(x, mean, color=color, ls=style, label=label)
            low, high = (mean - half).clamp(min=0), (mean + half).clamp(max=1)
            axis.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        axis.set(title=title, xlabel="update", ylim=(0, 1.03), xlim=(0, 1000),
                 ylabel={"flaw": "probability of the flaw", "rho": "rho, measured"}[key])
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[2].text(500, 0.3, "lines: means of eight seeds\nbands: 95% t intervals", ha="center", fontsize=9)
    save(figure, out, "4_remedy.png")

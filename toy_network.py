"""The smallest actor whose gradient coupling can be measured, and cured: used by toy_bandit.py, parts 3 and 4.

Many similar states and a small neural policy. Nothing about the coupling is set by hand: rho is the cosine between
the policy gradients of the same action in a state where it is right and in one where it is flawed. The classification
losses are those of classifier_loss.py in miniature: they share the trunk with the policy, and that is their effect.

>>> alone, helped = train_small(steps=300, measure=300), train_small("value", coef=1.0, steps=300, measure=300)
>>> alone["peak"] > 0.9, helped["rho"][-1] < alone["rho"][-1] - 0.1      # the flaw takes over; rho falls
(True, True)
"""

import numpy as np
import torch
from torch.nn import functional as F


class SmallPolicy(torch.nn.Module):
    """A softmax policy over K actions with a trunk that the classifier shares: the smallest thing like an actor.

    The trunk reads a state, and where it classifies, the action taken and whether a question follows, just as a
    language model reads on after its own action. tokens: K actions, then the verdicts "bad" and "good".
    """

    def __init__(self, states, K=4, width=32, seed=0, decoupled=False):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        new = lambda *shape, scale: torch.nn.Parameter(scale * torch.randn(*shape, generator=g))
        self.states, self.K, self.decoupled = states, K, decoupled
        copies = K if decoupled else 1  # decoupled: every action has a trunk of its own
        d = states.shape[1]
        self.read_state = new(copies, d, width, scale=1.0)
        self.read_action, self.read_question = new(K, width, scale=0.5), new(width, scale=0.5)
        self.mix = new(copies, width, width, scale=width**-0.5)
        self.head, self.value = new(width, K + 2, scale=width**-0.5), new(width, scale=width**-0.5)
        self.bias = torch.nn.Parameter(torch.zeros(K + 2))

    def trunk(self, more=0.0, copy=0):
        hidden = torch.tanh(self.states @ self.read_state[copy] + more)
        return torch.tanh(hidden @ self.mix[copy])                                            # (S, width)

    def log_policy(self):
        """(S, K) log-probabilities of the actions in every state."""
        if self.decoupled:
            logits = torch.stack([self.trunk(copy=k) @ self.head[:, k] for k in range(self.K)], 1)
        else:
            logits = self.trunk() @ self.head[:, :self.K]
        return torch.log_softmax(logits + self.bias[:self.K], -1)

    def classify(self, form):
        """(S, K) log-odds of "good" for every action in every state; generative: by the output layer's verdicts."""
        read = self.read_action[:, None] + (self.read_question if form == "generative" else 0.0)  # (K, 1, width)
        after = self.trunk(read)                                                                   # (K, S, width)
        if form == "generative":
            logits = after @ self.head[:, self.K:] + self.bias[self.K:]
            return (logits[..., 1] - logits[..., 0]).T
        return (after @ self.value).T


def similar_states(right=12, wrong=4, similarity=0.9, dimension=24, seed=0):
    """(S, d) unit vectors with about this cosine to one another: prompts that differ in a few words."""
    g = torch.Generator().manual_seed(seed)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    own = unit(torch.randn(right + wrong, dimension, generator=g))
    shared = unit(torch.randn(dimension, generator=g))
    return unit(similarity**0.5 * shared + (1 - similarity) ** 0.5 * own)


def gradient_of(policy, state, action):
    """grad log pi(action | state), all parameters in one vector."""
    value = policy.log_policy()[state, action]
    gradients = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(policy.parameters(), gradients)])


def coupling(policy, right, wrong, action=0):
    """rho, measured: mean cosine between grad log pi(f|s) and grad log pi(f|s') over pairs of states."""
    a = F.normalize(torch.stack([gradient_of(policy, s, action) for s in right]), dim=1)
    b = F.normalize(torch.stack([gradient_of(policy, s, action) for s in wrong]), dim=1)
    return (a @ b.T).mean().item()


def train_small(form="none", coef=0.3, flip=0.0, rate=0.3, entropy=0.0, cold=0, decoupled=False, steps=1000, seed=0,
                start=0.10, r_right=0.5, r_wrong=0.5, measure=100):
    """Exact expected policy gradient on all states (+ coef * classification loss). Returns a dictionary of paths.

    Action 0 is f: right in the first 12 states (r_right better than the others), flawed in the last 4 (r_wrong worse).
    The policy starts with pi(f) = `start` everywhere. `flip`: share of good/bad labels that are wrong. `cold`: steps of
    supervised cold start on the right actions.
    """
    right, wrong = range(12), range(12, 16)
    states = similar_states(seed=seed)
    policy = SmallPolicy(states, seed=seed, decoupled=decoupled)
    with torch.no_grad():
        policy.head[:, :policy.K] *= 0.3
        policy.bias[0] = np.log(start / (1 - start) * (policy.K - 1))
    reward = torch.zeros(16, policy.K)
    reward[:12, 0], reward[12:, 0] = r_right, -r_wrong
    good = (reward == reward.max(1, keepdim=True).values).float()
    g = torch.Generator().manual_seed(seed + 1)
    labels = torch.where(torch.rand(good.shape, generator=g) < flip, 1 - good, good)
    balance = labels / labels.sum() / 2 + (1 - labels) / (1 - labels).sum() / 2   # each class counts half
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    for _ in range(cold):
        optimizer.zero_grad()
        (-(good / good.sum(1, keepdim=True) * policy.log_policy()).sum(1).mean()).backward()
        optimizer.step()
    path = {"flaw": [], "right": [], "rho": [], "at": []}
    for step in range(steps + 1):
        log_policy = policy.log_policy()
        pi = log_policy.exp()
        path["flaw"].append(pi[12:, 0].mean().item())
        path["right"].append(pi[:12, 0].mean().item())
        if step % measure == 0:
            path["rho"].append(coupling(policy, list(right)[:4], wrong))
            path["at"].append(step)
        loss = -(pi * reward).sum(1).mean() + entropy * (pi * log_policy).sum(1).mean()
        if form != "none":
            loss = loss + coef * F.binary_cross_entropy_with_logits(policy.classify(form), labels, balance, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path["peak"] = max(path["flaw"])
    below = [i for i, q in enumerate(path["flaw"]) if q > 0.02]
    path["gone"] = below[-1] + 1 if below and below[-1] < steps else (0 if not below else None)
    return path


VARIANTS = [  # (name, arguments of train_small)
    ("policy gradient alone", {}),
    ("+ generative, lambda 0.03", dict(form="generative", coef=0.03)),
    ("+ generative, lambda 0.1", dict(form="generative", coef=0.1)),
    ("+ generative, lambda 0.3", dict(form="generative", coef=0.3)),
    ("+ value head, lambda 0.03", dict(form="value", coef=0.03)),
    ("+ value head, lambda 0.1", dict(form="value", coef=0.1)),
    ("+ value head, lambda 0.3", dict(form="value", coef=0.3)),
    ("+ value head 0.3, 10% noisy labels", dict(form="value", coef=0.3, flip=0.1)),
    ("+ value head 0.3, 20% noisy labels", dict(form="value", coef=0.3, flip=0.2)),
    ("+ value head 0.3, 30% noisy labels", dict(form="value", coef=0.3, flip=0.3)),
    ("a trunk per action", dict(decoupled=True)),
    ("learning rate / 5", dict(rate=0.06)),
    ("+ entropy bonus 0.05", dict(entropy=0.05)),
    ("+ entropy bonus 0.1", dict(entropy=0.1)),
    ("stronger cold start", dict(cold=100)),
]

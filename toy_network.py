"""The smallest actor whose gradient coupling can be measured, split and cured: toy_bandit.py, parts 3 and 4.

Sixteen similar states and a small neural policy; action f (number 0) is right in twelve of them (s) and
flawed in four (s'). Nothing about the coupling is set by hand: rho is the cosine between the policy gradients
of f in s and in s'. Two settings:

    theory     the exact expected policy gradient; every action of every state is classified, by the truth
    training   as train.py has it: G sampled actions a state, won or lost, advantages by grpo.py; only actions
               that were taken are classified, and a label says no more than whether a rule flags the action
               as flawed (`--labels flaws`: other useless actions pass as good)

Both use the losses of classifier_loss.py, weighted so that each class counts half. Every quantity has a
leading axis of N seeds, trained side by side, each with its own states, weights and samples.
toy_bandit.py lists the symbols.

>>> alone, helped = (train_small(form, steps=400, seeds=range(2)) for form in (None, "value"))
>>> bool((alone["flaw"][-1] > 0.9).all()), bool((helped["rho"][-1] < alone["rho"][-1] - 0.1).all())
(True, True)
"""

import torch
from torch.nn import functional as F

from classifier_loss import BAD, GOOD, generative_loss, value_head_loss
from grpo import group_advantages

SEEDS = range(8)
RIGHT, FLAWED, K = 12, 4, 4              # states s, states s', actions
S = RIGHT + FLAWED
IS_FLAWED = torch.zeros(S, K, dtype=torch.bool)
IS_FLAWED[RIGHT:, 0] = True              # what a rule can flag: f in s'


class SmallPolicy(torch.nn.Module):
    """N softmax policies over K actions, each with a trunk that its classifier shares: hardly an actor.

    The trunk reads a state, and where it classifies, the action taken and whether a question follows, just as
    a language model reads on after its own action. Outputs: K actions, then the verdicts "bad" and "good".
    """

    def __init__(self, seeds=SEEDS, start=0.1, similarity=0.9, dimension=24, width=32, decoupled=False):
        """start: pi(f), about the same in every state. similarity: the cosine between states, about, like
        that of prompts which differ in a few words. decoupled: every action has a trunk of its own."""
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        def new(*shape, scale=1.0):
            return scale * torch.stack([torch.randn(*shape, generator=g) for g in generators])
        # (N, S, d), from a part of each state's own and a part that all share
        own, shared = F.normalize(new(S, dimension), dim=-1), F.normalize(new(1, dimension), dim=-1)
        self.states = F.normalize(similarity**0.5 * shared + (1 - similarity) ** 0.5 * own, dim=-1)
        copies = K if decoupled else 1
        weights = {"read_state": new(copies, dimension, width),
                   "mix": new(copies, width, width, scale=width**-0.5),
                   "read_action": new(K, 1, width, scale=0.5), "read_question": new(1, 1, width, scale=0.5),
                   "head": new(K + 2, width, scale=width**-0.5), "value": new(width, 1, scale=width**-0.5),
                   "bias": torch.zeros(len(generators), K + 2)}
        weights["head"][:, :K] *= 0.3                                   # at the start the bias decides
        weights["bias"][:, 0] = torch.logit(torch.tensor(start)) + torch.tensor(K - 1.0).log()
        for name, weight in weights.items():
            setattr(self, name, torch.nn.Parameter(weight))

    def trunk(self, read=0.0):
        """(N, 1, S, width), or (N, K, S, width) where `read` (N, K, 1, width) tells what was done."""
        return torch.tanh(torch.tanh(self.states[:, None] @ self.read_state + read) @ self.mix)

    def log_policy(self):
        """(N, S, K) log-probabilities of the actions in every state."""
        logits = (self.trunk() * self.head[:, :K, None]).sum(-1).mT + self.bias[:, None, :K]
        return torch.log_softmax(logits, -1)

    def classify(self, form, stop_gradient=False):
        """(N, S, K) log-odds of "good" for every action of every state; generative: by its two verdicts."""
        after = self.trunk(self.read_action + (self.read_question if form == "generative" else 0.0))
        if stop_gradient:           # the classifier learns from the trunk, the trunk learns nothing of it
            after = after.detach()                                                          # (N, K, S, width)
        if form == "value":
            return (after @ self.value[:, None])[..., 0].mT
        verdicts = after @ self.head[:, None, K:].mT + self.bias[:, None, None, K:]           # (N, K, S, 2)
        return (verdicts[..., GOOD] - verdicts[..., BAD]).mT


# ------------------------------------------------------------------------------------- measuring the coupling

def gradient(values, policy):
    """(N,) values, one per seed -> (N, P), the gradient of each in all P parameters of its own policy."""
    parameters = list(policy.parameters())
    parts = torch.autograd.grad(values.sum(), parameters, allow_unused=True, retain_graph=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts)]
    return torch.cat([g.flatten(1) for g in parts], 1)


def coupling(policy, in_s=range(4), in_s_prime=range(RIGHT, S)):
    """rho, measured: mean cosine between grad log pi(f|s) and grad log pi(f|s') over pairs of states. (N,)"""
    f = policy.log_policy()[..., 0]                                                           # (N, S)
    a, b = (F.normalize(torch.stack([gradient(f[:, state], policy) for state in states], 1), dim=-1)
            for states in (in_s, in_s_prime))
    return (a @ b.mT).mean((1, 2))


def split_gradient(policy, success, flawed=IS_FLAWED, acting=None):
    """The exact expected policy gradient in two parts: G_u of unflawed actions and G_f of flawed ones.

        grad V = mean_s sum_k pi(k|s) A(s, k) grad log pi(k|s) = G_u + G_f
        A(s, k) = R(s, k) - sum_j pi(j|s) R(s, j)

    Args:
        policy: any module whose log_policy() is (N, S, K) and whose parameters have N in front.
        success: (S, K) probability R to succeed after each action.
        flawed: (S, K) bool, which actions count as flawed.
        acting: (S,) bool, the states that the mean is over (None: all).
    Returns: G_u, G_f, both (N, P), pointing where the value rises.
    """
    log_policy = policy.log_policy()
    pi = log_policy.exp().detach()
    weight = pi * (success - (pi * success).sum(-1, keepdim=True))                            # (N, S, K)
    acting = torch.ones(len(success)) if acting is None else acting.float()
    push = weight * log_policy * (acting / acting.sum())[:, None]
    return tuple(gradient((push * part).sum((1, 2)), policy) for part in (~flawed, flawed))


def split_update(policy, success, flawed=IS_FLAWED, held_out=None):
    """What a small step along either part of the gradient does to log pi(flawed action), to first order.

    Is this policy in the danger zone? leak: the change per unit step along G_u, what reinforcing all the rest
    does to the flaw. own: along G_f, what punishing the flaw does to it. Flawed actions count as often as
    they are taken (weights pi, held fixed). net = leak + own is the change under the whole gradient; with own
    < 0 the flaw grows where ratio = -leak / own > 1. In two log-linear states that is where rho > rho*,
    `toy_bandit.danger_edge`. Away from the edge the ratio is not rho / rho*: G_u also holds the other actions
    of s', which push f down as they rise.

    Args: as for `split_gradient`. held_out: (S,) bool, states that give no gradient, and whose flawed actions
        alone are read (None: every state gives both).
    Returns: a dictionary of (N,) tensors: leak, own, net (nats per unit step), ratio.
    """
    G_u, G_f = split_gradient(policy, success, flawed, None if held_out is None else ~held_out)
    log_policy = policy.log_policy()
    read = log_policy.exp().detach() * flawed * (1.0 if held_out is None else held_out[:, None])
    probe = gradient((read * log_policy).sum((1, 2)) / read.sum((1, 2)), policy)              # (N, P)
    leak, own = (G_u * probe).sum(1), (G_f * probe).sum(1)
    return {"leak": leak, "own": own, "net": leak + own, "ratio": -leak / own}


# --------------------------------------------------------------------------------------------------- training

def success_table(p=0.75, r_s=0.5, r_prime=0.5):
    """(S, K) success probabilities: p, less r_s for all but f in s, less r' for f in s'."""
    success = torch.full((S, K), p)
    success[:RIGHT, 1:] -= r_s
    success[RIGHT:, 0] -= r_prime
    return success


def labels_told(good, control, flip, uniform):
    """(N, S, K) bool, what is good -> what the classifier is told: with errors, or a control's labels."""
    if control == "per action":              # a label for each action, the same in all states; half are good
        good = (uniform(1, K).argsort(-1) < K // 2).expand(-1, S, K)
    if control == "per pair":                # as many good and bad ones as the rule has, dealt out at random
        good = good.flatten(1).gather(1, uniform(S * K).argsort(1)).view(-1, S, K)
    return good ^ (uniform(S, K) < flip)     # the same pairs of state and action are mislabelled throughout


def class_balance(labels):
    """(N, ...) labels -> weights of that shape: classes that occur count the same; they sum to 1 per seed."""
    flat = labels.flatten(1)
    shares = [(flat == c) / (flat == c).sum(1, keepdim=True).clamp(min=1) for c in (GOOD, BAD)]
    return (sum(shares) / sum(shares).sum(1, keepdim=True)).view(labels.shape)


def classification_loss(policy, form, actions, labels, stop_gradient=False):
    """L_cls of classifier_loss.py, summed over the seeds, for (N, S, G) actions and their labels."""
    log_odds = policy.classify(form, stop_gradient).gather(2, actions)                        # (N, S, G)
    if form == "value":
        return value_head_loss(log_odds, labels, class_balance(labels))
    verdict_logprobs = F.logsigmoid(torch.where(labels == GOOD, log_odds, -log_odds))    # of the true verdict
    return generative_loss(verdict_logprobs, class_balance(labels))


def sampled_policy_loss(log_policy, actions, success, uniform):
    """L_GRPO of G sampled actions in each state, which form a group, summed over the seeds.

    Each sample is used once: the ratio is 1 and the clip never acts. Without division by the group's standard
    deviation (Dr. GRPO) the expectation is the exact gradient times 1 - 1/G: lambda and time mean the same.
    """
    N, _, G = actions.shape
    won = uniform(S, G) < success.expand(N, S, K).gather(2, actions)
    groups = torch.arange(N * S).repeat_interleave(G)
    advantages = group_advantages(won.flatten().float(), groups, normalize_std=False)[0].view(N, S, G)
    return -(advantages * log_policy.gather(2, actions)).mean((1, 2)).sum()


def train_small(form=None, coef=1.0, G=0, control=None, flip=0.0, rate=0.3, entropy=0.0, cold=0, first=0,
                decoupled=False, steps=1000, seeds=SEEDS, start=0.1, r_s=0.5, r_prime=0.5, measure=50):
    """Train N small policies by gradient descent on L_policy + coef * L_cls. Returns a dictionary of paths.

    Args:
        form: None, "generative" or "value": which classifier. coef: lambda.
        G: 0 for the setting `theory`, else `training`, with so many sampled actions a state and update.
        control: what must not help. "stop gradient": the trunk learns nothing of the classifier; "shuffled":
            labels permuted within the batch, anew in every update; the others: see `labels_told`.
        flip: share of the pairs of state and action whose label is wrong.
        entropy: coefficient of an entropy bonus. cold: supervised updates on the right actions, before.
        first: updates by the classification loss alone, before; afterwards there is none.
        measure: every so many updates rho, leak, own, net and ratio are measured.
    Returns: flaw, right: (steps + 1, N), mean pi(f) in s' and in s; at: (M,) updates, and (M, N) rho, leak,
        own, net, ratio there; with a classifier accuracy: (N, 2), the share of states s where it calls f good
        at the end, and of states s' where it calls f bad.
    """
    policy = SmallPolicy(seeds, start=start, decoupled=decoupled)
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    success = success_table(r_s=r_s, r_prime=r_prime)
    best = success == success.max(1, keepdim=True).values

    def uniform(*shape):
        return torch.stack([torch.rand(*shape, generator=g) for g in generators])             # (N, *shape)
    told = labels_told((~IS_FLAWED if G else best).expand(len(seeds), S, K), control, flip, uniform)

    def actions_to_learn_from(pi):
        if not G:
            return torch.arange(K).expand(len(pi), S, K)
        return (uniform(S, G, 1) > pi.cumsum(-1)[:, :, None, :-1]).sum(-1)             # (N, S, G), from pi

    def classification(actions):
        labels = told.gather(2, actions).long()                                               # 1 GOOD, 0 BAD
        if control == "shuffled":
            labels = labels.flatten(1).gather(1, uniform(labels[0].numel()).argsort(1)).view_as(labels)
        return coef * classification_loss(policy, form, actions, labels, control == "stop gradient")

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(cold):
        update(-(best / best.sum(1, keepdim=True) * policy.log_policy()).sum(2).mean(1).sum())
    for _ in range(first):
        update(classification(actions_to_learn_from(policy.log_policy().detach().exp())))
    path = {name: [] for name in ("flaw", "right", "at", "rho", "leak", "own", "net", "ratio")}
    for step in range(steps + 1):
        log_policy = policy.log_policy()                                                      # (N, S, K)
        pi = log_policy.detach().exp()
        path["flaw"].append(pi[:, RIGHT:, 0].mean(1))
        path["right"].append(pi[:, :RIGHT, 0].mean(1))
        if step % measure == 0:
            measured = {"at": torch.tensor(step), "rho": coupling(policy), **split_update(policy, success)}
            for name, value in measured.items():
                path[name].append(value)
        if step == steps:
            break
        actions = actions_to_learn_from(pi)
        if G:
            loss = sampled_policy_loss(log_policy, actions, success, uniform)
        else:
            loss = -(log_policy.exp() * success).sum(2).mean(1).sum()
        if entropy:
            loss = loss + entropy * (log_policy.exp() * log_policy).sum(2).mean(1).sum()
        if form and not first:
            loss = loss + classification(actions)
        update(loss)
    path = {name: torch.stack(values) for name, values in path.items()}
    if form:
        good = (policy.classify(form).detach()[..., 0] > 0).float()                           # (N, S), of f
        path["accuracy"] = torch.stack([good[:, :RIGHT].mean(1), 1 - good[:, RIGHT:].mean(1)], 1)
    return path


# What came out, seeds 0 to 15 (default and `--seed 8`). By training's labels and lambda 1 the flaw goes in 15
# of 16 seeds, either form; at lambda 0.3 in 11 (value head) and 4 (generative). It dominates first, always.
# One label in ten wrong: 8; three in ten: 3, though rho falls as far. Stop-gradient, shuffled, random labels:
# 0; what labels say is what helps. Nor do rho or -leak/own at the start foretell it: the classifier alone,
# before GRPO, hardly lowers the one and raises the other (3.2 to 3.7), and yet 15 of 16 flaws go.
ARMS = {  # setting: {name: arguments of train_small}
    "theory": {
        "policy gradient alone": dict(),
        "+ generative, lambda 0.3": dict(form="generative", coef=0.3),
        "+ generative, lambda 1": dict(form="generative"),
        "+ value head, lambda 0.3": dict(form="value", coef=0.3),
        "+ value head, lambda 1": dict(form="value"),
        "a trunk per action": dict(decoupled=True),
        "learning rate / 5": dict(rate=0.06),
        "+ entropy bonus 0.1": dict(entropy=0.1),
        "stronger cold start": dict(cold=100),
    },
    "training": {
        "GRPO alone": dict(G=8),
        "+ generative, lambda 0.3": dict(G=8, form="generative", coef=0.3),
        "+ generative, lambda 1": dict(G=8, form="generative"),
        "+ value head, lambda 0.3": dict(G=8, form="value", coef=0.3),
        "+ value head, lambda 1": dict(G=8, form="value"),
        "  with stop-gradient": dict(G=8, form="value", control="stop gradient"),
        "  with shuffled labels": dict(G=8, form="value", control="shuffled"),
        "  with a random label per action": dict(G=8, form="value", control="per action"),
        "  with random labels by state": dict(G=8, form="value", control="per pair"),
        "  with 10% wrong labels": dict(G=8, form="value", flip=0.1),
        "  with 30% wrong labels": dict(G=8, form="value", flip=0.3),
        "  before GRPO only, 500 updates": dict(G=8, form="value", first=500),
    },
}


T_QUANTILE = 2.365  # Student's t, 97.5%, 7 degrees of freedom


def mean_and_half(values):
    """(..., 8) values -> (...) means over the eight seeds, and half widths of their 95% t intervals."""
    return values.mean(-1), T_QUANTILE * values.std(-1) / values.shape[-1] ** 0.5


def table_4(paths):
    """paths: {setting: {arm: what train_small returned}}, of eight seeds."""
    print("4. The remedy: the small network, eight seeds (± half of the 95% t interval over the seeds)")
    head = [("-leak/own", "at start"), ("rho", "at end"), ("flaw", "highest"), ("flaw", "at end"),
            ("right", "at end"), ("flaw < 2%", "at end"), ("classifier", "right in s, s'")]
    for setting, arms in paths.items():
        for left, titles in zip((setting, ""), zip(*head)):
            print(f"   {left:33}" + "".join(f"{title:14}" for title in titles).rstrip())
        for name, path in arms.items():
            cells = [path["rho"][-1], path["flaw"].max(0).values, path["flaw"][-1], path["right"][-1]]
            row = [f"{path['ratio'][0].median():.1f}"]
            row += ["{:.2f} ± {:.2f}".format(*mean_and_half(cell)) for cell in cells]
            row.append(f"{(path['flaw'][-1] < 0.02).sum()} of {len(cells[0])}")
            if "accuracy" in path:
                row.append(", ".join(f"{100 * share:.0f}%" for share in path["accuracy"].mean(0)))
            print(f"   {name:33}" + "".join(f"{c:14}" for c in row).rstrip())
    gone = {name.strip(): (path["flaw"][-1] < 0.02).sum() for name, path in paths["training"].items()}
    highest = paths["training"]["+ value head, lambda 1"]["flaw"].max(0).values.mean()
    print(f"   With training's labels, value head, lambda 1, the flaw rises to {highest:.2f}, then goes in\n"
          f"   {gone['+ value head, lambda 1']} of 8 seeds; with every tenth label wrong in "
          f"{gone['with 10% wrong labels']}, with shuffled labels in {gone['with shuffled labels']}, "
          f"with stop-gradient in {gone['with stop-gradient']}.\n")

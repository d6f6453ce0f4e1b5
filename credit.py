"""Credit rules: from the episodes of whole groups to an advantage for every step. Needs torch and grpo.py.

    advantages = CREDIT["gigpo"](episodes, normalize_std=True)       # (S,), in the order episode, then step

A group is G episodes of one game from one state; `episode.group` tells the groups apart. GRPO gives every
step of an episode the same advantage. The others look closer, and are GRPO where they find nothing to look
at:

    rule      looks at                                          GRPO where
    grpo      the outcome                                       always
    rlvmr     the tag a step opens with (its rewards)           no step has a tag
    gigpo     steps that start in the same state                no two do
    hgpo      steps after the same last observations            none are, and base=True (without: 0)
    graphgpo  the distance to success in the graph of states    no two steps start in the same state
    adca      good and bad labels                               no step has one
    penalty   flawed steps                                      no step is flawed
    unflawed  the outcome, for unflawed steps alone             no step is flawed
    flawed    the outcome, for flawed steps alone               every step is flawed

The last three are for experiments: `unflawed` and `flawed` train by one part of GRPO's gradient each, those
that coupling.py tells apart, and `penalty` is what one tries before anything cleverer.

Throughout, z_P(x) = (x - mean_P(x)) / (std_P(x) + eps) compares a number with a pool P of its like, by the
population's standard deviation as in grpo.py; it is 0 for who is alone in a pool, and in a pool without
variance. With normalize_std=False only the mean is subtracted. R_i is the reward of episode i, r_t that of
its step t.

A state is the world's (a digest of it), where the published code of gigpo and graphgpo goes by the text of
the observation; hgpo goes by the text here too, since its groups are about what the policy has read.

At the end, EPO's entropy smoothing (`epo`): not a rule but a term of the loss.

S steps, E episodes. What the rules read: `Step` and `Episode` in rollout.py.
"""

import math
from collections import defaultdict

import torch

from grpo import group_advantages

GOAL = "success"  # GraphGPO's last node; the states of games are numbers


def steps_of(episodes):
    """[(episode, t, step)] in the order in which all advantages are given. S of them."""
    return [(episode, t, step) for episode in episodes for t, step in enumerate(episode.steps)]


def among(values, pools, normalize_std=True):
    """z_P(x) of every value: (n,) numbers and (n,) hashable names of their pools -> (n,) float tensor."""
    number = {}
    pools = [number.setdefault(pool, len(number)) for pool in pools]
    values = torch.tensor(values, dtype=torch.float64)
    return group_advantages(values, torch.tensor(pools), normalize_std)[0] if pools else values.float()


def discounted_returns(episodes, gamma):
    """G_t = r_t + gamma G_(t+1) of every step, a list of S floats."""
    returns = []
    for episode in episodes:
        if abs(sum(step.reward for step in episode.steps) - episode.reward) > 1e-3:
            raise ValueError(f"{episode.game}: its steps' rewards do not add up to its {episode.reward:g}")
        follow = []
        for step in reversed(episode.steps):
            follow.append(step.reward + gamma * (follow[-1] if follow else 0.0))
        returns += reversed(follow)
    return returns


# -------------------------------------------------------------------------------------------------- the rules

def grpo(episodes, normalize_std=True, labels=None):
    """The outcome for every step (Shao et al. 2024, arXiv 2402.03300; without std: Liu et al. 2025).

        A_t = z_group(R_i)                                                                        (1)
    """
    outcome = among([e.reward for e in episodes], [e.group for e in episodes], normalize_std)     # (E,)
    return outcome.repeat_interleave(torch.tensor([len(e.steps) for e in episodes]))              # (S,)


def tag_rewards(episode, penalty=-0.1):
    """RLVMR's rewards of an episode's steps, a list of floats.

      planning    1 where the episode succeeds
      explore     1 where the action is new in this episode
      reflection  1 where the step before failed (malformed, inadmissible or without effect), and the action
                  is another one
      monitor     0
      no tag      0; `penalty` where the answer is malformed
    """
    rewards, done, before = [], set(), None
    for step in episode.steps:
        failed = before is not None and (before.malformed or before.inadmissible or before.no_effect)
        rewards.append(penalty if step.malformed else float(
            (step.tag == "planning" and episode.won) or (step.tag == "explore" and step.action not in done)
            or (step.tag == "reflection" and failed and step.action != before.action)))
        done.add(step.action)
        before = step
    return rewards


def rlvmr(episodes, normalize_std=True, labels=None, alpha=0.5):
    """Rewards for the four kinds of thought (Zhang et al. 2025, arXiv 2507.22844, eqs. 2-4).

        A_t = alpha z_group(R_i) + (1 - alpha) z_(group, tag)(m_t)            m_t: `tag_rewards`  (2)

    Its code has one pool for all steps without a rewarded tag, monitoring and malformed ones alike, and so
    have we: among malformed steps alone the penalty, the same for all, would be normalised away. That code
    adds a weighted second term to a whole first one; we weigh as the paper does. A group without any tag is
    left to its outcome: there RLVMR is GRPO.
    """
    steps, outcome = steps_of(episodes), grpo(episodes, normalize_std)
    tagged = {e.group for e, _, step in steps if step.tag}
    alpha = torch.tensor([alpha if e.group in tagged else 1.0 for e, *_ in steps])                      # (S,)
    pools = [(e.group, step.tag if step.tag != "monitor" else None) for e, _, step in steps]
    process = among([m for e in episodes for m in tag_rewards(e)], pools, normalize_std)
    return alpha * outcome + (1.0 - alpha) * process


def gigpo(episodes, normalize_std=True, labels=None, gamma=0.95, weight=1.0):
    """Groups within the group: steps from the same state (Feng et al. 2025, arXiv 2505.10978, eqs. 3-8).

        A_t = z_group(R_i) + weight * z_(group, state)(G_t),             G_t = r_t + gamma G_(t+1)  (3)

    Even a group whose episodes all succeed tells something here: who is nearer to the end has the higher G_t.
    """
    pools = [(e.group, step.state) for e, _, step in steps_of(episodes)]
    within = among(discounted_returns(episodes, gamma), pools, normalize_std)
    return grpo(episodes, normalize_std) + weight * within


def hgpo(episodes, normalize_std=True, labels=None, gamma=0.95, history=2, alpha=1.0, base=False):
    """A hierarchy of groups: steps after the same k last observations (He et al. 2026, arXiv 2602.22817).

        A_t = sum_k w_k A_k / sum_k w_k                                                           (4)
        A_k = z_(group, last k observations)(G_t),          w_k = (k + 1)^alpha

    over k = 1 .. history + 1, the present observation among them, and over those A_k alone that are not 0.
    The more of the past two steps share, the better they compare, and the fewer they are. base: A_0 =
    z_group(R_i) takes part too, as in its code's `base_group`, off by default: the outcome then counts
    through G_t alone.
    """
    steps, returns = steps_of(episodes), discounted_returns(episodes, gamma)
    pasts = [tuple(step.observation for step in e.steps[max(0, t - history):t + 1]) for e, t, _ in steps]
    terms, weights = ([grpo(episodes, normalize_std)], [1.0]) if base else ([], [])
    for k in range(1, history + 2):
        # A step with a shorter past is in a pool of its own: 0.
        pools = [(e.group, past[-k:]) if len(past) >= k else i
                 for i, ((e, _, _), past) in enumerate(zip(steps, pasts))]
        terms.append(among(returns, pools, normalize_std))
        weights.append((k + 1.0) ** alpha)
    terms = torch.stack(terms)                                                                    # (K, S)
    weights = torch.tensor(weights)[:, None] * (terms != 0)                                       # (K, S)
    return (weights * terms).sum(0) / weights.sum(0).clamp(min=1e-12)


def distances(edges):
    """Steps from every node to its group's GOAL by the shortest observed path (breadth first, backwards).

    edges: list of ((group, state), (group, next state or GOAL)). A node that no path leads on from is one
    step further than the furthest that one leads from (as in GraphGPO's code). Returns {node: int}.

    >>> distances([((0, "a"), (0, "b")), ((0, "b"), (0, GOAL)), ((0, "a"), (0, "c"))])
    {(0, 'success'): 0, (0, 'b'): 1, (0, 'a'): 2, (0, 'c'): 3}
    """
    sources = defaultdict(list)
    for source, target in edges:
        sources[target].append(source)
    far = {group: 0 for (group, _), _ in edges}
    found = {(group, GOAL): 0 for group in far}
    queue = list(found)
    for node in queue:  # grows while we walk along it
        far[node[0]] = max(far[node[0]], found[node])
        for source in sources[node]:
            if source not in found:
                found[source] = found[node] + 1
                queue.append(source)
    return found | {node: far[node[0]] + 1 for edge in edges for node in edge if node not in found}


def graphgpo(episodes, normalize_std=True, labels=None, omega=0.1, success=10.0, weight=1.0):
    """How near to success a step leads, on the graph of the group's states (Cheng et al. 2026, 2605.26684).

        A_t = z_group(R_i) + weight * z_(group, state)(success * omega^d(next state))             (5)

    d: `distances`. A step of a lost episode that leads towards the success of another one is praised. In a
    group without a success all d are the same, and only the outcome is left (0 where that is the same, too).
    Eq. 4 of the paper has d + 1 in place of d, its code has d: z sees no difference.
    """
    steps = steps_of(episodes)
    edges = [((e.group, step.state), (e.group, GOAL if e.won and step is e.steps[-1] else step.next_state))
             for e, _, step in steps]
    d, least = distances(edges), {}
    for source, target in edges:
        least[source] = min(d[target], least.get(source, math.inf))
    # z knows no scale, but eps does: 10 * 0.1^7 would drown in it. So count from a state's best step.
    start = least if normalize_std else dict.fromkeys(least, 0)
    values = [success * omega ** (d[target] - start[source]) for source, target in edges]
    within = among(values, [source for source, _ in edges], normalize_std)
    return grpo(episodes, normalize_std) + weight * within


def adca(episodes, normalize_std=True, labels=None, size=0.2, alpha=0.1):
    """Good and bad labels in the advantage (AgentEvolver, arXiv 2511.10395): the control for the classifier.

        A_t = sum_(k >= t) alpha z_group(l_k)  +  z_group(R_i),         l_k = +size good, -size bad  (6)

    The outcome is paid at the last step, so that it counts for all. Steps without a label take no part and
    add nothing. alpha: as in its recommended configuration; the pool is all labelled steps of the group
    (there, every episode weighs the same). labels: (S,) long, 1 good, 0 bad, -1 none.
    """
    if labels is None:
        raise ValueError("the credit rule adca needs labels: choose their source with --labels")
    steps, labels = steps_of(episodes), torch.as_tensor(labels)
    known = (labels >= 0).nonzero()[:, 0].tolist()
    rewards = torch.zeros(len(steps))
    rewards[known] = alpha * among([size if labels[i] == 1 else -size for i in known],
                                   [steps[i][0].group for i in known], normalize_std)
    follow = [part.flip(0).cumsum(0).flip(0) for part in rewards.split([len(e.steps) for e in episodes])]
    return grpo(episodes, normalize_std) + torch.cat(follow)


def penalty(episodes, normalize_std=True, labels=None, size=0.28):
    """Every flawed step (`Step.flawed`) costs a constant: the control for `adca`, which punishes harder, too.

        A_t = z_group(R_i) - size 1{flawed}                                                       (7)

    size: by how much adca's mean advantage of flawed steps (-0.55) lay below that of runs with GRPO's
    advantages (-0.27, the generative arm of docs/experiment.md), so that both punish about as hard.
    """
    flawed = torch.tensor([float(step.flawed) for *_, step in steps_of(episodes)])                # (S,)
    return grpo(episodes, normalize_std) - size * flawed


def unflawed(episodes, normalize_std=True, labels=None):
    """GRPO with the flawed steps' share of the gradient left out, G_u of coupling.py: what leaks into flaws.

        A_t = z_group(R_i) 1{not flawed}                                                          (8)

    The weights of the tokens are not touched (grpo.token_weights), so G_u + G_f is GRPO's gradient. The KL
    term is not touched either: flawed steps keep it.
    """
    return grpo(episodes, normalize_std) - flawed(episodes, normalize_std)


def flawed(episodes, normalize_std=True, labels=None):
    """The other part, G_f: the flaws' own correction. It couples, too: into the same commands where they are
    right; and flawed steps of won episodes are praised in it.

        A_t = z_group(R_i) 1{flawed}                                                              (9)
    """
    return grpo(episodes, normalize_std) * torch.tensor([float(step.flawed) for *_, step in steps_of(episodes)])


CREDIT = {"grpo": grpo, "rlvmr": rlvmr, "gigpo": gigpo, "hgpo": hgpo, "graphgpo": graphgpo, "adca": adca,
          "penalty": penalty, "unflawed": unflawed, "flawed": flawed}


# ----------------------------------------------------------------------------------------- entropy smoothing

def epo(entropies, lengths, turns, reference=None, low=0.5, high=1.5):
    """EPO's smoothing: the entropy of a turn stays within [low, high] times what it was (arXiv 2509.22576).

        P = 1/T sum_t max(0, low H_ref - H_t) + max(0, H_t - high H_ref),     H = 1/T sum_t H_t  (10)

    eqs. (3)-(4) there, on the mean H_t over the tokens of turn t in place of single tokens. The penalty of
    its published code has no gradient; here it runs through the entropies. The paper's whole loss, eq. (6),
    is L_policy - coef * (H - alpha * epo_weight * P), with coef 0.001 and alpha 0.1 in its runs.

    Args:
        entropies: (n,) of sampled tokens in nats, from `actor.token_logprobs(..., entropy_grad=True)`.
        lengths: tokens of each turn that the n make up, a list.
        turns: T, those of the whole batch: the parts of micro-batches add up.
        reference: H_ref, the mean of H over all updates so far; None before the first, which has no penalty.
        low, high: what the paper calls a robust default (its own runs had 0 and 2: no lower end).
    Returns: (P, H), scalars with gradient.
    """
    turn = torch.stack([part.mean() for part in entropies.split(lengths)])                        # (t,)
    if reference is None:
        return 0.0 * turn.sum(), turn.sum() / turns
    outside = (low * reference - turn).clamp(min=0) + (turn - high * reference).clamp(min=0)      # (t,)
    return outside.sum() / turns, turn.sum() / turns


def epo_weight(iteration, iterations, gamma=3.0):
    """beta_k of EPO's eq. (5): twice the weight at the start, hardly more than once from the middle on.

    >>> [round(epo_weight(k, 100), 3) for k in (0, 50, 100)]
    [2.0, 1.05, 1.002]
    """
    return 1.0 + math.exp(-gamma * iteration / max(1.0, iterations / 2))

"""GRPO in pure functions on tensors: group advantages and the clipped loss. Needs torch alone; copy it.

Shapes: E episodes in a batch, N sampled tokens of all those episodes laid end to end. There is no padding
here and no mask: tokens that were given (prompts, observations) are simply not among the N.

    A_i = (R_i - mean(R)) / (std(R) + eps)                     over the group of episode i           (1)
    ratio_t = exp(log pi(t) - log pi_old(t))                                                         (2)
    L = - sum_t w_t min(ratio_t A_t, clip(ratio_t, 1 - c, 1 + c) A_t) + kl_coef * sum_t w_t k3_t     (3)
    k3_t = exp(d) - d - 1,   d = log pi_ref(t) - log pi(t)                                           (4)

(1)-(3): Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), eqs. 3-4; (1) without std: Liu et al. 2025 (Dr.
GRPO, arXiv 2503.20783); (4): Schulman, "Approximating KL divergence". Departures from DeepSeekMath: the
weights w_t sum to one over the *whole batch*, not per micro-batch and not per episode, so the micro-batch
size cannot change the gradient.

A_t is the advantage of the token's episode, or of its step. train.py uses each group in one optimizer step
only: in the first of an iteration the policy is still the one that sampled, all ratios are 1 and nothing is
clipped; the clip acts from the second on.

>>> A, signal = group_advantages(torch.tensor([1., 0., 0., 0., 1., 1.]), torch.tensor([0, 0, 0, 0, 1, 1]))
>>> [round(a, 3) for a in A.tolist()], signal.tolist()      # group 1 has no variance: no signal
([1.732, -0.577, -0.577, -0.577, 0.0, 0.0], [True, False])
"""

import math

import torch


def group_advantages(rewards, groups, normalize_std=True, eps=1e-6):
    """Advantage of each episode within its group, eq. (1).

    Args:
        rewards: (E,) float, the outcome R of each episode.
        groups: (E,) long, which group each episode belongs to (numbers 0 .. n_groups - 1, any order).
        normalize_std: divide by the group's *population* standard deviation; False: Dr. GRPO's A = R - mean.
    Returns:
        advantages (E,) and signal (n_groups,) bool: False where all rewards of the group are equal, so that
        the group teaches nothing. Its advantages are exactly 0.
    """
    n = int(groups.max()) + 1
    count = torch.bincount(groups, minlength=n)
    rewards = rewards.double()  # in float32 the mean of equal rewards may miss them by a bit: a variance
    zeros = torch.zeros(n, dtype=rewards.dtype, device=rewards.device)
    mean = zeros.index_add(0, groups, rewards) / count
    centered = rewards - mean[groups]
    std = (zeros.index_add(0, groups, centered**2) / count).sqrt()
    signal = std > 1e-8
    advantages = centered / (std[groups] + eps) if normalize_std else centered
    return torch.where(signal[groups], advantages, torch.zeros_like(advantages)).float(), signal


def token_weights(step_of_token, episode_of_token, weighting="token"):
    """The weight w_t of every sampled token; all weights sum to 1. Computed once for the whole batch.

    Args:
        step_of_token: (N,) long, a number per step, unique over the batch.
        episode_of_token: (N,) long, a number per episode.
        weighting: what counts equally.
            "token"    every token. A long episode weighs more than a short one; failures are long.
            "step"     every step, however long its answer: long thoughts weigh no more than short ones.
            "episode"  every episode (as in DeepSeekMath): a token of a long episode counts little, so a long
                       failure is punished less per step than a short one, which favours long failures.
    """
    if weighting == "token":
        return torch.full(step_of_token.shape, 1.0 / len(step_of_token), device=step_of_token.device)
    if weighting not in ("step", "episode"):
        raise ValueError(f"unknown weighting {weighting!r}: choose token, step or episode")
    unit = step_of_token if weighting == "step" else episode_of_token
    size = torch.bincount(unit)
    return 1.0 / (size[unit].float() * (size > 0).sum())


def k3(logprobs, ref_logprobs, limit=5.0):
    """Schulman's estimator of KL(pi || pi_ref) per sampled token, eq. (4): never negative, and unbiased where
    no token is beyond `limit`. (N,)

    Two traps. As a *loss* its gradient is (1 - exp(d)) grad log pi, whose mean over samples is the gradient
    of the other divergence, KL(pi_ref || pi). And exp(d) is unbounded: presumably one token that the policy
    had given up made a batch mean of 225 nats. Beyond d = `limit` k3 goes on as a straight line, so that a
    token's pull back is at most exp(limit) - 1.

    >>> [round(x, 3) for x in k3(torch.tensor([-1., -1., -20.]), torch.tensor([-1., 0., -1.])).tolist()]
    [0.0, 0.718, 2206.197]
    """
    d = ref_logprobs - logprobs
    near = d.clamp(max=limit)
    return torch.exp(near) - near - 1.0 + (d - near) * (math.exp(limit) - 1.0)


def grpo_loss(logprobs, old_logprobs, advantages, weights, clip=0.2, ref_logprobs=None, kl_coef=0.0,
              importance=None):
    """The clipped surrogate with KL penalty, eqs. (2)-(4).

    Args:
        logprobs: (N,) log-probabilities under the current policy, with gradient.
        old_logprobs: (N,) log-probabilities recorded in sampling; with `importance`, those that the trainer
            computes before the first step (else the gap would be corrected twice).
        advantages: (N,) advantage of the episode (or step) that each token belongs to.
        weights: (N,) from `token_weights`; of a micro-batch, the slice of the whole batch's weights.
        clip: how far the ratio may move before the gradient stops.
        importance: (N,) from `truncated_importance` where the sampler is not the trainer, else None. The KL
            term is left as it is: a small bias in a small penalty.
    Returns:
        loss (scalar; losses of micro-batches add up) and a dictionary of *sums* weighted like the loss, to be
        added over micro-batches as well: policy_loss, kl, clip_fraction, ratio.
    """
    ratio = torch.exp(logprobs - old_logprobs)                                   # (N,) eq. (2)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)          # (N,) the pessimistic one
    if importance is not None:
        surrogate = importance * surrogate
    loss = policy_loss = -(weights * surrogate).sum()                            # eq. (3)
    stats = {"policy_loss": policy_loss.detach(), "kl": torch.zeros_like(loss).detach(),
             # clipped and therefore without gradient: the surrogate took the constant branch
             "clip_fraction": (weights * (clipped * advantages < ratio * advantages)).sum().detach(),
             "ratio": (weights * ratio).sum().detach()}
    if ref_logprobs is not None:
        kl = (weights * k3(logprobs, ref_logprobs)).sum()                        # eq. (4)
        loss = loss + kl_coef * kl
        stats["kl"] = kl.detach()
    return loss, stats


# ------------------------------------------------------------- only where another engine than PyTorch samples

def truncated_importance(trainer_logprobs, sampler_logprobs, clip):
    """min(pi_trainer / pi_sampler, clip) per token, without gradient (Yao et al. 2025, "truncated importance
    sampling").

    An engine such as vLLM samples from a slightly different distribution than the trainer computes, with the
    very same weights. This weight turns the mean over its samples into one over the trainer's; the clip
    bounds the variance.

    >>> truncated_importance(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0]), 2.0)
    tensor([1.0000, 2.0000, 0.3679])
    """
    return torch.exp(trainer_logprobs - sampler_logprobs).clamp(max=clip).detach()

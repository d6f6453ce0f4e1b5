"""Log-probabilities of chosen tokens without ever holding all logits: needs torch alone.

A vocabulary of 150,000 and 30,000 sampled tokens make 18 GB of float32 logits, and as much again for the gradient. Only
one number per token is wanted. So the tokens go through the output layer in chunks, and a chunk's logits are computed
again in the backward pass instead of being kept (Chen et al. 2016, "Training deep nets with sublinear memory cost").

>>> head = torch.nn.Linear(8, 50, bias=False)
>>> hidden, targets = torch.randn(7, 8), torch.arange(7)
>>> few, _ = token_logprobs(hidden, head, targets, max_logits=100)       # chunks of two tokens
>>> torch.allclose(few, torch.log_softmax(head(hidden), -1)[range(7), targets], atol=1e-6)
True
"""

import torch
from torch.utils.checkpoint import checkpoint


def token_logprobs(hidden, head, targets, temperature=1.0, max_logits=2**24, entropy_grad=False):
    """Log-probabilities of `targets` and entropies under softmax(head(hidden) / temperature), in float32.

    Args:
        hidden: (N, D), any dtype: the hidden states that predict the targets (one position to their left).
        head: the output layer, (n, D) -> (n, V).
        targets: (N,) long.
        max_logits: how many logits may exist at a time: 2**24 are 64 MB of float32, and four times that in passing.
        entropy_grad: entropies with gradient, for losses on them; else they are only there to be looked at.
    Returns: (N,) log-probabilities with gradient, (N,) entropies in nats.
    """
    rows = max(1, max_logits // head.weight.shape[0])

    def chunk_logprobs(hidden, targets):
        logits = head(hidden).float() / temperature                                 # (n, V)
        normalizer = logits.logsumexp(-1)                                           # (n,)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):  # H = log Z - sum_v p_v z_v
            entropy = normalizer - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - normalizer, entropy

    if len(hidden) <= rows:
        return chunk_logprobs(hidden, targets)
    parts = [checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in zip(hidden.split(rows), targets.split(rows))]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)

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


def token_logprobs(hidden, head, targets, temperature=1.0, max_logits=2**24):
    """Log-probabilities of `targets` and entropies under softmax(head(hidden) / temperature), in float32.

    Args:
        hidden: (N, D), any dtype: the hidden states that predict the targets (one position to their left).
        head: the output layer, (n, D) -> (n, V).
        targets: (N,) long.
        max_logits: how many logits may exist at a time: 2**24 are 64 MB of float32, and four times that in passing.
    Returns: (N,) log-probabilities with gradient, (N,) entropies in nats without.
    """
    rows = max(1, max_logits // head.weight.shape[0])

    def chunk_logprobs(hidden, targets):
        logits = head(hidden).float() / temperature                                 # (n, V)
        normalizer = logits.logsumexp(-1)                                           # (n,)
        with torch.no_grad():  # H = log Z - sum_v p_v z_v
            entropy = normalizer - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - normalizer, entropy

    if len(hidden) <= rows:
        return chunk_logprobs(hidden, targets)
    parts = [checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in zip(hidden.split(rows), targets.split(rows))]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def output_logits(model, hidden):
    """A model's logits from its decoder's hidden states, with what some models do after the output layer.

    `model.get_output_embeddings()(hidden)` alone is off for Cohere (scaled), Granite (scaled down), Gemma 2
    and its kin (squashed into -cap to cap). A model that does anything else is refused when it is loaded.

    Args:
        model: a transformers causal model, or peft's wrapper around one.
        hidden: (..., D), `last_hidden_state` of `model.get_decoder()`.
    Returns: (..., V), in the output layer's dtype.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logit_scale", None) is not None:                               # Cohere, Command R
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:                            # Granite, MiniCPM 3
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)                             # Gemma 2, nanochat
    return logits if cap is None else cap * torch.tanh(logits / cap)


def attention_masks(model, visible, positions, columns):
    """What `model.get_decoder()` takes as attention_mask where its own causal mask will not do: branches.

    Two traps. A mask that one passes replaces the model's own, its sliding window included; so the window is
    put back here, by positions, since a branch lies further right in the row than where it continues. And it
    must be added to the scores: one of booleans is right for one attention implementation (SDPA), while
    another (eager) silently adds 0 or 1.

    Args:
        model: a transformers causal model, or peft's wrapper around one.
        visible: (B, q, k) bool, True where the query may look at the key under full causal attention.
        positions: (B, q) long, of the queries.
        columns: (B, k) long, positions of the keys.
    Returns: (B, 1, q, k) in the model's dtype, 0 where seen and the least finite number where not; for models
        whose layers differ (`config.layer_types`) a dictionary with one for each kind of layer.
    Raises ValueError for any kind of layer but full and sliding attention: a recurrent one cannot branch.
    """
    config = model.config.get_text_config()
    kinds, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))}")

    def additive(seen):                                                                # -> (B, 1, q, k)
        unseen = torch.finfo(model.dtype).min
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        return mask.masked_fill_(~seen, unseen)[:, None]

    near = visible if window is None else visible & (columns[:, None] > positions[:, :, None] - window)
    if not kinds:
        return additive(near)
    return {kind: additive(near if kind == "sliding_attention" else visible) for kind in kinds}

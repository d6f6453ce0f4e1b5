"""One forward pass of the policy: everything that GRPO and the classifier want to know. Needs torch alone;
copy it.

    tokens of E episodes ──> transformer ──> hidden states (B, T, D)
        one to the left of a sampled token  ──> its log-probability and entropy      (N,)  for grpo_loss
        at the end of a question's branch   ──> log-probability of the true verdict  (Q,)  for generative_loss
        at the token that ends an action    ──> a linear head's value                (S,)  for value_head_loss

One pass serves all three, so both classification losses send their gradient into the very trunk that chooses
actions. A question about a step is a *branch*: it continues the episode right after that step, sees what the
step saw, and nothing of the episode sees it. So the shared prefix is computed once (`pack_branches`).

>>> head = torch.nn.Linear(8, 50, bias=False)
>>> hidden, targets = torch.randn(7, 8), torch.arange(7)
>>> few, _ = token_logprobs(hidden, head, targets, max_logits=100)       # chunks of two tokens
>>> torch.allclose(few, torch.log_softmax(head(hidden), -1)[range(7), targets], atol=1e-6)
True
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint


def forward(model, sequences, sampled, temperature=1.0, branches=None, value_head=None, action_ends=None,
            head_layer=-1, entropy_grad=False):
    """One pass over a micro-batch of B episodes.

    Args:
        model: a causal model of transformers.
        sequences: B lists of token ids.
        sampled: B lists of bools: True where the policy chose the token. Given tokens (prompts, observations)
            are read and never scored: here, and nowhere later, the mask is applied.
        temperature: of the sampling, so that the scored distribution is the one that was sampled from.
            Verdicts are scored at 1.
        branches: B lists of (end, question ids, verdict ids): asked after tokens[:end]. None: no questions.
        value_head: Linear(D, 1), read at the last token of each step, which ends its turn; None: no values.
        action_ends: B lists with the end of each step: one past that token.
        head_layer: which hidden state the value head reads: 0 the embeddings, 1 after the first layer, ...,
            -1 the last.
        entropy_grad: entropies with gradient, for a loss on them.
    Returns a dictionary of flat tensors, in the order episode, then position:
        logprobs (N,) with gradient and entropy (N,) of the sampled tokens;
        verdicts (Q,) log-probabilities of the true verdicts, verdict_logits (Q, V) for comparing two words
        (no gradient); values (S,) of the steps, positive for good.
    """
    branches = branches or [[] for _ in sequences]
    tokens, positions, mask, starts = pack_branches(
        sequences, [[(end, question + verdict) for end, question, verdict in asked] for asked in branches])
    device = next(model.parameters()).device
    tokens, positions = tokens.to(device), positions.to(device)
    if mask is not None:  # without branches the model's own causal mask does: padding is on the right
        mask = attention_masks(model, mask[:, 0].to(device), positions, positions)
    deep = value_head is not None and head_layer != -1
    read = model.get_decoder()(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False,
                               output_hidden_states=deep)
    hidden = read.last_hidden_state                                                             # (B, T, D)
    head = functools.partial(output_logits, model)
    head.weight = model.get_output_embeddings().weight  # its size tells how many logits a token has

    def places(pairs):
        rows, columns = zip(*pairs)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)

    def score(rows, columns, temperature=1.0):
        """(n,), (n,) of the tokens *at* these places: the hidden state one to the left predicts them."""
        return token_logprobs(hidden[rows, columns - 1], head, tokens[rows, columns], temperature,
                              entropy_grad=entropy_grad)

    out = {}
    rows, columns = places([(b, t) for b, row in enumerate(sampled) for t, ours in enumerate(row) if ours])
    out["logprobs"], out["entropy"] = score(rows, columns, temperature or 1.0)                  # (N,), (N,)
    if any(branches):
        asked = [(b, start + len(question), verdict)                                    # Q verdicts and where
                 for b, (questions, begin) in enumerate(zip(branches, starts))
                 for (_, question, verdict), start in zip(questions, begin)]
        rows, columns = places([(b, column + i) for b, column, verdict in asked for i in range(len(verdict))])
        each, _ = score(rows, columns)                                                  # (verdict tokens,)
        lengths = [len(verdict) for *_, verdict in asked]
        out["verdicts"] = torch.stack([part.sum() for part in each.split(lengths)])             # (Q,)
        first = torch.tensor([0] + lengths[:-1], device=device).cumsum(0)
        with torch.no_grad():
            out["verdict_logits"] = head(hidden[rows[first], columns[first] - 1])               # (Q, V)
    if value_head is not None:
        rows, columns = places([(b, end - 1) for b, ends in enumerate(action_ends) for end in ends])
        seen = read.hidden_states[head_layer] if deep else hidden                               # (B, T, D)
        out["values"] = value_head(seen[rows, columns].float())[:, 0]                           # (S,)
    return out


def pack_branches(sequences, branches, pad=0):
    """Episodes with questions about their steps in one batch: the prefix is computed once, each question is a
    branch.

        row:      t0 t1 t2 t3 t4 t5 | q q v | q q v |
        branch 1 (end 3) sees t0 t1 t2 and itself; branch 2 (end 6) sees t0 .. t5 and itself; no t sees any
        branch.

    Args:
        sequences: B lists of token ids.
        branches: B lists of (end, ids): the branch continues tokens[:end]; it cannot see what follows its
            step.
        pad: id for the padding on the right.
    Returns:
        tokens (B, T), positions (B, T) long; mask (B, 1, T, T) bool, True where the row's token may look at
        the column's, or None if there is no branch (plain causal attention; right padding needs no mask);
        starts: B lists with the column where each branch begins.
    """
    rows, starts = [], []
    for sequence, questions in zip(sequences, branches):
        row, begin = list(sequence), []
        for _, ids in questions:
            begin.append(len(row))
            row += ids
        rows.append(row)
        starts.append(begin)
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])                  # (B, T)
    positions = torch.arange(width).repeat(len(rows), 1)                                       # (B, T)
    if not any(branches):
        return tokens, positions, None, starts
    segment = torch.zeros(len(rows), width, dtype=torch.long)  # 0: episode or padding, k: its k-th branch
    limit = torch.arange(1, width + 1).repeat(len(rows), 1)    # columns of the episode a token may see
    for b, (questions, begin) in enumerate(zip(branches, starts)):
        for k, ((end, ids), start) in enumerate(zip(questions, begin)):
            span = slice(start, start + len(ids))
            segment[b, span], limit[b, span] = k + 1, end
            positions[b, span] = end + torch.arange(len(ids))  # as if the question came right after its step
    column = torch.arange(width)
    causal = column <= column[:, None]                                                         # (T, T)
    trunk = (segment == 0)[:, None, :] & (column < limit[:, :, None])                          # (B, T, T)
    own = segment[:, :, None] == segment[:, None, :]                                           # (B, T, T)
    return tokens, positions, (causal & (trunk | own))[:, None], starts


# -------------------------------------------- not the method: memory, and what models do in ways of their own

def token_logprobs(hidden, head, targets, temperature=1.0, max_logits=2**24, entropy_grad=False):
    """Log-probabilities of `targets` and entropies under softmax(head(hidden) / temperature), in float32.

    Never all logits at once: a vocabulary of 150,000 and 30,000 sampled tokens make 18 GB of them, and as
    much again for the gradient. Only one number per token is wanted, so tokens go through the output layer in
    chunks, whose logits are computed again in the backward pass (Chen et al. 2016, "Training deep nets with
    sublinear memory cost").

    Args:
        hidden: (N, D), any dtype: the hidden states that predict the targets (one position to their left).
        head: the output layer, (n, D) -> (n, V).
        targets: (N,) long.
        max_logits: how many logits may exist at a time: 2**24 are 64 MB of float32, and four times that in
            passing.
        entropy_grad: entropies with gradient, for losses on them; else they are only there to be looked at.
    Returns: (N,) log-probabilities with gradient, (N,) entropies in nats.
    """
    rows = max(1, max_logits // head.weight.shape[0])

    def chunk_logprobs(hidden, targets):
        logits = head(hidden).float() / temperature                                             # (n, V)
        normalizer = logits.logsumexp(-1)                                                       # (n,)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):  # H = log Z - sum_v p_v z_v
            entropy = normalizer - (torch.softmax(logits, -1) * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - normalizer, entropy

    if len(hidden) <= rows:
        return chunk_logprobs(hidden, targets)
    parts = [checkpoint(chunk_logprobs, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


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

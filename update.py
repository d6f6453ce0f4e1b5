"""One policy update: episodes in, an optimizer step out. One forward pass serves GRPO and the classifier.

Reading order: `Batch` (what an update needs to know of the episodes), `forward` (a micro-batch through the model),
`update` (losses, micro-batches, the step). The formulas themselves are in grpo.py and classifier_loss.py.

A micro-batch is a matter of memory, never of the objective: every weight is computed over the whole batch first, so
the micro-batches' losses add up to the batch's loss (tests/test_update.py compares the gradients).
"""

import functools
import math
from dataclasses import dataclass

import torch

from classifier_loss import (BAD, GOOD, balanced_choice, class_weights, generative_loss, outcome_labels, pack_branches,
                             rule_labels, value_head_loss)
from grpo import group_advantages, grpo_loss, token_weights, truncated_importance
from support.processes import is_sharded, through_root
from actor import attention_masks, output_logits, token_logprobs


@dataclass
class Batch:
    """All episodes of one optimizer step. E episodes, S steps, N sampled tokens laid end to end in episode order."""
    episodes: list
    advantages: torch.Tensor      # (E,)
    token_weight: list            # E tensors (n_e,), all together sum to 1
    old_logprobs: list            # E tensors (n_e,)
    labels: list                  # E lists: label of each step, 1 good, 0 bad, -1 left out
    value_weight: list            # E lists: weight of each step in the value head's loss
    question_weight: list         # E lists: weight of each step in the generative loss (0: not asked)
    ref_logprobs: list = None     # E tensors (n_e,), or None
    importance: list = None       # E tensors (n_e,) where the sampler is not the trainer, or None


def make_batch(episodes, advantages, labels_from="rules", weighting="token", questions_per_episode=0, seed=0):
    """Weights and labels for one optimizer step. `advantages`: (E,), from whole groups, see `advantages_of`."""
    steps = [(e, step) for e, episode in enumerate(episodes) for step in episode.steps]         # S
    episode_of_step = torch.tensor([e for e, _ in steps])
    length_of_step = torch.tensor([step.end - step.start for _, step in steps])
    step_of_token = torch.arange(len(steps)).repeat_interleave(length_of_step)                  # (N,)
    weights = token_weights(step_of_token, episode_of_step[step_of_token], weighting)           # (N,)
    if labels_from == "rules":
        won = torch.tensor([episodes[e].won for e, _ in steps])
        labels = rule_labels(won, torch.tensor([step.flawed for _, step in steps]))
    else:
        labels = outcome_labels(advantages[episode_of_step])
    asked = torch.full_like(labels, -1)
    if questions_per_episode:
        generator = torch.Generator().manual_seed(seed)
        chosen = balanced_choice(labels, episode_of_step, questions_per_episode, generator)
        asked[chosen] = labels[chosen]
    steps_per_episode = [len(e.steps) for e in episodes]
    tokens_per_episode = [sum(e.sampled) for e in episodes]
    per_step = lambda values: [v.tolist() for v in values.split(steps_per_episode)]
    return Batch(episodes, advantages, list(weights.split(tokens_per_episode)),
                 [torch.tensor([l for l, s in zip(e.logprobs, e.sampled) if s]) for e in episodes],
                 per_step(labels), per_step(class_weights(labels)), per_step(class_weights(asked)))


def advantages_of(episodes, normalize_std=True):
    """(E,) advantages of whole groups, and the share of groups without signal."""
    numbers = {g: i for i, g in enumerate(sorted({e.group for e in episodes}))}
    advantages, signal = group_advantages(torch.tensor([e.reward for e in episodes]),
                                          torch.tensor([numbers[e.group] for e in episodes]), normalize_std)
    return advantages, 1.0 - signal.float().mean().item()


def micro_batches(episodes, max_tokens):
    """Indices of episodes of similar length, at most `max_tokens` padded tokens together (at least one episode)."""
    order = sorted(range(len(episodes)), key=lambda i: -len(episodes[i].tokens))
    batches, width = [], 0
    for i in order:
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(episodes[i].tokens)  # the longest comes first
        batches[-1].append(i)
    return batches


def own_share(micro_batches, world, even=False):
    """The micro-batches that this process computes; the longest come first, so that all get about the same work.

    even: all get the same number, some a None at the end.
    """
    if world is None:
        return micro_batches
    mine, rounds = micro_batches[world.process_index::world.num_processes], -(-len(micro_batches) // world.num_processes)
    return mine + [None] * (rounds - len(mine)) if even else mine


def add_up(world, parameters, *tables):
    """Sum gradients, and dictionaries of numbers, over all processes, through accelerate. In place; returns the tables.

    A sharded parameter's gradients have been summed on the way."""
    from accelerate.utils import gather_object
    for parameter in parameters:
        if hasattr(parameter, "full_tensor"):
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = world.reduce(gradient, reduction="sum")
    gathered = gather_object([tables])
    return [{name: sum(one[i].get(name, 0) for one in gathered) for name in sorted({n for one in gathered for n in one[i]})}
            for i in range(len(tables))]


def clip_gradients(parameters, max_norm):
    """As torch.nn.utils.clip_grad_norm_, where some of the parameters may be sharded and others not. Returns the norm."""
    sharded = [p for p in parameters if hasattr(p, "full_tensor")]
    if not sharded:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    rest = [p.grad for p in parameters if not hasattr(p, "full_tensor") and p.grad is not None]
    parts = [torch.nn.utils.get_total_norm([p.grad for p in sharded]).full_tensor(), torch.nn.utils.get_total_norm(rest)]
    norm = math.hypot(*map(float, parts))
    for p in parameters:
        if p.grad is not None and norm > max_norm:
            p.grad.mul_(max_norm / (norm + 1e-6))
    return norm


@through_root
def forward(model, episodes, temperature=1.0, branches=None, value_head=None):
    """One pass over a micro-batch.

    Args:
        branches: per episode a list of (end, question ids, verdict ids); see `pack_branches`.
        value_head: Linear(D, 1) on the hidden state at the last token of each action, or None.
    Returns a dictionary of flat tensors, in the order episode, then position:
        logprobs (N,), entropy (N,) of the sampled tokens; verdicts (Q,), verdict_first (Q, V) logits of the questions;
        values (S,) of the steps.
    """
    branches = branches or [[] for _ in episodes]
    tokens, positions, mask, starts = pack_branches(
        [e.tokens for e in episodes], [[(end, q + v) for end, q, v in asked] for asked in branches])
    device = next(model.parameters()).device
    tokens, positions = tokens.to(device), positions.to(device)
    if mask is not None:  # without branches the model's own causal mask does: padding is on the right
        mask = attention_masks(model, mask[:, 0].to(device), positions, positions)
    hidden = model.get_decoder()(input_ids=tokens, position_ids=positions, attention_mask=mask,
                                 use_cache=False).last_hidden_state                             # (B, T, D)
    head = functools.partial(output_logits, model)
    head.weight = model.get_output_embeddings().weight  # token_logprobs asks for the size of the vocabulary

    def places(pairs):
        rows, columns = zip(*pairs)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)

    def score(rows, columns, scale=1.0):
        """Log-probability and entropy, (n,) each, of the tokens *at* these places: the state one to the left predicts them."""
        return token_logprobs(hidden[rows, columns - 1], head, tokens[rows, columns], scale)

    out = {}
    rows, columns = places([(b, t) for b, e in enumerate(episodes) for t, s in enumerate(e.sampled) if s])
    out["logprobs"], out["entropy"] = score(rows, columns, temperature or 1.0)                  # (N,), (N,)
    if any(branches):
        asked = [(b, start + len(q), v) for b, (questions, begin) in enumerate(zip(branches, starts))
                 for (_, q, v), start in zip(questions, begin)]
        rows, columns = places([(b, column + i) for b, column, v in asked for i in range(len(v))])
        each, _ = score(rows, columns)                                                          # (Q * len,)
        lengths = [len(v) for *_, v in asked]
        out["verdicts"] = torch.stack([part.sum() for part in each.split(lengths)])             # (Q,)
        first = torch.tensor([0] + lengths[:-1], device=device).cumsum(0)
        with torch.no_grad():
            out["verdict_first"] = head(hidden[rows[first], columns[first] - 1])                # (Q, V), to compare two of
    if value_head is not None:
        rows, columns = places([(b, step.end - 1) for b, e in enumerate(episodes) for step in e.steps])
        out["values"] = value_head(hidden[rows, columns].float())[:, 0]                         # (S,)
    return out


@torch.no_grad()
def reference_logprobs(model, episodes, temperature, max_tokens, world=None):
    """E tensors (n_e,): log-probabilities of the sampled tokens under `model`, in the order of `episodes`.

    world: see `update`; None stands where another process will compute.
    """
    model.eval()
    found, micros = [None] * len(episodes), micro_batches(episodes, max_tokens)
    for micro in own_share(micros, world, is_sharded(model)):
        if micro is None:  # sharded: the others wait for our share of the weights
            forward(model, [episodes[i] for i in micros[-1]], temperature)
            continue
        chosen = [episodes[i] for i in micro]
        logprobs = forward(model, chosen, temperature)["logprobs"].cpu()
        for i, part in zip(micro, logprobs.split([sum(e.sampled) for e in chosen])):
            found[i] = part
    return found


def recompute_old_logprobs(model, batch, temperature, max_tokens, tis_clip, world=None):
    """Where another engine sampled: the trainer's log-probabilities become the old ones, the difference is corrected by
    truncated importance weights. In place; returns the mean |difference| per token, in nats."""
    sampler = batch.old_logprobs
    batch.old_logprobs = reference_logprobs(model, batch.episodes, temperature, max_tokens, world)
    pairs = list(zip(batch.old_logprobs, sampler))
    batch.importance = [None if t is None else truncated_importance(t, s, tis_clip) for t, s in pairs]
    gaps = [(t - s).abs() for t, s in pairs if t is not None]
    return torch.cat(gaps).mean().item() if gaps else 0.0


def branches_of(batch, micro, question):
    """The questions of a micro-batch, as `forward` takes them; None if there is no generative classifier."""
    if not question:
        return None
    ids, verdicts = question
    return [[(step.end, ids, verdicts[label]) for step, label, weight in
             zip(batch.episodes[i].steps, batch.labels[i], batch.question_weight[i]) if weight > 0] for i in micro]


def teach_question(model, optimizer, batch, question, updates=40, share=32, max_tokens=8192, seed=0):
    """Before RL: let a policy that never saw the classifier's question learn to answer it at all.

    A language model knows what "good or bad?" asks for. A policy trained on games alone gives the verdicts a
    probability of e^-24; then -log pi(verdict) drowns the reward, and what follows the assistant's header becomes a
    verdict everywhere, in the place of actions too (see EXPERIMENTS.md). So: supervised updates on
    -log pi(verdict) - log pi(own sampled tokens); the second term keeps the policy where it is.
    Returns the generative loss of the first and the last update.
    """
    model.train()
    losses, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(updates):
        chosen = torch.randperm(len(batch.episodes), generator=generator)[:share].tolist()
        part = make_batch([batch.episodes[i] for i in chosen], batch.advantages[chosen], "rules", questions_per_episode=3)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in micro_batches(part.episodes, max_tokens):
            out = forward(model, [part.episodes[i] for i in micro], branches=branches_of(part, micro, question))
            weights = torch.tensor([w for i in micro for w in part.question_weight[i] if w > 0])
            generative = generative_loss(out["verdicts"], weights.to(out["verdicts"].device)) if len(weights) else 0.0
            own = torch.cat([part.token_weight[i] for i in micro]).to(out["logprobs"].device)
            (generative - (own * out["logprobs"]).sum()).backward()
            total += float(generative.detach()) if len(weights) else 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses[0], losses[-1]


def update(model, value_head, optimizer, batch, question=None, clip=0.2, kl_coef=0.0, classifier_coef=0.0,
           temperature=1.0, max_tokens=8192, max_norm=1.0, world=None):
    """One optimizer step on L = L_GRPO + classifier_coef * (L_generative + L_value). Returns a dictionary of floats.

    Args:
        value_head: the value head if its loss is wanted, else None.
        question: (question ids, {GOOD: verdict ids, BAD: verdict ids}) if the generative loss is wanted, else None.
        world: accelerate's Accelerator where several processes share the work, else None. All of them hold the same batch
            (its weights are those of the whole), each computes its micro-batches, and the gradients are added up.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    stats, right, seen = {}, {}, {}

    def count(name, correct):
        right[name] = right.get(name, 0) + int(correct)
        seen[name] = seen.get(name, 0) + 1

    def add(name, value):
        stats[name] = stats.get(name, 0.0) + value.item()

    micros = micro_batches(batch.episodes, max_tokens)
    for micro in own_share(micros, world, is_sharded(model)):
        if micro is None:
            (0.0 * forward(model, [batch.episodes[i] for i in micros[-1]], temperature)["logprobs"].sum()).backward()
            continue
        episodes = [batch.episodes[i] for i in micro]
        device = next(model.parameters()).device
        cat = lambda parts: torch.cat([parts[i] for i in micro]).to(device)
        out = forward(model, episodes, temperature, branches_of(batch, micro, question), value_head)

        weights, lengths = cat(batch.token_weight), torch.tensor([sum(e.sampled) for e in episodes])
        advantages = batch.advantages[micro].repeat_interleave(lengths).to(device)              # (N,)
        loss, parts = grpo_loss(out["logprobs"], cat(batch.old_logprobs), advantages, weights, clip,
                                cat(batch.ref_logprobs) if batch.ref_logprobs else None, kl_coef,
                                cat(batch.importance) if batch.importance else None)
        for name, value in parts.items():
            add(name, value)
        add("entropy", (weights * out["entropy"]).sum())
        if "verdicts" in out:
            flat = [(label, w) for i in micro for label, w in zip(batch.labels[i], batch.question_weight[i]) if w > 0]
            part = generative_loss(out["verdicts"], torch.tensor([w for _, w in flat], device=device))
            loss = loss + classifier_coef * part
            add("generative_loss", part.detach())
            good, bad = question[1][GOOD][0], question[1][BAD][0]
            for (label, _), says_good in zip(flat, out["verdict_first"][:, good] > out["verdict_first"][:, bad]):
                count("good" if label == GOOD else "bad", bool(says_good) == (label == GOOD))
        if "values" in out:
            labels = torch.tensor([label for i in micro for label in batch.labels[i]], device=device)
            part = value_head_loss(out["values"], labels,
                                   torch.tensor([w for i in micro for w in batch.value_weight[i]], device=device))
            loss = loss + classifier_coef * part
            add("value_loss", part.detach())
            for label, says_good in zip(labels.tolist(), (out["values"] > 0).tolist()):
                if label in (GOOD, BAD):
                    count("value_good" if label == GOOD else "value_bad", says_good == (label == GOOD))
        loss.backward()
        add("loss", loss.detach())

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if world is not None:
        stats, right, seen = add_up(world, parameters, stats, right, seen)
    stats["grad_norm"] = clip_gradients(parameters, max_norm)
    finite = math.isfinite(stats["grad_norm"]) and math.isfinite(stats["loss"])
    if finite:
        optimizer.step()
    stats["skipped"] = float(not finite)
    stats.update({f"accuracy_{name}": right[name] / seen[name] for name in right})
    return stats

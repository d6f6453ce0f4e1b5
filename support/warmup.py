"""Before RL: a policy that never saw the classifier's question learns to answer it at all.

A language model knows what "good or bad?" asks for. A policy trained on games alone gives the verdicts a probability of
e^-24; then -log pi(verdict) drowns the reward, and what follows the assistant's header becomes a verdict everywhere, in
the place of actions too (see EXPERIMENTS.md). So: supervised updates on L_cls - log pi(own sampled tokens), where the
second term keeps the policy where it is. First the words: 24 nats of L_cls have forty times the gradient of that second
term, and forty updates of all weights on both wiped out a policy of half a million parameters (70% malformed answers). But
most of the 24 nats say no more than that the two words never follow; that stands in the words' own rows of the output layer,
which no action uses (`teach_words`; as in Kumar et al. 2022, "Fine-tuning can distort pretrained features": first the head,
then all). But for that every arm of a comparison gets the same updates on the same episodes, GRPO alone
with the second term only (a control's labels are a control's here, too); evaluation "before" comes after them, where RL
starts. The KL's reference stays the policy before them (`--model`), so the KL is not 0 in the first iteration.
"""

import torch

from classifier_loss import generative_loss, value_head_loss
from games import levels
from games.game import most_steps
from rollout import play
from support.controls import CONTROLS
from support.batches import forward, lay_out, micro_batches
from support.logs import progress
from support.setup import ADAMW, check_episodes

ENOUGH = 20  # supervised updates to undo what the words' rows alone do: they make the words likely everywhere


def warm_up(run, label, weigh):
    """`supervise` on one round of the policy's own episodes, with an optimizer that is thrown away."""
    args, seed = run.args, run.args.seed * 1_000_003
    games = levels.sample_games(run.games, args.tasks, seed)
    with progress("warm-up: playing", args.group_size * most_steps(args.max_steps, games)) as bar:
        episodes, report = play(run.engine, run.pool, run.chat, games, args.group_size, args.max_steps, args.max_context,
                                seed, args.show_actions, bar)
    check_episodes(args, episodes, report["bad_games"])
    parts = [{"params": list(part["params"]), "lr": part["peak"]} for part in run.optimizer.param_groups]
    optimizer = torch.optim.AdamW(parts, **ADAMW)

    def draw(generator):
        batch = lay_out([episodes[i] for i in torch.randperm(len(episodes), generator=generator)[:16].tolist()])
        batch.advantages = 2 * batch.won.float() - 1  # for labels by outcome
        batch.labels = label(batch, run)
        # A control must not see the truth here either: this much of it alone removes the toy's flaw.
        batch.labels = CONTROLS[args.control](batch, int(torch.randint(2**31, (), generator=generator)))
        return weigh(args, batch, int(torch.randint(2**31, (), generator=generator)))

    words = 0
    if run.question and args.warmup_updates >= ENOUGH:
        words = teach_words(run.model, draw, run.question, args.micro_tokens, args.seed, args.temperature)
    if words:
        print(f"warm-up: {words} updates of the verdicts' own rows of the output layer", flush=True)
    first, last = supervise(run.model, optimizer, draw, run.question, run.value_head, args.warmup_updates,
                            args.micro_tokens, args.seed, args.head_layer, args.temperature)
    if args.classifier != "none":
        print(f"warm-up: L_cls {first:.2f} -> {last:.2f} in {args.warmup_updates} supervised updates   (--warmup-updates)",
              flush=True)


def teach_words(model, draw, question, max_tokens=8192, seed=0, temperature=1.0, updates=100, rate=1e-2, enough=1.0):
    """Updates of the verdict words' rows of the output layer, and of nothing else, on the loss of `supervise`, until L_cls
    is at most `enough` nats (a guess between the two words is 0.7).

    Returns how many it took: 0 for a model that knows the words, or whose output layer is not trained (LoRA) or is the
    embeddings, too (then actions read these rows).
    """
    weight = model.get_output_embeddings().weight
    if not weight.requires_grad or weight is model.get_input_embeddings().weight:
        return 0
    rows = sorted({token for ids in question.verdicts.values() for token in ids})
    optimizer, generator = torch.optim.Adam([weight], lr=rate), torch.Generator().manual_seed(seed)
    model.train()
    for done in range(updates):
        batch, gradient, total = draw(generator), torch.zeros_like(weight), 0.0
        for micro in micro_batches(batch.episodes, max_tokens):
            part = batch.part(micro, weight.device)
            out = forward(model, part.sequences, part.sampled, temperature, part.branches(question))
            loss = -(part.token_weights * out["logprobs"]).sum()
            if "verdicts" in out:
                classifier = generative_loss(out["verdicts"], part.question_weights[part.question_weights > 0])
                loss, total = loss + classifier, total + classifier.item()
            gradient += torch.autograd.grad(loss, weight)[0]
        if total <= enough:
            return done
        weight.grad = torch.zeros_like(weight)
        weight.grad[rows] = gradient[rows]  # Adam does not move what never had a gradient
        optimizer.step()
        weight.grad = None
    return updates


def supervise(model, optimizer, draw, question=None, value_head=None, updates=40, max_tokens=8192, seed=0,
              head_layer=-1, temperature=1.0):
    """Updates on L_cls - sum_t w_t log pi(own token t). `draw(generator)`: a weighed batch of own episodes.

    Returns L_cls at the first and at the last update.
    """
    model.train()
    losses, generator = [], torch.Generator().manual_seed(seed)
    for _ in progress("warm-up", unit=" updates", over=range(updates)):
        batch, total = draw(generator), 0.0
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(batch.episodes, max_tokens):
            part = batch.part(micro, next(model.parameters()).device)
            out = forward(model, part.sequences, part.sampled, temperature, part.branches(question), value_head,
                          part.action_ends, head_layer)
            classifier = torch.zeros((), device=out["logprobs"].device)
            if "verdicts" in out:
                classifier = classifier + generative_loss(out["verdicts"], part.question_weights[part.question_weights > 0])
            if "values" in out:
                classifier = classifier + value_head_loss(out["values"], part.labels, part.value_weights)
            (classifier - (part.token_weights * out["logprobs"]).sum()).backward()
            total += classifier.item()
        torch.nn.utils.clip_grad_norm_([p for part in optimizer.param_groups for p in part["params"]], 1.0)
        optimizer.step()
        losses.append(total)
    return losses[0], losses[-1]

"""Before RL: let a policy that never saw the classifier's question learn to answer it at all.

A language model knows what "good or bad?" asks for. A policy trained on games alone gives the verdicts a probability of
e^-24; then -log pi(verdict) drowns the reward, and what follows the assistant's header becomes a verdict everywhere, in
the place of actions too (see EXPERIMENTS.md).
"""

import torch

from classifier_loss import balanced_choice, class_weights, generative_loss, rule_labels
from games import levels
from grpo import token_weights
from rollout import play
from support.batches import forward, lay_out, micro_batches


def introduce_question(run):
    """Teach the question on one round of the policy's own episodes, with an optimizer that is thrown away."""
    args = run.args
    games = levels.sample_games(run.games, args.tasks, args.seed * 1_000_003)
    episodes, _ = play(run.engine, run.pool, run.chat, games, args.group_size, args.max_steps, args.max_context,
                       args.seed * 1_000_003, args.show_actions)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    first, last = teach_question(run.model, optimizer, episodes, run.question, args.question_warmup,
                                 max_tokens=args.micro_tokens, seed=args.seed)
    print(f"taught the classifier's question: loss {first:.2f} -> {last:.2f} in {args.question_warmup} updates", flush=True)


def teach_question(model, optimizer, episodes, question, updates=40, share=32, max_tokens=8192, seed=0):
    """Supervised updates on -log pi(verdict) - log pi(own sampled tokens); the second term keeps the policy where it is.

    Returns the generative loss of the first and the last update.
    """
    model.train()
    losses, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(updates):
        chosen = torch.randperm(len(episodes), generator=generator)[:share].tolist()
        batch = lay_out([episodes[i] for i in chosen])
        batch.labels = rule_labels(batch.won, batch.flawed)
        batch.token_weights = token_weights(batch.step_of_token, batch.episode_of_step[batch.step_of_token])
        asked = torch.full_like(batch.labels, -1)
        chosen = balanced_choice(batch.labels, batch.episode_of_step, 3, torch.Generator().manual_seed(0))
        asked[chosen] = batch.labels[chosen]
        batch.question_weights = class_weights(asked)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in micro_batches(batch.episodes, max_tokens):
            part = batch.part(micro, next(model.parameters()).device)
            out = forward(model, part.sequences, part.sampled, branches=part.branches(question))
            weights = part.question_weights[part.question_weights > 0]
            generative = generative_loss(out["verdicts"], weights) if len(weights) else 0.0
            (generative - (part.token_weights * out["logprobs"]).sum()).backward()
            total += float(generative.detach()) if len(weights) else 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses[0], losses[-1]

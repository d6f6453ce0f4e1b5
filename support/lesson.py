"""One real episode, from text to loss, as a page of tables: what the loop of train.py does to every step and token.

    python -m support.lesson                                              # policies/tiny, one house, 8 episodes
    python -m support.lesson --model runs/RUN/checkpoint-000032 --out docs/one-episode.md     # with its value head

The policy plays one training game 8 times (a group). Of the episodes that were won in spite of a flaw the first is shown: it
is where the outcome praises what was bad. The numbers are those of the loop's own functions, on this group as the whole batch.
"""

import argparse
import os
import sys
from types import SimpleNamespace

import torch

from actor import forward
from classifier_loss import GOOD, balanced_weights, flaw_labels, value_head_loss
from games import levels
from games.pool import EnvPool
from grpo import group_advantages, grpo_loss
from rollout import FLAWS, play
from support.batches import lay_out
from support.report import run_of, value_head_of
from support.setup import PLAYED, player
from train import weigh

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def play_group(folder, seed, pool, env="alfworld", most=30):
    """(episodes of one game, chat format, model): the first game from `seed` on that is won by some, not by all, and
    once in spite of a flaw. Raises ValueError where `most` games have none."""
    args = SimpleNamespace(env=env, device="cpu", shard=False, engine="torch", engine_memory=0.9, tensor_parallel=1, seed=0,
                           **{name: None for name in PLAYED if name != "engine"})
    engine, chat = player(args, folder)
    games = levels.level_games(env, "L1", "train", "generated", ["short"] if env == "scienceworld" else None)
    for k in range(seed, seed + most):
        episodes, _ = play(engine, pool, chat, levels.sample_games(games, 1, k), 8, seed=k, max_context=args.max_context)
        if 0 < sum(e.won for e in episodes) < len(episodes) and any(worth_showing(e) for e in episodes):
            return episodes, chat, engine.model
    raise ValueError(f"{folder}: in none of {most} games is an episode won in spite of a flaw and another one lost")


def worth_showing(episode):
    return episode.won and any(step.flawed for step in episode.steps) and len(episode.steps) <= 12


def numbers_of(model, episodes, head=None, layer=-1):
    """The batch of the group as train.py fills it in; each token's log pi and part of L_GRPO, (N,); and with a value head,
    each step's P(good) and part of L_cls, (S,). The parts add up to the losses."""
    batch = lay_out(episodes)
    outcome, _ = group_advantages(batch.reward, batch.group)                                            # eq. 1
    batch.advantages = outcome[batch.episode_of_step]                                                   # (S,)
    batch.labels = flaw_labels(batch.flawed)                                                            # (S,)
    weigh(SimpleNamespace(weighting="token", labels="flaws", questions=3), batch, seed=0)
    with torch.no_grad():
        out = forward(model, batch.sequences, batch.sampled, value_head=head, head_layer=layer,
                      action_ends=[[step.end for step in e.steps] for e in episodes])
    logprobs, judged = out["logprobs"], None                                                            # (N,)
    if head:
        parts = [value_head_loss(*(x[s:s + 1] for x in (out["values"], batch.labels, batch.value_weights)))
                 for s in range(len(batch.labels))]                                                     # (S,) eq. 5b
        judged = torch.sigmoid(out["values"]), torch.stack(parts)
    A = batch.advantages[batch.step_of_token]                                                           # (N,)
    each = torch.stack([grpo_loss(*(x[i:i + 1] for x in (logprobs, batch.old_logprobs, A, batch.token_weights)))[0]
                        for i in range(len(A))])                                                        # (N,) eqs. 2, 3
    return batch, logprobs, each, judged


def cell(text):
    """Model and world text in a Markdown table: as code, on one line, with nothing that ends the cell."""
    return "`" + " ".join(text.replace("|", "\\|").replace("`", "'").split()) + "`"


def page(episodes, chat, model, command, head=None, layer=-1, coef=0.3):
    """The page as Markdown. head, layer, coef: a value head, the layer that it reads, lambda."""
    batch, logprobs, each, judged = numbers_of(model, episodes, head, layer)
    e = next(i for i, episode in enumerate(episodes) if worth_showing(episode))
    episode, decode = episodes[e], chat.tokenizer.decode
    first = int((batch.episode_of_step < e).sum())  # number of its first step
    won = sum(one.won for one in episodes)
    A = batch.advantages[first].item()
    lines = [
        "# One episode, from text to loss", "",
        f"Made by `{command}`: every number below comes from the functions that training calls.", "",
        f"The game: {episode.game.name}. The policy has played it {len(episodes)} times, {won} times with success: a *group*. "
        f"The rewards {[int(one.reward) for one in episodes]} have mean {won / len(episodes):.3f} and standard deviation "
        f"{(won / len(episodes) * (1 - won / len(episodes))) ** 0.5:.3f}, so each step of a won episode has advantage "
        f"(1 - {won / len(episodes):.3f}) / {(won / len(episodes) * (1 - won / len(episodes))) ** 0.5:.3f} = **{A:+.3f}**, of a lost one "
        f"**{batch.advantages[~batch.won][0]:+.3f}** (eq. 1 of grpo.py). Below, one of the won ones.", "",
        "## Its steps", "",
        "`A` is the same in every row: the outcome cannot tell the steps apart. The label can. `w` is the step's weight: of its "
        "tokens in L_GRPO (eq. 3), and in the value head's loss (eq. 5b), where won and lost episodes are balanced apart." +
        (" P(good) is what the value head says of the step, `-w log P(label)` its part of that loss." if judged else ""), "",
        "| | the policy has read | its action | flaws | label | A | w, L_GRPO | log pi | w, L_cls |" +
        " P(good) | part of L_cls |" * bool(judged),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |" + " --- | --- |" * bool(judged)]
    ends = [0] + [step.end for step in episode.steps]
    for k, step in enumerate(episode.steps):
        s, tokens = first + k, batch.step_of_token == first + k
        read = decode([t for t in episode.tokens[ends[k]:step.start]], skip_special_tokens=False)
        read = read.split("user\n")[-1].split("<|im_end|>")[0]
        flaws = ", ".join(name for name in FLAWS if getattr(step, name)) or "-"
        lines.append(f"| {k + 1} | {cell(read[-160:] if k == 0 else read)} | {cell(step.action or '(none)')} | {flaws} | "
                     f"{'good' if batch.labels[s] == GOOD else 'bad'} | {batch.advantages[s]:+.2f} | "
                     f"{batch.token_weights[tokens].sum():.4f} | {logprobs[tokens].sum():.2f} | {batch.value_weights[s]:.4f} |" +
                     (f" {judged[0][s]:.3f} | {judged[1][s]:.5f} |" if judged else ""))
    praised = sum(step.flawed for step in episode.steps)
    flawed_advantage = batch.advantages[batch.flawed].mean().item()
    lines += ["", f"{praised} flawed {'step is' if praised == 1 else 'steps are'} praised here with {A:+.2f}. That is not what "
              f"training does to flaws on the whole: over all {len(episodes)} episodes the {int(batch.flawed.sum())} flawed steps of "
              f"this group have a mean advantage of **{flawed_advantage:+.2f}**, the {int((~batch.flawed).sum())} others "
              f"{batch.advantages[~batch.flawed].mean():+.2f}. One group may go either way (toy_bandit.py, figure 1); the expectation "
              "may not.", ""]
    k = next(i for i, step in enumerate(episode.steps) if step.flawed)
    step, places = episode.steps[k], (batch.step_of_token == first + k).nonzero()[:, 0].tolist()
    lines += [f"## The tokens of step {k + 1}", "",
              "What was given (the system's and the user's turns) is read and never scored: mask 0. What the policy sampled "
              "has mask 1, and each such token its own part of the loss, `-w A ratio` (eqs. 2, 3; before the first optimizer step "
              "the ratio is 1).", "",
              "| token | mask | log pi | ratio | w | A | part of L_GRPO |", "| --- | --- | --- | --- | --- | --- | --- |"]
    before = range(max(ends[k], step.start - 6), step.start)
    lines += [f"| {cell(repr(decode([episode.tokens[t]])))} | 0 | | | | | |" for t in before]
    for i, t in zip(places, range(step.start, step.end)):
        ratio = (logprobs[i] - batch.old_logprobs[i]).exp()
        lines.append(f"| {cell(repr(decode([episode.tokens[t]])))} | 1 | {logprobs[i]:.3f} | {ratio:.3f} | {batch.token_weights[i]:.5f} | "
                     f"{batch.advantages[first + k]:+.3f} | {each[i]:+.5f} |")
    cells = [(name, int(((batch.labels == GOOD) == good)[batch.won == w].sum()), batch.value_weights[
        ((batch.labels == GOOD) == good) & (batch.won == w)].sum().item())
        for name, good, w in (("good, won", True, True), ("bad, won", False, True), ("good, lost", True, False), ("bad, lost", False, False))]
    lines += ["", f"The parts of all {len(each)} sampled tokens of the group add up to L_GRPO = {each.sum():+.5f}.", "",
              "## The classifier's weights", "",
              "Each cell of class and outcome weighs the same, so that knowing the outcome alone helps nothing:", "",
              "| cell | steps | weight of each | all together |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {count} | {total / max(1, count):.4f} | {total:.3f} |" for name, count, total in cells]
    assert torch.allclose(batch.value_weights, balanced_weights(batch.labels, batch.won))
    if judged:
        right = (judged[0] > 0.5) == (batch.labels == GOOD)
        classifier = judged[1].sum().item()
        lines += ["", f"Of the group's {len(right)} steps the head judges {int(right.sum())} as labelled. Their parts add up to "
                  f"L_cls = {classifier:.5f} (a head that cannot tell, P = 0.5 everywhere, has log 2 = 0.69315).", "",
                  "## The loss", "", f"    L = L_GRPO + lambda L_cls = {each.sum():+.5f} + {coef:g} * {classifier:.5f} = "
                  f"{each.sum().item() + coef * classifier:+.5f}", "",
                  "train.py adds 0.01 KL to the policy that RL began with (eq. 4), has 16 such groups in an iteration, and takes "
                  "the gradient of this number: through the log-probabilities, and through the head into the hidden states "
                  "that the actions are chosen from."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="One episode, from text to loss.")
    parser.add_argument("--model", default=os.path.join("policies", "tiny"), help="Hugging Face folder")
    parser.add_argument("--seed", type=int, default=0, help="of the first game that is tried, and of sampling")
    parser.add_argument("--out", help="file to write (default: the screen)")
    args = parser.parse_args()
    folder = args.model if os.path.isdir(args.model) else os.path.join(ROOT, args.model)
    try:
        with EnvPool(1) as pool:
            episodes, chat, model = play_group(folder, args.seed, pool)
        config, head = run_of(folder)[0], value_head_of(folder)
        command = "python -m support.lesson" + (f" --model {args.model}" if args.model != parser.get_default("model") else "")
        text = page(episodes, chat, model, command + (f" --seed {args.seed}" if args.seed else ""), head,
                    config.get("head_layer", -1), config.get("classifier_coef", 0.3))
        if args.out:
            with open(args.out, "w") as file:
                file.write(text)
        else:
            print(text)
    except (OSError, ValueError) as error:
        sys.exit(f"lesson: {error}")


if __name__ == "__main__":
    main()

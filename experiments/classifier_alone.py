"""Does the classification loss by itself lower the coupling? No reward, no RL: docs/coupling.md, question
(ii).

    python -m experiments.classifier_alone --out FILE              # goes on where it was stopped
    python -m experiments.classifier_alone --out FILE --report     # the tables alone

A draw: games of its own, played once by the policy as it is. On the episodes of the first third each arm
takes
--updates steps of AdamW, always from that same policy, on

    L = lambda L_cls + KL      KL = E_start[pi / pi_start - 1 - log(pi / pi_start)] per sampled token

and then coupling.py's split update (plain gradient) is measured with the same episodes for all arms: the
second third gives the gradients, the third is held out. So arms differ by nothing but what they learnt.

(the generative form after support/warmup.py's teach_words, as in train.py: first the two verdict words' own rows of the
output layer, without lambda and without KL, since a policy that was never asked gives them e^-24).

An arm is FORM:LAMBDA:LAYER, e.g. value:1:-1 (layer: which hidden state the head reads; generative: -1). Each
has a control with the labels of its episodes permuted (support/controls.py: class balance and outcome stay),
**at equal KL**: whichever of the two has moved further from the start is drawn back along the straight line
to it until both have the same KL, or nearly (`kl` in the rows). The other control, stop-gradient, needs no run: nothing reaches the trunk,
so it is the start.

Primary outcome, written down before the first run: ratio -leak / own of all flawed steps, value:1:-1, true
minus permuted labels, ten draws.
"""

import argparse
import copy
import json
import os
import sys
from types import SimpleNamespace

import torch

from classifier_loss import generative_loss, value_head_loss
from coupling import split_update
from games import levels
from games.pool import EnvPool
from support.batches import forward, make_question, micro_batches, sampled_logprobs
from support.controls import shuffle
from support.coupling_report import KINDS, NAMES, combine, gaps, over_draws, read_lines, summarize, text
from support.coupling_run import as_run, collect, prepare
from support.logs import Tally
from support.setup import ADAMW, player
from support.warmup import teach_words
from train import weigh

ARMS = ("value:1:-1", "generative:1:-1", "value:1:2", "value:0.3:-1", "value:3:-1")


def learn(args, start, arm, batch, question, seed):
    """A copy of the policy after --updates steps on L, and its value head (None for the generative form)."""
    form, coef, layer = arm.split(":")
    model = copy.deepcopy(start)
    torch.manual_seed(seed)
    head = torch.nn.Linear(model.config.hidden_size, 1) if form == "value" else None
    parts = [{"params": list(model.parameters()), "lr": args.lr}]
    parts += [{"params": list(head.parameters()), "lr": args.head_lr}] if head else []
    optimizer, generator = torch.optim.AdamW(parts, **ADAMW), torch.Generator().manual_seed(seed)

    def draw(generator, update=0):
        chosen = torch.randperm(len(batch.episodes), generator=generator)[:args.batch_episodes].tolist()
        return weigh(args, batch.part(chosen), seed + update)

    if not head:  # as train.py does before RL; without it the generative form moved 0.4 nats a token at once
        teach_words(model, draw, question, args.micro_tokens, seed, args.temperature)
    model.train()
    for update in range(args.updates):
        drawn = draw(generator, update)
        for part, peak in zip(optimizer.param_groups, (args.lr, args.head_lr)):
            part["lr"] = peak * min(1.0, (update + 1) / 10)  # Adam's first steps are long whatever the gradient
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(drawn.episodes, args.micro_tokens):
            part = drawn.part(micro)
            out = ask(model, part, None if head else question, head, int(layer), args.temperature)
            d = out["logprobs"] - part.ref_logprobs                                             # (n,)
            loss = (part.token_weights * (d.exp() - 1 - d)).sum()
            if "values" in out:
                loss = loss + float(coef) * value_head_loss(out["values"], part.labels, part.value_weights)
            if "verdicts" in out:
                asked = part.question_weights[part.question_weights > 0]
                loss = loss + float(coef) * generative_loss(out["verdicts"], asked)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in parts for p in group["params"]], 1.0)
        optimizer.step()
    return model, head


def ask(model, part, question, head, layer, temperature):
    return forward(model, part.sequences, part.sampled, temperature, branches=part.branches(question),
                   value_head=head, action_ends=part.action_ends, head_layer=layer)


@torch.no_grad()
def accuracy(args, model, head, layer, batch, question, seed):
    """Share of right answers, the mean of the cells class x outcome, on episodes that nobody learnt from."""
    tally, batch = Tally(), weigh(args, batch, seed)
    for micro in micro_batches(batch.episodes, args.micro_tokens):
        part = batch.part(micro)
        out = ask(model, part, None if head else question, head, layer, args.temperature)
        if head:
            tally.judge("cell", out["values"] > 0, part.labels, part.won)
        elif "verdict_logits" in out:
            asked = part.question_weights > 0
            says_good = question.says_good(out["verdict_logits"])
            tally.judge("cell", says_good, part.labels[asked], part.won[asked])
    cells = [name for name in tally.sums if name.startswith("count_")]
    shares = [tally.sums[name.replace("count", "right")] / tally.sums[name] for name in cells]
    return sum(shares) / max(1, len(shares))


def distance(args, model, batch):
    """KL(start || model) in nats per token, on the start's own samples (batch.ref_logprobs: the start's)."""
    d = (sampled_logprobs(model, batch, args.temperature, args.micro_tokens) - batch.ref_logprobs).double()
    return (d.exp() - 1 - d).mean().item()


def draw_back(args, model, start, batch, target):
    """Move the weights along the straight line to the start until KL is `target` to within 2%; returns (KL,
    share of the way that is left). KL grows about with the square of the way: its root is interpolated."""
    far, near, share = [p.detach().clone() for p in model.parameters()], list(start.parameters()), 1.0
    kl, below, above = distance(args, model, batch), (0.0, 0.0), None
    for _ in range(12):
        if abs(kl / target - 1) < 0.02:
            break
        if kl > target:
            above = share, kl ** 0.5
        else:
            below = share, kl ** 0.5
        if above is None:  # it is not as far as that anywhere on the way
            break
        share = below[0] + (above[0] - below[0]) * (target ** 0.5 - below[1]) / (above[1] - below[1])
        with torch.no_grad():
            for p, end, begin in zip(model.parameters(), far, near):
                p.copy_(begin + share * (end - begin))
        kl = distance(args, model, batch)
    return kl, share


def one_draw(args, draw, games, engine, chat, pool, write):
    """All arms on one draw's games; `write` takes each row as it comes."""
    seed, start = (args.seed * 1_000_003 + draw) * 10_007, engine.model
    silent = SimpleNamespace(write=print, update=lambda: None)
    episodes, third = collect(args, engine, chat, pool, games, seed, silent), len(games) // 3
    parts = [prepare(args, chat, [e for e in episodes if e.group // third == k]) for k in range(3)]
    (own, _), (first, _), (held_out, mask) = parts
    for batch in (own, first):
        batch.ref_logprobs = sampled_logprobs(start, batch, args.temperature, args.micro_tokens)
    question = make_question(chat)
    permuted = copy.copy(own)
    permuted.labels = shuffle(own, seed)

    def measure(model, **more):
        found, share = split_update(args, as_run(args, model, None), first, held_out, mask)
        write({"draw": draw, **more, "plain": summarize(found["plain"], share, held_out, draws=2)})

    if not first.advantages.any():
        print(f"draw {draw}: no gradient, every group all won or all lost")
        return
    measure(start, arm="start", success=sum(e.won for e in episodes) / len(episodes))
    for arm in args.arms:
        layer, twins = int(arm.split(":")[2]), {}
        for labels, batch in (("true", own), ("permuted", permuted)):
            model, head = learn(args, start, arm, batch, question, seed)
            right = accuracy(args, model, head, layer, held_out, question, seed)
            twins[labels] = model, distance(args, model, first), right
        target = min(kl for _, kl, _ in twins.values())
        for labels, (model, reached, right) in twins.items():
            kl, share = draw_back(args, model, start, first, target)
            measure(model, arm=arm, labels=labels, kl=kl, kl_before=reached, share=share, accuracy=right)


def report(path):
    """The tables of a file of rows."""
    rows = [json.loads(line) for line in open(path)]
    whole = lambda arm: {row["draw"]: row for row in rows if (row["arm"], row.get("labels")) == arm}
    start, lines = whole(("start", None)), []
    arms = list(dict.fromkeys((row["arm"], row["labels"]) for row in rows if row["arm"] != "start"))
    lines.append(f"{'':30}{'draws':>6}{'KL':>8}{'accuracy':>10}   " + "".join(f"{name:28}" for name in NAMES))
    for kind in KINDS:
        shown = lambda found: "".join(f"{text(*found[name]):28}" for name in NAMES)
        lines.append(f"{kind}\n{'  the policy as it is':30}{len(start):6}{'':21}" +
                     shown(combine(list(start.values()), "plain", kind)))
        for arm, labels in arms:
            mine = whole((arm, labels))
            both = [draw for draw in mine if draw in start]
            kl, right = (over_draws([row[key] for row in mine.values()])[0] for key in ("kl", "accuracy"))
            found = gaps([start[d] for d in both], [mine[d] for d in both], "plain", kind)
            name = f"  {arm} {labels} - start"
            lines.append(f"{name:33}{len(both):3}{kl:8.4f}{100 * right:9.0f}%   "
                         + (shown(found) if found else "-"))
        for arm in dict.fromkeys(arm for arm, _ in arms):
            a, b = whole((arm, "permuted")), whole((arm, "true"))
            both = [draw for draw in b if draw in a]
            found = gaps([a[d] for d in both], [b[d] for d in both], "plain", kind)
            name = f"  {arm} true - permuted"
            lines.append(f"{name:33}{len(both):3}{'':21}" + (shown(found) if found else "-"))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="policies/tiny", help="policy to begin with")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="FORM:LAMBDA:LAYER")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--games-per-draw", type=int, default=24, help="three thirds; 8 episodes each")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--batch-episodes", type=int, default=8, help="per update")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1, help="of games, samples, shuffling")
    parser.add_argument("--out", required=True, help="file of rows; draws that it has are not measured again")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if args.report:
        print(report(args.out))
        return
    there = read_lines(args.out)
    settings = {name: value for name, value in vars(args).items() if name not in ("arms", "draws", "out", "report")}
    wanted = {(arm, labels) for arm in args.arms for labels in ("true", "permuted")} | {("start", None)}
    vars(args).update(  # as train.py and coupling.py have them by default
        env="alfworld", engine="torch", precision="float32", device="cpu", shard=False, temperature=None,
        max_new_tokens=None, max_context=None, show_actions=None, group_size=8, max_steps=20, batch=64,
        micro_tokens=8192, credit="grpo", advantage="std", weighting="token", labels="flaws", questions=3,
        blocks=2, step=1e-3)
    engine, chat = player(args, args.model)
    count = args.games_per_draw
    games = levels.level_games("alfworld", "L1", "train", "generated", None)
    games = levels.sample_games(games, args.draws * count, args.seed)
    with EnvPool(1) as pool:
        for draw in range(args.draws):
            done = {(row["arm"], row.get("labels")) for row in there if row["draw"] == draw and row.get("settings") == settings}
            if done >= wanted:
                continue

            def write(row):
                row["settings"] = settings
                there[:] = [old for old in there if (old["draw"], old["arm"], old.get("labels")) !=
                            (row["draw"], row["arm"], row.get("labels"))] + [row]
                with open(args.out + ".partial", "w") as file:
                    file.writelines(json.dumps(one) + "\n" for one in there)
                os.replace(args.out + ".partial", args.out)
                print(row["draw"], row["arm"], row.get("labels"), row["plain"]["flawed"]["ratio"], flush=True)
            one_draw(args, draw, games[draw * count:(draw + 1) * count], engine, chat, pool, write)
    print(report(args.out))


if __name__ == "__main__":
    sys.exit(main())

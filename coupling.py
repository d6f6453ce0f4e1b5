"""Is this policy in the danger zone? Gradient coupling, measured on any model that trains.

    python coupling.py --model policies/tiny --out runs/coupling              # one draw of games: 2 minutes
    python coupling.py --model A --model B --draws 10 --out runs/a-and-b      # paired: on the same games
    python coupling.py --model policies/tiny --probes runs/probes.jsonl       # kernel and representation, too
    python coupling.py --model policies/tiny --report runs/coupling/report.html  # one page of it
    python coupling.py --model policies/tiny --after runs/a runs/b          # what became of its flaws there
    python coupling.py --model policies/tiny --level L2 --held-out test     # flaws in unseen kinds of task

**The split update**: what training would do to this policy's flaws. The policy plays training games. On half
of them the GRPO gradient, with the real advantages and token weights, is split by the tokens it comes from,

    G = sum_t w_t A_t grad log pi(t) = G_u + G_f       unflawed and flawed steps (rollout.Step.flawed)     (1)

and a small step is taken along each part *alone*. How does log pi(action) change in the other half (or in
test games), for each kind of flaw (rollout.FLAWS), for all flawed actions, and for good ones?

    leak  = mean_x [log pi(x; theta + eta D_u) - log pi(x; theta)] / eta    what is done to the rest       (2)
    own   = the same along D_f                     what punishing flaws does: it corrects where it is negative
    net   = leak + own: a constant added to all A changes the parts, not it (experiments/leak_parts.py)
    ratio = -leak / own             from 1 on (net > 0) the flaw grows. That is the danger zone,
                              rho > r' q' (1 - q') / (r_s q_s (1 - q_s)) of toy_bandit.py, in a real policy
    D     = G, or through Adam's second moments G / (sqrt(v) + 1e-8), which G has joined as in its step

Units: nats per step at a learning rate of 1, to first order. All steps go equally far, as far along the whole
G as changes held-out log pi by --step nats (root mean square); leak + own is compared with the change along
the whole G (additivity). log pi(action) is the sum over the tokens between the action's tags (tags and end
couple trivially), without an action over all of its answer's. Classifier and KL are left out.

**Intervals.** One draw: bootstrap over both halves. The gradients are taken for --blocks blocks of whole
groups apart, and the change adds up over blocks, so that a resample draws blocks from the first half and,
independently, games from the other. Eight blocks are few: this interval is coarse (deviations are widened by
sqrt(8/7): Rao & Wu 1988). Several draws, each with its own games and samples: Student's t over the draws;
their ratio is that of the means, its interval by jackknife over the draws; --blocks 1 is then enough, and
with --no-adam costs a third less. A draw whose groups all have one reward has no gradient: it is counted and
left out.

**The kernel**, which explains the ratio: how alike are the policy gradients of two actions? `probe_kernel`,
on the probes of support/probes.py. What the layers make of them: support/representation.py. Coupling while a
policy learns: `train.py --probes --coupling-every`, support/coupling_dynamics.py. All in float32 by PyTorch:
differences of nearly equal numbers are read.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from games.pool import EnvPool
from rollout import flaw_rates
from support.batches import deal, forward, micro_batches, sampled_logprobs
from support.coupling_figures import draw_danger_zone, draw_fate, draw_kernels, fate_points
from support.coupling_page import write_page
from support.coupling_report import fates, paired, summarize, table, write_lines
from support.coupling_run import (KeptRows, as_run, checkpoint_moments, choose_games, collect,
                                  parse_arguments, prepare)
from support.logs import machine, progress
from support.probes import encode, group_cosines, kernel_table, probe_file, probe_logprobs
from support.representation import representation, representation_table
from support.setup import player

PARTS = ("unflawed", "flawed")  # of the gradient: G_u, G_f
MOMENT_BLOCKS = 8  # of each half of the games, for Adam's second moments


# ----------------------------------------------------------------------------------------- the split update

def split_update(args, run, first, held_out, mask, v=None):
    """What a step along each part of the gradient does to every held-out action, eqs. 1 and 2.

    Args:
        args: temperature, micro_tokens, blocks, step: as in support/coupling_run.py.
        run: with the model, and a bar that is told of every part done.
        first, held_out: Batches of different games, with advantages and token weights. S steps are held out.
        mask: (N,) 1.0 for the held-out tokens that are the action itself.
        v: Adam's second moments, like the parameters, or a function from G to them; None: plain G alone.
    Returns: for "plain", and with v for "adam", {"change": (2, B, S) by part (PARTS) and block, "whole": (S,)
        along the undivided gradient}, in nats per unit step; and the share (B,) of the weights in each block.
    """
    again, blocks = lambda: action_logprobs(args, run, held_out, mask), deal(first, args.blocks)
    only = list(parts_of(args, run, first)) if len(blocks) == 1 else None  # their sum is the whole
    before, G = again(), [sum(g) for g in zip(*only)] if only else ascent(args, run, first)     # (S,)
    rules, v = {"plain": lambda G: G}, v(G) if callable(v) else v
    if v is not None:
        rules["adam"] = lambda G: [g / (moment.sqrt() + 1e-8) for g, moment in zip(G, v)]
    found, share, distance = {}, [], {}
    for rule, direct in rules.items():
        distance[rule] = step_length(args, run, direct(G), before, again)
        found[rule] = {"whole": effect(run, direct(G), distance[rule], before, again),
                       "change": torch.zeros(len(PARTS), len(blocks), len(before), dtype=torch.float64)}
        run.bar.update()
    for b, block in enumerate(blocks):
        part = first.part(block)  # with its share of the weights of all of `first`
        share.append(float(part.token_weights.sum()))
        for i, G in enumerate(only or parts_of(args, run, part)):                               # eq. 1
            for rule, direct in rules.items():
                change = effect(run, direct(G), distance[rule], before, again)                  # eq. 2
                found[rule]["change"][i, b] = change
                run.bar.update()
    return found, share


def parts_of(args, run, batch):
    """G_u and G_f of eq. 1, one after the other."""
    flawed = batch.flawed[batch.step_of_token]                                                  # (n,)
    return (ascent(args, run, batch, kept) for kept in (~flawed, flawed))


def ascent(args, run, batch, kept=1.0):
    """G of the tokens that are `kept` (N,): a list of tensors like the model's parameters. The others weigh
    nothing, but are not left out of the batch, so that the gradients of the parts add up to its own."""
    weighed = replace(batch, token_weights=batch.token_weights * kept)
    run.model.train()
    run.model.zero_grad(set_to_none=True)
    for micro in micro_batches(weighed.episodes, args.micro_tokens):
        part = weighed.part(micro, next(run.model.parameters()).device)
        logprobs = forward(run.model, part.sequences, part.sampled, args.temperature)["logprobs"]  # (n,)
        (part.token_weights * part.advantages[part.step_of_token] * logprobs).sum().backward()
    G = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.model.parameters()]
    run.model.zero_grad(set_to_none=True)
    return G


def effect(run, direction, distance, before, again):
    """(S,) change of log pi of every held-out action per unit step along `direction`, eq. 2: from `before` to
    what `again()` measures after a step that goes as far as `distance`."""
    length = norm(direction)
    if length == 0.0:  # of groups without variance, say
        return torch.zeros_like(before)
    eta = distance / length
    with moved(run.model, direction, eta):
        return (again() - before) / eta


def step_length(args, run, direction, before, again):
    """How far to go along `direction` so that held-out log pi changes by --step nats, root mean square."""
    trial = 1e-5 * norm(run.model.parameters())
    change = effect(run, direction, trial, before, again) * trial / norm(direction)             # (S,) nats
    return trial * args.step / float(change.square().mean().sqrt())


def norm(tensors):
    return math.sqrt(sum(float(t.detach().double().pow(2).sum()) for t in tensors))


@contextlib.contextmanager
def moved(model, direction, eta):
    """In here the weights are theta + eta * direction; afterwards they are theta again, to the last bit."""
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        try:
            for p, d in zip(model.parameters(), direction):
                p.add_(d, alpha=eta)
            yield
        finally:
            for p, b in zip(model.parameters(), before):
                p.copy_(b)


def action_logprobs(args, run, batch, mask):
    """(S,) log pi(action) of every step, in float64; mask: (N,) 1.0 for the tokens that count."""
    each = sampled_logprobs(run.model, batch, args.temperature, args.micro_tokens).double() * mask
    return torch.zeros(len(batch.flawed), dtype=torch.float64).index_add(0, batch.step_of_token, each)


def second_moments(args, run, batches):
    """Adam's v, estimated: the mean square of the gradients of some blocks of the batches, each on its own.
    (How many is fixed: v must not depend on how intervals are made.)"""
    blocks = [batch.part(block) for batch in batches for block in deal(batch, MOMENT_BLOCKS)]
    v = [torch.zeros_like(p) for p in run.model.parameters()]
    for part in blocks:
        part.token_weights = part.token_weights / part.token_weights.sum()  # as if an optimizer step's batch
        for moment, g in zip(v, ascent(args, run, part)):
            moment += g**2 / len(blocks)
        run.bar.update()
    return v


# ----------------------------------------------------------------------------------------------- the kernel

def probe_kernel(model, probes, temperature=1.0, exact=4_000_000, buckets=2**18, seed=0):
    """K(x, x') = <g, g'>, g = grad log pi(action | what came before), for every pair of n probes, per block.

    To first order K(x, x') / |g'| is by how much log pi(x) rises where the weights move one unit along g'.
    Positive K between an action where it is right and where it is flawed is the coupling.

    Up to `exact` parameters the gradients are kept whole (256 of a million: 1 GB). Beyond that each is
    sketched: every coordinate is added, with a random sign, to one of `buckets` buckets (each block has an
    equal share of them). Inner products stay unbiased; the error of a cosine is some 1 / sqrt(buckets of its
    block) (Charikar et al. 2002, "Finding frequent items in data streams").

    Args: probes: from support/probes.py, with tokens (T,) and mask (T,) of the action. seed: of the sketch.
    Returns: {block: (n, n) float64}, for the blocks of `parameter_blocks` and, their sum, "all".
    """
    model.eval()
    parameters, blocks = list(model.parameters()), parameter_blocks(model)
    sizes = {name: sum(parameters[i].numel() for i in members) for name, members in blocks.items()}
    sketched, generator = sum(sizes.values()) > exact, torch.Generator().manual_seed(seed)
    if sketched:
        sizes = {name: buckets // len(blocks) for name in blocks}
        draw = lambda i, n, kind: torch.randint(n, (parameters[i].numel(),), generator=generator, dtype=kind)
        place = {i: draw(i, sizes[name], torch.int32) for name, members in blocks.items() for i in members}
        sign = {i: 2 * draw(i, 2, torch.int8) - 1 for i in place}
    rows = {name: torch.zeros(len(probes), size) for name, size in sizes.items()}
    bar = progress("gradients of probes", len(probes), " probes")
    for n, probe in enumerate(probes):
        bar.update()
        logprob = forward(model, [probe.tokens], [probe.mask], temperature)["logprobs"].sum()
        g = torch.autograd.grad(logprob, parameters, allow_unused=True, materialize_grads=True)
        for name, members in blocks.items():
            if sketched:
                for i in members:
                    rows[name][n].index_add_(0, place[i], g[i].flatten().cpu() * sign[i])
            else:
                rows[name][n] = torch.cat([g[i].flatten() for i in members])
    bar.close()
    kernels = {name: (row @ row.T).double() for name, row in rows.items()}
    return {"all": sum(kernels.values()), **kernels}


def parameter_blocks(model, most=8):
    """{name: numbers of its parameters}: embeddings (with them the output layer, where the two are tied), the
    layers, neighbours together where there are many, and the output layer with the norm before it."""
    layers = list(model.get_decoder().layers)
    groups = min(len(layers), most - 2)
    name_of = {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    for k in range(groups):
        first, last = k * len(layers) // groups, (k + 1) * len(layers) // groups
        name = f"layer {last}" if last == first + 1 else f"layers {first + 1}-{last}"
        name_of |= {id(p): name for layer in layers[first:last] for p in layer.parameters()}
    blocks = {name: [] for name in [*dict.fromkeys(name_of.values()), "output layer"]}
    for i, p in enumerate(model.parameters()):
        blocks[name_of.get(id(p), "output layer")].append(i)
    return blocks


# ---------------------------------------------------------------------------------------------- the command

def measure(args, run, games, seed, v=None):
    """One draw: the first half of the games gives the gradients, the other is held out. A row of results, a
    short one if there is no gradient."""
    episodes = collect(args, run.engine, run.chat, run.pool, games, seed, run.bar)
    halves = [[e for e in episodes if (e.group < len(games) // 2) == here] for here in (True, False)]
    if not all(halves):
        raise ValueError("none of the games of one half can be played: see the lines above")
    (first, _), (held_out, mask) = (prepare(args, run.chat, half) for half in halves)
    about = {"games": [sorted({e.game.name for e in half}) for half in halves], "episodes": len(episodes),
             "success": sum(e.won for e in episodes) / len(episodes), **flaw_rates(episodes)}
    if not first.advantages.any():
        run.bar.write(f"no gradient: in each of {len(games) // 2} groups all episodes have one reward")
        return about
    if not args.no_adam and v is None:
        v = second_moments(args, run, [first, held_out])
    found, share = split_update(args, run, first, held_out, mask, v)
    run.shown = run.chat, held_out, found["plain"]["change"]  # the page has these episodes
    return about | {rule: summarize(one, share, held_out) for rule, one in found.items()}


def measure_all(args, pool, games, probes):
    """Every model on every draw's games, and on the probes; tables are printed and rows written as they come.
    Returns the rows that have a gradient and, by model, what there is to look at: `grams` (Gram matrices,
    probes as the model reads them), `held_out`, `scores`, `layers`, `said` of support/coupling_page.py."""
    rows, lines, count = [], [], len(games) // max(1, args.draws)
    kept = KeptRows(os.path.join(args.out, "results.jsonl"), args)
    seen_of = SimpleNamespace(grams={}, held_out={}, scores={}, layers={}, said={})
    for folder in args.model:
        here = argparse.Namespace(**vars(args))  # two models may have been trained in two ways
        engine, chat = player(here, folder)
        if here.temperature <= 0:
            raise ValueError("--temperature must be positive: greedy episodes of a group are all the same")
        weights = norm(engine.model.parameters())  # tells a folder's policy from another put in its place
        v = None if args.no_adam else checkpoint_moments(folder, engine.model)
        parts = (2 - args.no_adam) * (2 * args.blocks + 1)
        parts += 0 if args.no_adam or v else 2 * min(MOMENT_BLOCKS, count // 2)
        parts += -(-count // max(1, args.batch // args.group_size))  # of playing
        with progress(folder, args.draws * parts, " parts") as bar:
            run = as_run(here, engine.model, bar, engine=engine, chat=chat, pool=pool)
            for draw in range(args.draws):
                drawn = games[draw * count:(draw + 1) * count]
                about = {"model": folder, "weights": weights, "draw": draw, "seed": args.seed}
                row = None if args.report else kept.find(about, drawn)  # the page wants the steps themselves
                if row is None:
                    seed = (args.seed * 1_000_003 + draw) * 10_007  # `collect` adds the number of a game
                    row = {**about, "moments": "trainer.pt" if v else "blocks", "args": vars(args),
                           "machine": machine(), **measure(here, run, drawn, seed, v)}
                    kept.add(row)
                else:
                    bar.update(parts)
                rows.append(row)
        mine = [row for row in rows if row["model"] == folder]
        if any("plain" in row for row in mine):
            if args.report and "shown" in vars(run):
                seen_of.held_out[folder] = run.shown
            print(table(folder, mine) + "\n", flush=True)
        elif mine:
            print(f"{folder}: no draw has a gradient, all episodes of a group have one reward: take more "
                  "--episodes, or a policy that wins now and then\n", flush=True)
        if probes:
            seen = encode(probes, chat)
            grams = probe_kernel(engine.model, seen, here.temperature)
            cosines = {block: group_cosines(gram, seen) for block, gram in grams.items()}
            layers, said = representation(engine.model, seen), kernel_table(folder, cosines, seen)
            print(f"{said}\n{representation_table(layers)}\n", flush=True)
            seen_of.grams[folder], seen_of.layers[folder], seen_of.said[folder] = (grams, seen), layers, said
            seen_of.scores[folder] = probe_logprobs(engine.model, seen, here.temperature, args.micro_tokens)
            lines.append({"model": folder, "probes": args.probes, "cosines": cosines, "layers": layers})
            write_lines(os.path.join(args.out, "kernel.jsonl"), lines)
    if len(args.model) > 1 and args.draws:
        print(paired(args.model, rows))
    return [row for row in rows if "plain" in row], seen_of


def main():
    args = parse_arguments()
    try:
        games = choose_games(args)
        fates(args.after, ())  # a mistyped folder is told now
        os.makedirs(args.out, exist_ok=True)
        with EnvPool(args.workers) as pool:
            probes = probe_file(args, pool) if args.probes else None
            rows, seen_of = measure_all(args, pool, games, probes)
        picture = lambda name: os.path.join(args.out, name)
        if args.draws and not rows and not probes:
            raise ValueError("there is nothing to show: see above")
        if rows:
            draw_danger_zone(rows, picture("danger_zone.png"))
        first = [row for row in rows if row["model"] == args.model[0]]
        if args.after and first:
            draw_fate(fate_points([(args.model[0], first, fates(args.after))]), picture("fate.png"))
        draw_kernels(seen_of.grams, picture("kernel.png"))
        if args.report:
            drawn = {"danger_zone.png": rows, "fate.png": args.after and first, "kernel.png": seen_of.grams}
            write_page(args, rows, probes, seen_of, [name for name, there in drawn.items() if there])
        print(f"results and pictures: {args.out}" + (f", page: {args.report}" if args.report else ""))
    except OSError as error:
        sys.exit("coupling.py: " + (f"{error.filename}: {error.strerror}" if error.filename else str(error)))
    except ValueError as error:
        sys.exit(f"coupling.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ncoupling.py: stopped. The draws that were finished are in {args.out}/results.jsonl")


if __name__ == "__main__":
    main()

"""What a run does around the method: one named call each, so that the loop in train.py shows the method alone.

`run` is what support/setup.py builds: arguments (`run.args`), model, engine, pool, optimizer, accelerator and so on.
"""

import contextlib
import json
import math
import os
import sys

import torch
from accelerate.utils import broadcast, gather_object

from credit import epo, epo_weight
from evaluate import evaluate, summarize, table
from games import levels
from games.game import most_steps
from grpo import truncated_importance
from rollout import pay_success_only, play
from support.batches import sampled_logprobs
from support.checkpoints import checkpoints, load_checkpoint, save_checkpoint, write_atomically
from support.coupling_dynamics import prepare_watch, watch
from support.corrections import logged
from support.curves import draw, read_metrics
from support.logs import line_of, log, machine, metrics_of, progress, write_samples
from support.policies import plain_state_dict, sync
from support.processes import clip_gradients
from support.report import report_run
from support.setup import PLAYED, check_episodes, make_engine
from support.warmup import warm_up


def prepare(run, label, weigh):
    """The run's folder; the last checkpoint where one is resumed, else what comes before the first iteration.

    label, weigh: as train.py's loop calls them. Raises OSError."""
    from torch.utils.tensorboard import SummaryWriter
    args = run.args
    os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
    main, run.probes = run.accelerator.is_main_process, prepare_watch(run)
    if args.resume:
        run.done = load_checkpoint(args.out, run.model, run.optimizer, run.value_head, args.device, main)
        run.accelerator.wait_for_everyone()
        rows = read_metrics(args.out) if run.done else []
        run.turn_entropies = [row["turn_entropy"] for row in rows if "turn_entropy" in row]
        if args.correct and rows:
            run.chat.corrections = logged(rows[-1])
    if main:
        config = {k: v for k, v in vars(args).items() if k != "resume"} | {"machine": machine()}
        write_atomically(os.path.join(args.out, "config.json"), json.dumps(config, indent=1))
        run.board = SummaryWriter(args.out, purge_step=run.done + 1)
    if run.done == 0:
        if main:
            if args.warmup_updates:
                warm_up(run, label, weigh)
        head = list(run.value_head.parameters()) if run.value_head else []
        for parameter in [*(run.model.parameters() if not args.shard else []), *head]:
            parameter.data.copy_(broadcast(parameter.data))  # all begin with the first process's weights
    sync(run.engine, run.model)
    if run.done == 0 and main:
        log(args.out, run.board, 0, evaluation(run, [args.level], 0) | watch(run, 0))


def collect_episodes(run, games, seed):
    """Whole groups of episodes: each process plays its share of the games; then all have all.

    Returns (episodes sorted by group, report of all processes: seconds, bad games, restarts). Ends the run where there
    are no episodes.
    """
    args, rank, processes = run.args, run.accelerator.process_index, run.accelerator.num_processes
    episodes, report = play_or_restart(run, games[rank::processes], seed + 500_009 * rank)
    for episode in episodes:
        episode.group = episode.group * processes + rank
    reports = gather_object([{**report, "worker_restarts": run.pool.restarts}])
    report = {"seconds_sample": max(r["sample"] for r in reports), "seconds_env": max(r["env"] for r in reports),
              "bad_games": [line for r in reports for line in r["bad_games"]],
              "worker_restarts": sum(r["worker_restarts"] for r in reports)}
    episodes = sorted(gather_object(episodes), key=lambda e: e.group)
    check_episodes(args, episodes, report["bad_games"])
    for line in report["bad_games"]:
        if line not in run.bad_games:
            run.bad_games.add(line)
            print(f"skipped: {line}", flush=True)
    if args.reward == "success":
        pay_success_only(episodes)
    return episodes, report


def play_or_restart(run, games, seed):
    """`play`; where vLLM dies under it, once more with a new engine. All processes must call it together."""
    args, failure = run.args, None

    def again():
        steps = args.group_size * most_steps(args.max_steps, games)
        with progress("playing", steps) as bar:
            return play(run.engine, run.pool, run.chat, games, args.group_size, args.max_steps, args.max_context, seed,
                        args.show_actions, bar)
    try:
        played = again()
    except Exception as error:
        if args.engine != "vllm":
            raise
        failure = f"{type(error).__name__}: {error}"
    if any(gather_object([failure])):
        # Putting spread weights together takes all processes, also those whose engine is well.
        weights = plain_state_dict(run.model)
        if failure and run.engine_restarts:
            sys.exit(f"train.py: vLLM failed again ({failure}). Go on with: python train.py --resume {args.out}")
        if failure:
            print(f"vLLM failed ({failure}): restarting it", flush=True)
            run.engine_restarts += 1
            run.engine = make_engine(args, run.model, run.chat, run.folder)
            run.engine.load(weights)
            played = again()
    return played


def score(run, batch):
    """Before the first optimizer step: what the trainer and the reference think of the sampled tokens. In place.

    Where vLLM sampled, the trainer's log-probabilities become the old ones, and the difference is corrected by truncated
    importance weights; returns the mean |difference| in nats per token, else None.
    """
    args, gap = run.args, None
    if args.engine == "vllm":
        sampler = batch.old_logprobs
        batch.old_logprobs = sampled_logprobs(run.model, batch, args.temperature, args.micro_tokens, run.accelerator)
        batch.importance = truncated_importance(batch.old_logprobs, sampler, args.tis_clip)
        gap = (batch.old_logprobs - sampler).abs().nanmean().nan_to_num().item()
        gap = max(gather_object([gap]))
    if run.reference is not None:
        with run.reference.disable_adapter() if args.lora_rank else contextlib.nullcontext():
            batch.ref_logprobs = sampled_logprobs(run.reference, batch, args.temperature, args.micro_tokens, run.accelerator)
    return gap


def compare_engine(run, gaps, sums):
    """In the first optimizer step of an iteration the policy is the one that sampled: is it the engine's, too?

    Ends the run where the log-probabilities that the engine recorded are not the trainer's: stale weights, a model that
    one of the two computes otherwise. The PyTorch engine is compared in the gradients' own forward pass, at no cost.
    """
    if len(sums) > 1:
        return
    gap = sums[0]["engine_gap"] = sums[0]["gap"] if gaps[0] is None else sum(gaps) / len(gaps)
    if not gap <= run.args.engine_gap:  # also where it is not a number; the same number on all processes: they stop together
        sys.exit(f"train.py: the engine's log-probabilities are {gap:.3f} nats per token from the trainer's (--engine-gap "
                 f"{run.args.engine_gap}): its weights are stale or its arithmetic differs; use --engine torch or "
                 "--precision float32, or a model whose embeddings are not tied")


def gradient_norms_apart(run, batch, gradients):
    """The norms of the gradients of L_GRPO and of lambda * L_cls, each alone, as train.gradients computes them."""
    found = {}
    for name, coefs in (("grpo", (1.0, 0.0)), ("classifier", (0.0, None))):
        if name == "grpo" or run.args.classifier != "none":
            gradients(run.args, run, batch, *coefs)
            parameters = [p for part in run.optimizer.param_groups for p in part["params"]]
            found[f"grad_norm_{name}"] = clip_gradients(parameters, math.inf)
    return found


def set_rate(optimizer, args, iteration):
    """The rates of this iteration: a linear rise over `--warmup`, then a linear fall to `--lr-end` of each one's peak."""
    left = 1.0 - (iteration - 1) / args.iterations
    for part in optimizer.param_groups:
        part["lr"] = part["peak"] * min(iteration / max(1, args.warmup), args.lr_end + (1.0 - args.lr_end) * left)


def smooth_entropy(run, entropies, part, turns):
    """EPO's term of the loss (credit.epo, eq. 10), 0 without `--epo`, and the part's share of the mean entropy of a turn.

    entropies: (n,) of the part's sampled tokens; turns: of the whole batch. The reference is the mean over all
    iterations so far.
    """
    lengths = torch.bincount(part.step_of_token).tolist()
    history = run.turn_entropies
    penalty, entropy = epo(entropies, lengths, turns, sum(history) / len(history) if history else None)
    if not run.args.epo:
        return 0.0, entropy
    # alpha 0.1, and beta falling from 2 to 1 over training, as in the paper's runs
    return -run.args.epo * (entropy - 0.1 * epo_weight(len(history), run.args.iterations) * penalty), entropy


def step_if_finite(run, batch, sums):
    """`optimizer.step()`. A loss or gradient that is not a number changes nothing; three in a row are no accident."""
    finite = math.isfinite(sums["grad_norm"]) and math.isfinite(sums["loss"])
    if finite:
        run.optimizer.step()
    sums["skipped"] = float(not finite)
    run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
    if run.skipped_in_a_row == 3:
        if run.accelerator.is_main_process:
            torch.save(batch, os.path.join(run.args.out, "bad_batch.pt"))
        sys.exit("train.py: three updates in a row had a loss or gradient that is not finite, and were skipped. The last "
                 f"batch is in {run.args.out}/bad_batch.pt; a lower --lr, or --precision float32, may help")


def evaluation(run, the_levels, iteration):
    """Play the levels' test games with the current policy, print the tables; {"eval_L1": {...}}."""
    args, found, run.evaluated = run.args, {}, {}
    for level in the_levels if args.eval_games else []:
        games = levels.level_games(args.env, level, "test", args.games, args.task_types, args.eval_games)
        found[f"eval_{level}"], episodes = evaluate(run.engine, run.pool, run.chat, games, args.max_steps,
                                                    max_context=args.max_context, show_actions=args.show_actions)
        run.evaluated[level] = found[f"eval_{level}"], episodes
        print(f"\n{level} ({games[0].split}) after {iteration} iterations\n{table(found[f'eval_{level}'])}\n", flush=True)
    return found


def finish_iteration(run, iteration, episodes, report, sums, row, minutes_left):
    """One line on the screen, everything in metrics.jsonl and TensorBoard; evaluate at the end; save now and then."""
    args, last = run.args, iteration == run.args.iterations
    if run.accelerator.is_main_process:
        row = {**metrics_of(episodes, sums), **report, **row, "bad_games": len(report["bad_games"])}
        row |= watch(run, iteration)
        print(f"{iteration:4d}/{args.iterations}  {line_of(row)}  {minutes_left:.0f} min left", flush=True)
        if last:
            row |= evaluation(run, {"L0": ["L0", "L1"], "L1": ["L1", "L0"], "L2": ["L2"]}[args.level], iteration)
        log(args.out, run.board, iteration, row)
    run.turn_entropies.append(sum(one["turn_entropy"] for one in sums) / len(sums))
    if iteration % args.save_every == 0 or last:
        save_checkpoint(args.out, run.model, run.tokenizer, run.optimizer, run.value_head, iteration,
                        write=run.accelerator.is_main_process, started_from=run.folder, prompt=run.prompt,
                        head_layer=args.head_layer, **run.taught, corrections=run.chat.corrections,
                        played={name: getattr(args, name) for name in PLAYED})
        if run.accelerator.is_main_process:
            write_samples(args.out, run.tokenizer, episodes, iteration)
            draw([args.out], os.path.join(args.out, "curves.png"))
            if last:
                report_run(run, iteration, episodes, summarize(episodes))
    run.accelerator.wait_for_everyone()
    if last:
        run.accelerator.end_training()  # gloo's threads, still at work when Python shuts down, can abort a finished run
        if run.board:
            run.board.close()
        print(f"curves: {args.out}/curves.png; report: {args.out}/report.html; policy: {args.out}/{checkpoints(args.out)[-1]}")

"""GRPO with the good/bad classifier (GCD) on text games, the whole loop.

    python train.py --env alfworld                                    # laptop, no GPU, no data: under 10 minutes
    python train.py --env alfworld --classifier none                  # GRPO alone, the baseline
    python train.py --env alfworld --games official                   # ALFWorld's own games (set ALFWORLD_DATA)
    python train.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct --cold-start none --lr 1e-6
    accelerate launch --num_processes 8 train.py --model ... --engine vllm    # several GPUs, each plays and learns a share
    python train.py --resume runs/alfworld-...                        # go on where a killed run stopped

One iteration: play `--tasks` games `--group-size` times each with the current policy; advantages within each group;
labels good/bad for single steps; `--updates` optimizer steps on L = L_GRPO + lambda * L_cls; sync; log. The PyTorch engine
samples from the very weights that are trained; vLLM is given them after each iteration, and what remains of a difference
is corrected by importance weights.

Departures from the paper: a tiny policy by default (see cold_start.py), and what the paper leaves open (labels, class
balance, normalisation) is spelled out in classifier_loss.py and grpo.py.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import sys
import time

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from games import levels
from support.checkpoints import checkpoints, load_checkpoint, save_checkpoint, write_atomically
from classifier_loss import BAD, GOOD
from cold_start import make_cold_start
from support.curves import draw
from games.pool import EnvPool
from evaluate import evaluate, table
from support.logs import line_of, log, metrics_of, write_samples
from rollout import QUESTION, play
from support.policies import load_policy, make_chat, sync, trainable
from engines.torch_engine import TorchEngine
from update import advantages_of, make_batch, recompute_old_logprobs, reference_logprobs, teach_question, update


def parse_arguments():
    parser = argparse.ArgumentParser(description="GRPO with the good/bad classifier on text games.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    # what is played
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--level", default="L1", choices=levels.LEVELS, help="what is trained and tested: see games/levels.py")
    flag("--games", default="auto", choices=["auto", "official", "generated"],
         help="ALFWorld's; auto: official where their data is found")
    flag("--task-types", nargs="+", help="train on these only: ALFWorld 1-6, ScienceWorld's names, or `short` (its default "
         "with --model tiny)")
    flag("--max-steps", type=int, help="steps per episode (default 20 on generated games, 50 on official ones, 30 in "
         "ScienceWorld, 15 on its short tasks)")
    flag("--reward", default="score", choices=["score", "success"], help="ScienceWorld's: score / 100, or 1 for score 100")
    # who plays
    flag("--model", default="tiny", help="`tiny`, or any Hugging Face folder or hub name")
    flag("--cold-start", default="auto", choices=["auto", "train", "none"],
         help="for --model tiny. auto: the policy in policies/tiny, on official games trained on with their expert; "
              "train: train one now; none: random weights. What is trained is cached in policies/")
    flag("--cold-start-episodes", type=int, default=1500, help="expert games where a cold start is trained")
    flag("--engine", default="auto", choices=["auto", "torch", "vllm"], help="who samples; auto: vLLM where it is installed and "
         "there is a GPU")
    flag("--engine-memory", type=float, default=0.4, help="share of the GPU's memory for vLLM; the trainer needs the rest")
    flag("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    flag("--tis-clip", type=float, default=2.0, help="vLLM: largest importance weight against the trainer's distribution")
    flag("--engine-gap", type=float, default=0.1, help="vLLM: stop where its log-probabilities are further than this from the "
         "trainer's, in nats per token on average: its weights are stale, then")
    flag("--lora-rank", type=int, default=0, help="train low-rank additions of this rank (peft); 0 trains all weights")
    flag("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="of the matrix products; weights and "
         "their updates stay in float32, frozen weights under LoRA do not. auto: bfloat16 on a GPU")
    flag("--shard", action="store_true", help="spread the weights over all processes (FSDP), where one GPU cannot hold the model")
    flag("--gradient-checkpointing", action="store_true", help="compute activations again instead of keeping them: less memory")
    flag("--show-actions", action="store_true", help="name the admissible commands in every observation")
    flag("--temperature", type=float, default=1.0, help="of sampling; the trainer scores with the same")
    flag("--max-new-tokens", type=int, help="per answer (default 24 for our tiny policy, 512 for others)")
    flag("--max-context", type=int, help="tokens; an episode that would grow longer ends there (default 2048, others 8192)")
    # how it learns
    flag("--iterations", type=int, help="rounds of playing and updating (default 32, ScienceWorld 10)")
    flag("--tasks", type=int, default=16, help="games per iteration")
    flag("--group-size", type=int, default=8, help="episodes per game (G)")
    flag("--updates", type=int, default=2, help="optimizer steps per iteration, each on its share of the groups")
    flag("--lr", type=float, help="peak learning rate of AdamW (default 5e-4 for our tiny policies, 1e-6 for others)")
    flag("--warmup", type=int, default=3, help="iterations over which the rate rises: Adam's first steps are all noise")
    flag("--lr-end", type=float, default=0.0, help="the rate falls linearly to this share of its peak; 1 keeps it constant")
    flag("--clip", type=float, default=0.2, help="clip range of the ratio")
    flag("--kl-coef", type=float, default=0.01, help="weight of the KL to the starting policy; 0 saves its forward pass")
    flag("--advantage", default="std", choices=["std", "mean"], help="divide by the group's std, or only subtract its mean")
    flag("--weighting", default="token", choices=["token", "step", "episode"], help="what counts equally in the loss")
    flag("--max-norm", type=float, default=1.0, help="gradient clipping")
    flag("--micro-tokens", type=int, default=8192, help="padded tokens per forward pass: memory, never the objective")
    # the classifier
    flag("--classifier", default="value", choices=["none", "generative", "value", "both"], help="L_cls")
    flag("--classifier-coef", type=float, default=0.3, help="lambda")
    flag("--labels", default="rules", choices=["rules", "outcome"], help="which steps are good and which bad")
    flag("--question-warmup", type=int, default=40, help="supervised updates that teach a policy of ours to answer the "
         "generative classifier's question at all; 0 for models that know such questions")
    flag("--questions", type=int, default=3, help="steps per episode that the generative classifier is asked about")
    # the run
    flag("--eval-games", type=int, help="games of the level's test before and after (default 200, ScienceWorld 300); 0: none")
    flag("--save-every", type=int, default=10, help="iterations between checkpoints")
    flag("--workers", type=int, default=os.cpu_count(), help="environment processes")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--seed", type=int, default=0, help="of games, sampling and shuffling")
    flag("--out", help="folder for everything the run writes (default runs/ENV-CLASSIFIER-seedN-TIME)")
    flag("--resume", metavar="RUN", help="go on with the run in this folder; its own config.json counts")
    args = parser.parse_args()
    if args.resume:
        try:
            with open(os.path.join(args.resume, "config.json")) as file:
                args = argparse.Namespace(**{**vars(args), **json.load(file), "resume": args.resume, "out": args.resume})
        except (OSError, ValueError):
            parser.error(f"--resume {args.resume}: no config.json of a run in there")
    args.iterations = {"alfworld": 32, "scienceworld": 10}[args.env] if args.iterations is None else args.iterations
    for name in ("iterations", "tasks", "group_size", "updates", "micro_tokens", "workers", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.group_size < 2:
        parser.error("--group-size must be at least 2: an advantage compares episodes of one game")
    if args.updates > args.tasks:
        parser.error(f"--updates {args.updates} leaves no whole group for each: at most --tasks {args.tasks}")
    if args.shard and args.lora_rank:
        parser.error("--shard and --lora-rank do not go together here: with LoRA one process holds the frozen weights whole")
    if args.shard and args.classifier in ("generative", "both") and args.question_warmup:
        parser.error("--shard with the generative classifier needs --question-warmup 0: the warm-up runs on one process")
    if args.lora_rank < 0:
        parser.error("--lora-rank must not be negative")
    if args.tis_clip <= 0:
        parser.error("--tis-clip must be positive")
    if args.temperature <= 0:
        parser.error("--temperature must be positive in training: greedy episodes of a group are all the same")
    return args


def setup(args):
    """Resolve what is automatic, say so, and build everything. Returns the pieces in a dictionary."""
    args.games = levels.choose_games("auto" if args.games == "simulator" else args.games, args.env)
    if args.env == "scienceworld" and not args.task_types and args.model == "tiny":
        args.task_types = ["short"]
    args.max_steps = args.max_steps or levels.max_steps(args.games, args.task_types)
    args.eval_games = {"alfworld": 200, "scienceworld": 300}[args.env] if args.eval_games is None else args.eval_games
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # the others wait while one evaluates
    world = Accelerator(cpu=args.device == "cpu", kwargs_handlers=[patience])
    if args.tensor_parallel > 1 and world.num_processes > 1:
        raise ValueError("--tensor-parallel is for one process; of several processes, each has an engine of its own")
    if args.shard and world.num_processes == 1:
        raise ValueError("--shard spreads the weights over several processes: start them with torchrun or accelerate launch")
    if not world.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    args.device = args.device if args.device != "auto" else str(world.device)
    there = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm" and not there:
        raise ValueError("--engine vllm needs vLLM: pip install -r requirements-vllm.txt, or use --engine torch")
    if args.engine == "auto":
        args.engine = "vllm" if there and args.device.startswith("cuda") else "torch"
    args.out = args.out or f"runs/{args.env}-{args.classifier}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.out = broadcast_object_list([args.out])[0]  # the clocks of several processes differ
    games = levels.level_games(args.env, args.level, "train", args.games, args.task_types)
    print(f"games   {args.games}, level {args.level}, {len(games):,} for training, at most {args.max_steps} steps   (--games, "
          "--level, --max-steps" + (f"; tasks {' '.join(args.task_types)}: --task-types)" if args.task_types else ")"))
    pool = EnvPool(max(1, args.workers // world.num_processes))
    with world.main_process_first():
        folder = args.model if args.model != "tiny" else make_cold_start(args, games, pool)
    print(f"model   {folder}   (--model, --cold-start)")
    print(f"engine  {args.engine} on {args.device}, {torch.get_num_threads()} threads" + (f", {world.num_processes} processes"
          if world.num_processes > 1 else "") + "   (--engine, --device)")
    half = in_half(args)
    model, reference, tokenizer = trainable(folder, args.device, half, args.lora_rank, args.gradient_checkpointing,
                                            args.kl_coef > 0, args.seed, args.shard)
    chat, ours = make_chat(tokenizer, args.env, folder)
    args.max_new_tokens = args.max_new_tokens or (24 if ours else 512)
    args.max_context = args.max_context or (2048 if ours else 8192)
    args.lr = args.lr or (5e-4 if ours else 1e-6)
    print(f"update  AdamW at {args.lr:g}, {args.updates} steps for {args.tasks} games x {args.group_size} episodes   (--lr, "
          "--updates, --tasks, --group-size)")
    print(f"loss    GRPO + {args.classifier_coef} * {args.classifier} classifier, labels by {args.labels}   (--classifier, "
          "--classifier-coef, --labels)" if args.classifier != "none" else "loss    GRPO alone   (--classifier)")
    print(f"output  {args.out}   (--out)", flush=True)
    value_head = torch.nn.Linear(model.config.hidden_size, 1).to(args.device) if args.classifier in ("value", "both") else None
    parameters = [p for p in model.parameters() if p.requires_grad] + (list(value_head.parameters()) if value_head else [])
    question = None
    if args.classifier in ("generative", "both"):
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        question = (chat.next_prompt(QUESTION), {GOOD: encode("good"), BAD: encode("bad")})
    return dict(games=games, pool=pool, model=model, tokenizer=tokenizer, chat=chat, value_head=value_head,
                reference=reference, question=question, folder=folder, world=world, prompt="short" if ours else "instructions",
                engine=make_engine(args, model, chat, folder),
                optimizer=torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0))


def in_half(args):
    return args.precision == "bfloat16" or (args.precision == "auto" and args.device.startswith("cuda"))


def make_engine(args, model, chat, folder):
    if args.engine == "torch":
        if args.shard:  # episodes are sampled from a whole copy: processes that play do not wait for one another
            model = load_policy(folder, args.device, torch.bfloat16 if in_half(args) else torch.float32)[0]
        return TorchEngine(model, chat.ends, args.temperature, args.max_new_tokens)
    from engines.vllm_engine import VLLMEngine
    return VLLMEngine(folder, chat.ends, args.temperature, args.max_new_tokens, args.max_context,
                      "bfloat16" if in_half(args) else "float32", args.engine_memory, args.tensor_parallel, args.seed)


# --------------------------------------------------------------------------------------------------------------- main

def main():
    args = parse_arguments()
    try:
        run = setup(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped before the run began")
    again = f"python train.py --resume {args.out}"
    with run["pool"]:
        try:
            os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
            done = load_checkpoint(args.out, run["model"], run["optimizer"], run["value_head"], args.device,
                                   run["world"].is_main_process) if args.resume else 0
            if done:
                sync(run["engine"], run["model"])
            if run["world"].is_main_process:
                write_atomically(os.path.join(args.out, "config.json"),
                                 json.dumps({k: v for k, v in vars(args).items() if k != "resume"}, indent=1))
            train(args, run, done)
        except OSError as error:
            sys.exit(f"train.py: cannot write to --out {args.out}: {error.strerror or error}. What is there is whole; once "
                     f"that is mended, go on with: {again}")
        except KeyboardInterrupt:
            sys.exit(f"\ntrain.py: stopped. Go on from the last checkpoint with: {again}")


def train(args, run, done):
    from torch.utils.tensorboard import SummaryWriter
    world, model, optimizer, value_head = run["world"], run["model"], run["optimizer"], run["value_head"]
    board, skipped_in_a_row = SummaryWriter(args.out, purge_step=done + 1) if world.is_main_process else None, 0
    begin = time.time()
    if done == 0:
        if world.is_main_process:
            log(args.out, board, 0, evaluation(args, run, [args.level], 0))
            if run["question"] and args.question_warmup:
                introduce_question(args, run)
        for parameter in [*(model.parameters() if not args.shard else []), *(value_head.parameters() if value_head else [])]:
            parameter.data.copy_(broadcast(parameter.data))  # all begin with the first process's weights
        sync(run["engine"], run["model"])

    for iteration in range(done + 1, args.iterations + 1):
        seed = args.seed * 1_000_003 + iteration
        clock = time.perf_counter()

        # 1. Rollout: whole groups of episodes, one game each. Each process plays its share; then all have all.
        rank, processes = world.process_index, world.num_processes
        games = levels.sample_games(run["games"], args.tasks, seed)[rank::processes]
        episodes, report = rollout(args, run, games, seed + 500_009 * rank)
        for episode in episodes:
            episode.group = episode.group * processes + rank
        episodes = sorted(gather_object(episodes), key=lambda e: e.group)
        if not episodes:
            sys.exit(f"train.py: none of the games can be played: {report['bad_games'][0]}")
        if not all(e.steps for e in episodes):
            sys.exit(f"train.py: --max-context {args.max_context} is too small for a first prompt and one answer")
        for episode in episodes if args.reward == "success" else []:
            episode.reward = float(episode.won)
        played = time.perf_counter()

        # 2. Advantages within groups, labels, weights: a batch for each optimizer step of this iteration.
        batches, no_signal, gap = make_batches(args, run, episodes, seed)

        # 3. Losses and steps.
        for group in optimizer.param_groups:
            left = 1.0 - (iteration - 1) / args.iterations
            group["lr"] = args.lr * min(iteration / max(1, args.warmup), args.lr_end + (1.0 - args.lr_end) * left)
        parts = []
        for batch in batches:
            parts.append(update(model, value_head, optimizer, batch, run["question"], args.clip, args.kl_coef,
                                args.classifier_coef, args.temperature, args.micro_tokens, args.max_norm,
                                world if processes > 1 else None))
            # A loss or gradient that is not a number changes nothing; again and again, it is no accident.
            skipped_in_a_row = skipped_in_a_row + 1 if parts[-1]["skipped"] else 0
            if skipped_in_a_row == 3:
                if world.is_main_process:
                    torch.save(batch, os.path.join(args.out, "bad_batch.pt"))
                sys.exit(f"train.py: three updates in a row had a loss or gradient that is not finite, and were skipped. The last "
                         f"batch is in {args.out}/bad_batch.pt; a lower --lr, or --precision float32, may help")
        sync(run["engine"], run["model"])
        updated = time.perf_counter()

        # 4. Log: one line on the screen, everything in metrics.jsonl and TensorBoard. Then save: all have their share in it.
        if world.is_main_process:
            row = {**metrics_of(episodes, parts), "groups_without_signal": no_signal, **({} if gap is None else {"engine_gap": gap}),
                   "bad_games": len(report["bad_games"]), "worker_restarts": run["pool"].restarts,
                   "seconds_sample": report["sample"], "seconds_env": report["env"], "seconds_play": played - clock,
                   "seconds_update": updated - played}
            left = (time.time() - begin) / (iteration - done) * (args.iterations - iteration)
            print(f"{iteration:4d}/{args.iterations}  {line_of(row)}  {left / 60:.0f} min left", flush=True)
            if iteration == args.iterations:
                row |= evaluation(args, run, {"L0": ["L0", "L1"], "L1": ["L1", "L0"], "L2": ["L2"]}[args.level], iteration)
            log(args.out, board, iteration, row)
        if iteration % args.save_every == 0 or iteration == args.iterations:
            save_checkpoint(args.out, model, run["tokenizer"], optimizer, value_head, iteration, write=world.is_main_process,
                            started_from=run["folder"], prompt=run["prompt"])
            if world.is_main_process:
                write_samples(args.out, run["tokenizer"], episodes, iteration)
                draw([args.out], os.path.join(args.out, "curves.png"))
        world.wait_for_everyone()
    if board:
        board.close()
    print(f"{(time.time() - begin) / 60:.1f} minutes; curves: {args.out}/curves.png; policy: {checkpoints(args.out)[-1]}")


def rollout(args, run, games, seed):
    """`play`; where vLLM dies under it, once more with a new engine."""
    again = lambda: play(run["engine"], run["pool"], run["chat"], games, args.group_size, args.max_steps, args.max_context,
                         seed, args.show_actions)
    try:
        return again()
    except Exception as error:
        if args.engine != "vllm":
            raise
        if run.get("engine_restarts"):
            sys.exit(f"train.py: vLLM failed again ({type(error).__name__}: {error}). Go on with: python train.py --resume {args.out}")
        print(f"vLLM failed ({type(error).__name__}: {error}): restarting it", flush=True)
        run["engine_restarts"] = 1
        run["engine"] = make_engine(args, run["model"], run["chat"], run["folder"])
        sync(run["engine"], run["model"])
        return again()


def make_batches(args, run, episodes, seed):
    """The batches of an iteration's optimizer steps, whole groups each, computed before the first of them changes the
    policy; the share of groups without signal; how far the engine's log-probabilities are from the trainer's."""
    advantages, no_signal = advantages_of(episodes, args.advantage == "std")
    groups, batches, gaps = sorted({e.group for e in episodes}), [], []
    for i in range(args.updates):
        share = set(groups[i::args.updates])
        chosen = [j for j, e in enumerate(episodes) if e.group in share]
        if not chosen:
            continue
        batch = make_batch([episodes[j] for j in chosen], advantages[chosen], args.labels, args.weighting,
                           args.questions if run["question"] else 0, seed + i)
        if args.engine == "vllm":
            own = recompute_old_logprobs(run["model"], batch, args.temperature, args.micro_tokens, args.tis_clip, run["world"])
            gaps.append(max(gather_object([own])))  # the same for all processes: they stop together
            if gaps[-1] > args.engine_gap:
                sys.exit(f"train.py: vLLM's log-probabilities are {gaps[-1]:.3f} nats per token from the trainer's (--engine-gap "
                         f"{args.engine_gap}): its weights are stale or its arithmetic differs; use --engine torch, or a "
                         "model whose embeddings are not tied")
        if run["reference"] is not None:
            with run["reference"].disable_adapter() if args.lora_rank else contextlib.nullcontext():
                batch.ref_logprobs = reference_logprobs(run["reference"], batch.episodes, args.temperature,
                                                        args.micro_tokens, run["world"])
        batches.append(batch)
    return batches, no_signal, sum(gaps) / len(gaps) if gaps else None


def introduce_question(args, run):
    """Teach the question on one round of the policy's own episodes, with an optimizer that is thrown away."""
    games = levels.sample_games(run["games"], args.tasks, args.seed * 1_000_003)
    episodes, _ = play(run["engine"], run["pool"], run["chat"], games, args.group_size, args.max_steps, args.max_context,
                       args.seed * 1_000_003, args.show_actions)
    optimizer = torch.optim.AdamW(run["model"].parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    first, last = teach_question(run["model"], optimizer, make_batch(episodes, torch.zeros(len(episodes))), run["question"],
                                 args.question_warmup, max_tokens=args.micro_tokens, seed=args.seed)
    print(f"taught the classifier's question: loss {first:.2f} -> {last:.2f} in {args.question_warmup} updates", flush=True)


def evaluation(args, run, levels, iteration):
    """Play the levels' test games with the current policy, print the tables; {"eval_L1": {...}}."""
    found = {}
    for level in levels if args.eval_games else []:
        games = levels.level_games(args.env, level, "test", args.games, args.task_types, args.eval_games)
        found[f"eval_{level}"], _ = evaluate(run["engine"], run["pool"], run["chat"], games, args.max_steps,
                                             max_context=args.max_context, show_actions=args.show_actions)
        print(f"\n{level} ({games[0].split}) after {iteration} iterations\n{table(found[f'eval_{level}'])}\n", flush=True)
    return found


if __name__ == "__main__":
    main()

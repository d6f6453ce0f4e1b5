"""From arguments to a run: what is automatic is resolved and said, and everything that the loop needs is built."""

import argparse
import datetime
import importlib.util
import json
import os
import sys
import time
from types import SimpleNamespace

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from cold_start import make_cold_start
from engines.torch_engine import TorchEngine
from games import levels
from games.pool import EnvPool
from support.batches import make_question
from support.checkpoints import checkpoints, load_head
from support.controls import Detached
from support.corrections import check_taught
from support.language_models import model_folder
from support.policies import (answer_tokens, check_tags, compute_in_bfloat16, load_policy, make_chat, notes_of,
                              trainable)


# What a checkpoint notes of how it was played, so that an evaluation plays it the same way.
PLAYED = ("engine", "precision", "temperature", "max_new_tokens", "max_context", "show_actions")
TAUGHT = ("tags", "critic", "correct")  # what a cold start notes of what it taught, and every checkpoint after it
ADAMW = dict(betas=(0.9, 0.95), weight_decay=0.0)


def settled(args, error):
    """The arguments that count: those that a run to be resumed was started with, or `args`; checked, by `check`."""
    if args.resume:
        try:
            with open(os.path.join(args.resume, "config.json")) as file:
                stored = json.load(file)
            if not {"env", "iterations", "classifier"} <= stored.keys():  # a checkpoint has a config.json, too: the model's
                raise ValueError
            args = argparse.Namespace(**{**vars(args), **stored, "resume": args.resume, "out": args.resume})
        except (AttributeError, OSError, TypeError, ValueError):
            folder, name = os.path.split(os.path.normpath(args.resume))
            error(f"--resume {args.resume}: no config.json of a run in there" +
                  (f"; did you mean --resume {folder or '.'}?" if name.startswith("checkpoint-") else ""))
    elif args.out and (checkpoints(args.out) or os.path.exists(os.path.join(args.out, "metrics.jsonl"))):
        error(f"--out {args.out}: there is a run in it: go on with --resume {args.out}, or name another folder")
    check(args, error)
    return args


def check(args, error):
    """Refuse arguments that cannot be meant, by `error(one line)`; fill in the number of iterations."""
    args.iterations = {"alfworld": 32, "scienceworld": 10}[args.env] if args.iterations is None else args.iterations
    for name in ("iterations", "tasks", "group_size", "updates", "micro_tokens", "workers", "save_every", "norms_every",
                 "questions", "max_steps", "max_new_tokens", "max_context"):
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict) and value < 1:  # --max-steps of a resumed run: by task
            error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("epo", "lora_rank", "kl_coef", "warmup", "warmup_updates", "eval_games", "classifier_coef", "coupling_every"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            error(f"--{name.replace('_', '-')} must not be negative")
    for name in ("lr", "head_lr", "clip", "tis_clip", "max_norm", "engine_gap"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            error(f"--{name.replace('_', '-')} must be positive")
    if args.group_size < 2:
        error("--group-size must be at least 2: an advantage compares episodes of one game")
    if args.updates > args.tasks:
        error(f"--updates {args.updates} leaves no whole group for each: at most --tasks {args.tasks}")
    if args.shard and args.lora_rank:
        error("--shard and --lora-rank do not go together here: with LoRA one process holds the frozen weights whole")
    if args.shard and args.warmup_updates:
        error("--shard needs --warmup-updates 0: the warm-up runs on one process")
    if args.control != "none" and args.classifier == "none":
        error(f"--control {args.control} takes something from L_cls: add --classifier value")
    if args.control == "stop-gradient" and args.classifier != "value":
        error("--control stop-gradient goes with --classifier value: the generative form has no head of its own to learn")
    if args.labels == "critic" and not (args.critic_url and args.critic_model):
        error("--labels critic needs --critic-url and --critic-model: an OpenAI-compatible address and a model there")
    if not 0 <= args.correct < 1:
        error("--correct must be a share of steps between 0 and 1")
    if args.temperature <= 0:
        error("--temperature must be positive in training: greedy episodes of a group are all the same")


def setup(args):
    """Resolve what is automatic, say so, and build everything: the namespace `run` that train.py hands around.

    Raises FileNotFoundError or ValueError, whose text is one clear line.
    """
    args.games = levels.choose_games("auto" if args.games == "simulator" else args.games, args.env)
    if args.env == "scienceworld" and not args.task_types and args.model == "tiny":
        args.task_types = ["short"]
    args.max_steps = args.max_steps or levels.level_max_steps(args.env, args.level, args.games, args.task_types)
    args.eval_games = {"alfworld": 200, "scienceworld": 300}[args.env] if args.eval_games is None else args.eval_games
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # the others wait while one evaluates
    accelerator = Accelerator(cpu=args.device == "cpu", kwargs_handlers=[patience])
    processes = accelerator.num_processes
    if args.tensor_parallel > 1 and processes > 1:
        raise ValueError("--tensor-parallel is for one process; of several processes, each has an engine of its own")
    if args.shard and processes == 1:
        raise ValueError("--shard spreads the weights over several processes: start them with torchrun or accelerate launch")
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    args.device = usable(args.device if args.device != "auto" else str(accelerator.device))
    # On a CPU what a layer computes for some 3,000 tokens stays in the cache: a fifth to a quarter faster than 8,000.
    args.micro_tokens = args.micro_tokens or (3072 if args.device == "cpu" else 8192)
    choose_engine(args)
    args.out = args.out or f"runs/{args.env}-{args.classifier}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.out = broadcast_object_list([args.out])[0]  # the clocks of several processes differ
    games = levels.level_games(args.env, args.level, "train", args.games, args.task_types)
    limits = args.max_steps.values() if isinstance(args.max_steps, dict) else [args.max_steps]
    most = f"{min(limits)} to {max(limits)} steps by task" if len(limits) > 1 else f"{args.max_steps} steps"
    print(f"games   {args.games}, level {args.level}, {len(games):,} for training, at most {most}   (--games, "
          "--level, --max-steps" + (f"; tasks {' '.join(args.task_types)}: --task-types)" if args.task_types else ")"))
    pool = EnvPool(max(1, args.workers // processes))
    with accelerator.main_process_first():
        folder = model_folder(args.model) if args.model != "tiny" else make_cold_start(args, games, pool)
    if args.credit == "rlvmr":
        check_tags(folder)
    if args.correct:
        check_taught(notes_of(folder), folder)
    print(f"model   {folder}   (--model, --cold-start)")
    print(f"engine  {args.engine} on {args.device}, {torch.get_num_threads()} threads" + (f", {processes} processes"
          if processes > 1 else "") + "   (--engine, --device)")
    half = in_half(args)
    model, reference, tokenizer = trainable(folder, args.device, half, args.lora_rank, args.gradient_checkpointing,
                                            args.kl_coef > 0, args.seed, args.shard)
    chat, ours = make_chat(tokenizer, args.env, folder)
    fill_limits(args, ours, chat.tags)
    args.lr = args.lr or (5e-4 if ours else 1e-6)
    taught = {name: found for name, found in notes_of(folder).items() if name in TAUGHT}
    # The question that a cold start has taught needs no warm-up; arms from one start policy are treated alike.
    cold = ours and not args.shard and taught.get("critic", "none") not in ("generative", "both")
    args.warmup_updates = (40 if cold else 0) if args.warmup_updates is None else args.warmup_updates
    print(f"update  AdamW at {args.lr:g}, {args.updates} steps for {args.tasks} games x {args.group_size} episodes   (--lr, "
          "--updates, --tasks, --group-size)")
    head_class = Detached if args.control == "stop-gradient" else torch.nn.Linear
    value_head = head_class(model.config.hidden_size, 1).to(args.device) if args.classifier in ("value", "both") else None
    if value_head and not -1 <= args.head_layer <= model.config.num_hidden_layers:
        raise ValueError(f"--head-layer {args.head_layer}: this model's hidden states are numbered 0 to "
                         f"{model.config.num_hidden_layers}, and -1 is the last")
    trained = ", its value head trained before" if value_head and load_head(folder, value_head, args.head_layer) else ""
    print(f"loss    GRPO + {args.classifier_coef} * {args.classifier} classifier{trained}, labels by {args.labels}   "
          "(--classifier, --classifier-coef, --labels)" if args.classifier != "none" else "loss    GRPO alone   "
          "(--classifier)")
    print(f"output  {args.out}   (--out)", flush=True)
    return SimpleNamespace(
        args=args, games=games, pool=pool, folder=folder, chat=chat,
        prompt=notes_of(folder).get("prompt", "instructions"),
        tokenizer=tokenizer, model=model, reference=reference, value_head=value_head,
        question=make_question(chat) if args.classifier in ("generative", "both") else None,
        engine=make_engine(args, model, chat, folder), engine_restarts=0, accelerator=accelerator,
        shared=accelerator if processes > 1 else None,  # None where one process works alone
        optimizer=make_optimizer(args, model, value_head),
        taught=taught, skipped_in_a_row=0, turn_entropies=[], bad_games=set(), done=0, board=None)


def usable(device):
    """The device's name, where tensors can be on it. Raises ValueError, one line."""
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # no such device, no such kind of device, a driver that is too old: each in its own way
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({why}): auto takes what there is") from error
    return device


def make_optimizer(args, model, value_head):
    """AdamW. The value head has a group and a rate of its own: at a language model's 1e-6 it would never learn (and one
    group must not mix weights that are spread over processes with weights that are not)."""
    parts = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr, "peak": args.lr}]
    if value_head is not None:
        parts.append({"params": list(value_head.parameters()), "lr": args.head_lr, "peak": args.head_lr})
    return torch.optim.AdamW(parts, **ADAMW)


def fill_limits(args, ours, tags):
    """How long an answer and an episode may grow, in tokens, where the user did not say."""
    args.max_new_tokens = args.max_new_tokens or answer_tokens(ours, tags)
    args.max_context = args.max_context or (2048 if ours else 8192)


def check_episodes(args, episodes, bad_games):
    """End the run, by one line, where nothing was played."""
    if not episodes:
        sys.exit(f"train.py: none of the {len(bad_games)} games can be played: {'; '.join(bad_games)}")
    if not all(e.steps for e in episodes):
        sys.exit(f"train.py: --max-context {args.max_context} is too small for a first prompt and one answer")


def in_half(args):
    """Are matrix products in bfloat16?"""
    return args.precision == "bfloat16" or (args.precision == "auto" and args.device.startswith("cuda"))


def choose_engine(args):
    """Replace "auto" by the engine that there is. Raises ValueError where the one asked for is not installed."""
    there = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm" and not there:
        raise ValueError("--engine vllm needs vLLM: pip install -r requirements-vllm.txt, or use --engine torch")
    if args.engine == "auto":
        args.engine = "vllm" if there and args.device.startswith("cuda") else "torch"


def make_engine(args, model, chat, folder):
    """Who samples, by `args`: engine, precision, temperature and limits, as in training so in evaluation.

    model: what the PyTorch engine samples from, already in the precision wanted.
    """
    if args.engine == "torch":
        if args.shard:  # episodes are sampled from a whole copy: processes that play do not wait for one another
            model = load_policy(folder, args.device, torch.bfloat16 if in_half(args) else torch.float32)[0]
        return TorchEngine(model, chat.ends, args.temperature, max_new_tokens=args.max_new_tokens)
    from engines.vllm_engine import VLLMEngine
    return VLLMEngine(folder, chat.ends, args.temperature, args.max_new_tokens, args.max_context,
                      "bfloat16" if in_half(args) else "float32", args.engine_memory, args.tensor_parallel, args.seed)


def player(args, folder):
    """(engine, chat format) for playing with a saved policy, sampled as it was in training.

    args: what `PLAYED` names may be None: then the checkpoint's own notes count, then train.py's defaults.
    """
    folder = model_folder(folder)
    notes = notes_of(folder).get("played", {})
    defaults = {"engine": "torch", "precision": "float32", "temperature": 1.0, "show_actions": False}
    for name in PLAYED:
        if getattr(args, name) is None:
            setattr(args, name, notes.get(name, defaults.get(name)))
    choose_engine(args)
    model, tokenizer = load_policy(folder, usable(args.device))
    chat, ours = make_chat(tokenizer, args.env, folder)
    fill_limits(args, ours, chat.tags)
    if in_half(args):
        compute_in_bfloat16(model)
    return make_engine(args, model, chat, folder), chat

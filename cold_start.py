"""The tiny policy and its supervised cold start on expert episodes.

    # policies/tiny: first to see, then to act like a careless expert (27% of valid_unseen)
    python cold_start.py --out policies/first --games generated --size 1M --episodes 24000 --epochs 3 --stop-step 750
    python cold_start.py --out policies/tiny --games generated --init policies/first --sloppy 0.5 --episodes 7000 --epochs 2 --lr 1.5e-3 --seed 1
    # where the default run starts: a smaller one that is shown other names, too, then a careless expert (17 to 20%)
    python cold_start.py --out policies/reads --games generated --episodes 10000 --copies 2 --epochs 2
    python cold_start.py --out policies/tiny-reads --games generated --init policies/reads --sloppy 0.5 --episodes 3000 --copies 2 \
        --epochs 1 --lr 1.5e-3 --seed 1
    # for ALFWorld's own games: on from the one that reads; then what to do after slips (56% of their valid_unseen); then slips, too (43%)
    python cold_start.py --out policies/official-reads --init policies/tiny-reads --games official --episodes 4000 --epochs 3 --batch 8 \
        --precision bfloat16
    python cold_start.py --out policies/tiny-official --init policies/official-reads --games official --episodes 4000 --sloppy 0.5 \
        --slips shown --epochs 4 --batch 8 --lr 1.5e-3 --precision bfloat16
    python cold_start.py --out policies/tiny-official-careless --init policies/tiny-official --games official --episodes 4000 --sloppy 0.5 \
        --epochs 1 --batch 8 --lr 1e-3 --precision bfloat16
    # the one for ScienceWorld, in the same two steps, from the simulator's solutions of training variations
    python cold_start.py --out policies/reader --env scienceworld --size 1M --task-types short --copies 40 --epochs 2
    python cold_start.py --out policies/tiny-scienceworld --env scienceworld --task-types short --init policies/reader --sloppy 0.8 \
        --max-steps 30 --copies 14 --epochs 1 --lr 1e-3 --seed 1
    # for language models: the same with --init (experiments/smollm2_start.sh), or a dataset for any trainer
    python cold_start.py --env alfworld --jsonl expert.jsonl --episodes 200
    # RLVMR's format, for train.py --credit rlvmr: each answer opens with a tag; slips give something to reflect on
    python cold_start.py --out policies/tags --tags --sloppy 0.3 --init policies/tiny --episodes 3000 --epochs 2 \
        --lr 1.5e-3
    # to judge as well: the question that train.py's classifiers ask, with critiques and a value head (docs/cold-starts.md)
    python cold_start.py --out policies/judge --critic both --sloppy 0.5 --init policies/tiny --episodes 2000 --epochs 1 \
        --lr 1e-3
    # to follow the instructions of train.py --correct
    python cold_start.py --out policies/obeys --correct --sloppy 0.5 --init policies/tiny --episodes 4000 --epochs 1 \
        --lr 1e-3

**The cold start** imitates an expert: cross-entropy on the expert's answers, and with a small weight on the
observations as well, since predicting what the world answers teaches a model from scratch to copy names, which
choosing an action needs (`--lm-coef 0` gives plain supervised fine-tuning, as in the paper). With `--critic` it learns
to tell the expert's good actions from its careless ones, too, in words, by a value head, or both: support/critiques.py.
"""

import math
import os
import sys
import time

import torch
from tqdm import tqdm

from games import levels
from support.checkpoints import write_trainer
from support.critic import NoCritic
from support.critiques import CRITIC, QUESTION_LONG, lesson_loss, make_critic, make_lesson
from support.demonstrations import expert_episodes, play_expert, write_messages
from games.pool import EnvPool
from games.experts import FITS
from support.flags import make_parser
from support.language_models import model_folder
from support.policies import (SHIPPED, SIZES, add_tags, load_policy, make_chat, notes_of, save_policy, tiny_model,
                              train_tokenizer, trainable)
from support.tags import thoughts
from rollout import CORRECTIONS, NO_ACTION, QUESTION, VERDICTS, SYSTEM, ChatFormat, system_prompt
from actor import forward


def tokenizer_texts(games, pool, tags=False):
    """What the policy will read and write: the expert's episodes, and every name ALFWorld has."""
    env = games[0].env
    texts = ["system\n", "user\n", "assistant\n"] * 1000
    texts += [system_prompt(env, True, tags), NO_ACTION, QUESTION, QUESTION_LONG, *VERDICTS, *CORRECTIONS.values()] * 20
    if env == "alfworld":
        names = sorted(set(FITS) | {o for objects in FITS.values() for o in objects} | {"desklamp", "floorlamp"})
        texts += [f" {name}" for name in names] * 20
        texts += ["You have closed the. You turn off. There's nothing special about. This is a clean cool hot cold. look "
                  "inventory examine close You are carrying: You are not carrying anything. You are facing the. Nothing "
                  "happens."] * 20
    else:
        texts += ["No known action matches that input. Ambiguous request: Please enter the number for the action you "
                  "intended (or blank to cancel): The door is already open. You decide to wait for 10 iterations."] * 20
    silent = lambda line: None  # what cannot be played is named when it is to be learnt from
    for _, turns, _ in play_expert(games, pool, warn=silent):
        for observation, command, *_ in turns:
            texts += [observation, command]
        texts += [text for _, text in thoughts(env, turns)] if tags else []
    return texts + ["go to desk 1 is not possible. look changed nothing."] * (20 if tags else 0)


# ------------------------------------------------------------------------------------------------- supervised training

def cold_start(model, episodes, epochs=1, batch=64, lr=2e-3, lm_coef=0.1, seed=0, progress=True, stop=None,
               lesson=None, value_head=None, critic_coef=0.3, head_lr=1e-3):
    """Supervised training in place: cross-entropy on the expert's tokens + lm_coef * cross-entropy on the others
    + critic_coef * L_cls, where there is a lesson.

    The first two are means over their own tokens of a batch. Learning rates (the value head has its own, as in
    train.py): linear warm-up, then cosine to a tenth. Fewer episodes than `batch` are one batch; none raise ValueError.

    lesson: from the episodes of a batch and a generator to a `support.critiques.Lesson`.
    """
    if not episodes:
        raise ValueError("no episodes to learn from: the expert won none of the games within --max-steps; those that cannot "
                         "be played are named above")
    batch = min(batch, len(episodes))
    parts = [{"params": list(model.parameters()), "peak": lr}]
    parts += [{"params": list(value_head.parameters()), "peak": head_lr}] if value_head else []
    optimizer = torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    shuffle, choose = (torch.Generator().manual_seed(seed) for _ in range(2))  # same batches with a lesson and without
    total, done = epochs * (len(episodes) // batch), 0
    warmup = min(100, max(1, total // 2))
    bar = tqdm(total=total, desc="cold start", disable=None if progress else True)  # None: on a terminal alone
    for _ in range(epochs):
        # Shuffle, then sort by length inside pools of 16 batches: little padding, and still random batches.
        order = torch.randperm(len(episodes), generator=shuffle).tolist()
        pools = [sorted(order[i:i + 16 * batch], key=lambda j: len(episodes[j].tokens)) for i in range(0, len(order), 16 * batch)]
        batches = [p[i:i + batch] for p in pools for i in range(0, len(p) - batch + 1, batch)]
        for k in torch.randperm(len(batches), generator=shuffle).tolist():
            chosen = [episodes[j] for j in batches[k]]
            asked = lesson(chosen, choose) if lesson else None
            # With --lm-coef 0 the expert's tokens alone are scored, else all but the first, which nothing predicts.
            scored = [e.sampled if lm_coef == 0 else [False] + [True] * (len(e.tokens) - 1) for e in chosen]
            out = forward(model, [e.tokens for e in chosen], scored, branches=asked and asked.branches,
                          value_head=value_head, action_ends=[[step.end for step in e.steps] for e in chosen])
            ours = torch.tensor([s for e, row in zip(chosen, scored) for s, yes in zip(e.sampled, row) if yes])   # (N,)
            expert_loss = -out["logprobs"][ours].mean()
            given_loss = -out["logprobs"][~ours].mean() if lm_coef else torch.zeros_like(expert_loss)
            critic_loss = lesson_loss(out, asked) if lesson else torch.zeros_like(expert_loss)
            share = min((done + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, done / max(1, total))))
            for part in optimizer.param_groups:
                part["lr"] = part["peak"] * share
            optimizer.zero_grad()
            (expert_loss + lm_coef * given_loss + critic_coef * critic_loss).backward()
            torch.nn.utils.clip_grad_norm_([p for part in parts for p in part["params"]], 1.0)
            optimizer.step()
            done += 1
            bar.update()
            bar.set_postfix(expert=f"{expert_loss.item():.3f}", given=f"{given_loss.item():.3f}",
                            **{"L_cls": f"{critic_loss.item():.3f}"} if lesson else {})
            if done == stop:
                bar.close()
                return model
    bar.close()
    return model


def make_cold_start(args, games, pool):
    """The folder of the tiny policy that train.py's --cold-start asks for.

    A policy that comes with the repository where there is one that has seen nothing of what the level tests. What is trained
    here is cached and found by the next run; for official ALFWorld games, which have thirty receptacles, it begins as the
    policy for generated ones, which can read. `games`: the level's training games; no other game is ever shown.
    """
    policies = os.path.join(os.path.dirname(os.path.abspath(__file__)), "policies")
    shipped, reader = os.path.join(policies, SHIPPED[args.games]), os.path.join(policies, SHIPPED["generated"])
    # ALFWorld's were trained on all six task types, ScienceWorld's on none that is held out.
    may_use = args.level != "L2" if args.env == "alfworld" else args.task_types == ["short"]
    if args.cold_start == "auto" and may_use and os.path.isdir(shipped):
        return os.path.relpath(shipped)
    count = 0 if args.cold_start == "none" else args.cold_start_episodes
    types = "-".join(str(t) for t in args.task_types or [])[:60]
    reads = bool(count) and args.games == "official" and may_use and os.path.isdir(reader)
    name = "-".join(x for x in ("cache", args.games, "reads" * reads, args.level if args.level == "L2" else "", types, str(count)) if x)
    folder = os.path.join(policies, f"{name}-seed{args.seed}")
    if os.path.isdir(folder):
        return os.path.relpath(folder)
    chosen = levels.sample_games(games, count or 400, args.seed)
    if reads:
        (model, tokenizer), lr = load_policy(reader), 1e-3
    else:
        tokenizer, lr = train_tokenizer(tokenizer_texts(chosen[:400], pool)), 2e-3
        model = tiny_model(tokenizer, seed=args.seed)
    if count:
        episodes = expert_episodes(chosen, pool, ChatFormat(tokenizer, SYSTEM[args.env]), args.max_steps,
                                   copies=1 if args.env == "alfworld" else 6)
        cold_start(model, episodes, epochs=max(4, 200 * 32 // max(1, len(episodes))), batch=32, lr=lr, seed=args.seed)
    save_policy(folder, model, tokenizer, prompt="short", cold_start_episodes=count, level=args.level,
                task_types=sorted({g.task_type for g in chosen}))
    return os.path.relpath(folder)


def main():
    parser, group = make_parser("Supervised cold start of the tiny policy on expert episodes.")
    flag = group("most used")
    flag("--out", default="policies/new", help="folder to write (a Hugging Face checkpoint)")
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--level", default="L1", choices=levels.LEVELS, help="L2 leaves out the task types that it tests")
    flag("--init", metavar="MODEL", help="start from this policy (its tokenizer too) instead of random weights: a folder, "
         "a hub name, a .gguf file, or smollm2")
    flag("--episodes", type=int, default=3000, help="training games that the expert plays")
    flag("--sloppy", type=float, default=0.0, help="chance of a careless action before each of the expert's")
    flag("--slips", default="learnt", choices=["learnt", "shown"], help="--sloppy's careless actions; shown: they weigh as "
         "little as observations (--lm-coef), what the expert does after them is learnt")
    flag("--seed", type=int, default=0, help="of games, slips, shuffling")

    flag = group("what is shown")
    flag("--games", default="auto", choices=["auto", "official", "generated"], help="ALFWorld's")
    flag("--task-types", nargs="+", help="these only; ScienceWorld: `short` for those of the default run")
    flag("--max-steps", type=int, help="longer expert episodes are left out (default: as train.py)")
    flag("--copies", type=int, default=1, help="of each episode, with other names for what is in it: teaches to read")
    flag("--brief", action="store_true", help="--init with a language model: teach it to play without the instructions, "
         "by the short prompt of our own policies")
    flag("--tags", action="store_true", help="each answer opens with one of RLVMR's tags: planning, explore, reflection, "
         "monitor (with --sloppy, so that some actions fail and are reflected on)")
    flag("--correct", action="store_true", help="in some of the games an instruction against a kind of flaw stands in the "
         "prompt, and the careless expert (--sloppy) makes no such slip")
    flag("--jsonl", metavar="FILE", help="train nothing: write the expert's episodes as a chat dataset (messages "
         "convention, the instructions for language models as system prompt) for any trainer")

    flag = group("learning to judge")
    flag("--critic", default="none", choices=CRITIC, help="learn to judge the expert's actions (with --sloppy, so that "
         "some are bad): in words with critiques, by a value head, both")
    flag("--critic-coef", type=float, default=0.3, help="weight of that loss")
    flag("--questions", type=int, default=3, help="steps that --critic asks about in words, per episode")
    flag("--critic-url", help="have a language model write verdicts and critiques: its OpenAI-compatible address, up to "
         "/v1 (default: rules write them)")
    flag("--critic-model", help="its name there")

    flag = group("how it learns")
    flag("--size", default="0.5M", choices=list(SIZES), help="parameters of a policy made from random weights")
    flag("--epochs", type=int, default=3, help="passes over the episodes")
    flag("--batch", type=int, default=32, help="episodes per update")
    flag("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    flag("--lm-coef", type=float, default=0.1, help="weight of the loss on observation tokens and --slips shown")
    flag("--stop-step", type=int, help="stop after so many updates, in the middle of the schedule: a policy that leaves "
         "room to learn by reward")
    flag("--precision", default="float32", choices=["float32", "bfloat16"], help="of --init's matrix products; weights "
         "and updates stay in float32")
    flag("--lora-rank", type=int, default=0, help="--init: train low-rank additions of this rank")
    flag("--device", default="cpu", help="where to train: cpu, cuda, ...")
    flag("--workers", type=int, default=os.cpu_count(), help="environment processes")
    args = parser.parse_args()
    if args.critic != "none" and not args.sloppy:
        parser.error("--critic needs bad actions to judge: add --sloppy 0.5")
    if args.critic == "value" and args.jsonl:
        parser.error("--critic value has no words to write: use --critic generative with --jsonl")
    if args.slips == "shown" and (args.jsonl or not args.sloppy):
        parser.error("--slips shown needs slips, and is no part of a dataset: add --sloppy 0.5, leave out --jsonl")
    if bool(args.critic_url) != bool(args.critic_model) or args.critic_url and args.critic == "none":
        parser.error("--critic-url and --critic-model go together, with --critic")
    if args.correct and not args.sloppy:
        parser.error("--correct needs slips that an instruction can forbid: add --sloppy 0.5")
    critic = make_critic(args, f"{args.jsonl or args.out.rstrip('/')}.critic.jsonl")
    try:
        args.games = levels.choose_games(args.games, args.env)
        games = levels.level_games(args.env, args.level, "train", args.games, args.task_types)
        games = levels.sample_games(games, args.episodes, args.seed)
        model = tokenizer = None
        if args.init:
            args.init = model_folder(args.init)
            model, _, tokenizer = trainable(args.init, args.device, args.precision == "bfloat16", args.lora_rank,
                                            with_reference=False, seed=args.seed)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    args.max_steps = args.max_steps or levels.max_steps(args.games, args.task_types)
    begin = time.time()
    with EnvPool(args.workers) as pool:
        if args.jsonl:
            try:
                count = write_messages(games, pool, system_prompt(args.env, False, args.tags), args.jsonl,
                                       args.max_steps, args.sloppy, args.seed, args.tags, critic, args.correct)
            except OSError as error:
                parser.error(f"cannot write --jsonl {args.jsonl}: {error.strerror}")
            except NoCritic as error:
                sys.exit(f"cold_start.py: {error} the same command")
            print(f"{count} of {len(games)} games won by the expert: {args.jsonl}")
            return
        tokenizer = tokenizer or train_tokenizer(tokenizer_texts(games[:400], pool, args.tags), tags=args.tags)
        chat, ours = ChatFormat(tokenizer, system_prompt(args.env, True, args.tags), args.tags), True
        if args.init:
            chat, ours = make_chat(tokenizer, args.env, args.init)
            if args.brief:
                chat = ChatFormat(tokenizer, system_prompt(args.env, True, args.tags), args.tags, chat.ends)
        if args.tags and not chat.tags:  # it is to learn them now
            chat = ChatFormat(tokenizer, system_prompt(args.env, ours, True), True)
            add_tags(model, tokenizer, args.seed) if ours else None
        try:
            episodes = expert_episodes(games, pool, chat, args.max_steps, sloppy=args.sloppy, seed=args.seed,
                                       copies=args.copies, critic=critic, correct=args.correct, learn_slips=args.slips == "learnt")
        except NoCritic as error:
            sys.exit(f"cold_start.py: {error} the same command")
    model = model or tiny_model(tokenizer, **SIZES[args.size], seed=args.seed).to(args.device)
    print(f"{len(episodes)} episodes won by the expert in {len(games)} games and {time.time() - begin:.0f} s; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    torch.manual_seed(args.seed)
    head = torch.nn.Linear(model.config.hidden_size, 1).to(args.device) if args.critic in ("value", "both") else None
    lesson = lambda chosen, generator: make_lesson(chosen, chat, args.critic, args.questions, generator)
    try:
        cold_start(model, episodes, args.epochs, args.batch, args.lr, args.lm_coef, args.seed, stop=args.stop_step,
                   lesson=lesson if critic else None, value_head=head, critic_coef=args.critic_coef)
    except ValueError as error:
        sys.exit(f"cold_start.py: {error}")
    # float16 halves the file; the policy is loaded in float32 and its weights are exact in both.
    prompt = "short" if ours else "brief" if args.brief else notes_of(args.init).get("prompt", "instructions")
    save_policy(args.out, model, tokenizer, torch.float16 if ours else None, extras=write_trainer(head), prompt=prompt,
                tags=chat.tags, critic=args.critic, correct=args.correct, cold_start=vars(args),
                minutes=round((time.time() - begin) / 60, 1))
    print(f"saved {args.out} after {(time.time() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

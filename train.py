"""GRPO with the good/bad classifier (GCD) on text games, the whole loop.

    python train.py --env alfworld                        # laptop, no GPU, no data: some 10 minutes
    python train.py --env alfworld --classifier none      # GRPO alone, the baseline
    python train.py --env alfworld --games official       # ALFWorld's own games (set ALFWORLD_DATA)
    python train.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct --lr 1e-6
    accelerate launch --num_processes 8 train.py --model ... --engine vllm     # each plays and learns a share
    python train.py --resume runs/alfworld-...            # go on where a killed run stopped

One iteration: play `--tasks` games `--group-size` times each with the current policy; advantages within each
group; labels good/bad for single steps; `--updates` optimizer steps on L = L_GRPO + lambda * L_cls; sync;
log.

    G   --group-size        episodes of one game from one state: a group
    E   tasks * G           episodes of an iteration
    S                       steps in them (one answer, one action each)
    N                       sampled tokens in them; given ones (prompts, observations) are never scored
    A   --advantage         advantage of a step, eq. 1 of grpo.py or another rule of credit.py
    w   --weighting         weight of a token in L_GRPO, eq. 3; all of a batch sum to 1
    lambda                  --classifier-coef, weight of L_cls (eqs. 5a and 5b of classifier_loss.py)

Read `train`, `weigh` and `gradients`, below, beside grpo.py, classifier_loss.py and actor.py, whose functions
they call. What every run needs and the method does not (set-up, checkpoints, several processes, logs) is one
named call each, in support/.

Departures from the paper: a tiny policy by default (see cold_start.py), and what the paper leaves open
(labels, class balance, normalisation) is spelled out in classifier_loss.py and grpo.py.
"""

import argparse
import json
import os
import sys
import time

import torch

from classifier_loss import LEFT_OUT, balanced_weights, choose_questions, generative_loss, value_head_loss
from credit import CREDIT
from games import levels
from grpo import group_advantages, grpo_loss, token_weights
from support.batches import deal, forward, lay_out, micro_batches
from support.controls import CONTROLS, classifier_coef
from support.corrections import correct
from support.critic import NoCritic
from support.labels import LABELS
from support.logs import Tally
from support.policies import sync
from support.processes import add_up, clip_gradients, is_sharded, own_share
from support.run import (collect_episodes, compare_engine, finish_iteration, gradient_norms_apart, prepare,
                         score, set_rate, smooth_entropy, step_if_finite)
from support.setup import check, setup

def train(args, run):
    """The method. Shapes: E episodes, S steps, N sampled tokens, in groups of G episodes of one game."""
    begin, parameters = time.time(), [p for part in run.optimizer.param_groups for p in part["params"]]
    for iteration in range(run.done + 1, args.iterations + 1):
        # Games, sampling and choices depend on the seed and the iteration alone: a resumed run repeats them.
        seed, clock = args.seed * 1_000_003 + iteration, time.perf_counter()
        set_rate(run.optimizer, args, iteration)

        # 1. Rollout: every game is played G times from the same initial state by the current policy.
        games = levels.sample_games(run.games, args.tasks, seed)
        episodes, report = collect_episodes(run, games, seed)
        batch, played = lay_out(episodes), time.perf_counter()  # flat tensors, laid end to end

        # 2. The outcome, compared with the others of its group, is the advantage of all steps of an episode.
        #    Inside a won episode that praises flawed steps too; in expectation over won and lost it does not.
        outcome, signal = group_advantages(batch.reward, batch.group, args.advantage == "std")  # (E,)   eq. 1
        batch.advantages = outcome[batch.episode_of_step]                                       # (S,)

        # 3. Labels: which single steps were good and which bad, whatever became of the episode.
        batch.labels = batch.true_labels = LABELS[args.labels](batch, run)                      # (S,)
        batch.labels = CONTROLS[args.control](batch, seed)  # unchanged, but for a control of an experiment

        # 4. Credit: rules other than GRPO's look at single steps.
        batch.advantages = CREDIT[args.credit](episodes, args.advantage == "std", batch.labels)  # (S,)

        # 5. Whole groups for each optimizer step, their weights, and what the reference says of their tokens.
        #    All of it before the first step changes the policy.
        shares = deal(batch, args.updates)
        batches = [weigh(args, batch.part(share), seed + i) for i, share in enumerate(shares)]
        gaps = [score(run, part) for part in batches]

        # 6. Gradients of the loss, clipped; a step. Every group is used once.
        sums = []
        for part in batches:
            measured = not sums and iteration % args.norms_every == 1 % args.norms_every
            apart = gradient_norms_apart(run, part, gradients) if measured else {}
            coef = classifier_coef(args, run, part, gradients, weigh, seed)                     # lambda
            sums.append(gradients(args, run, part, classifier_coef=coef) | apart)
            compare_engine(run, gaps, sums)  # did the engine sample from the policy that we train?
            sums[-1]["grad_norm"] = clip_gradients(parameters, args.max_norm)
            step_if_finite(run, part, sums[-1])
        sync(run.engine, run.model)

        # 7. Log, save, evaluate at the end.
        now = time.perf_counter()
        row = {"groups_without_signal": 1.0 - signal.float().mean().item(), "seconds_play": played - clock,
               "seconds_update": now - played, **correct(run, episodes)}  # what the next prompts say
        left = (time.time() - begin) / (iteration - run.done) * (args.iterations - iteration) / 60
        finish_iteration(run, iteration, episodes, report, sums, row, minutes_left=left)


def weigh(args, batch, seed):
    """The weight of every token in L_GRPO and of every step in L_cls, over the whole batch of an optimizer
    step, so that the size of a micro-batch changes nothing. In place; returns the batch."""
    episode_of_token = batch.episode_of_step[batch.step_of_token]                               # (N,)
    batch.token_weights = token_weights(batch.step_of_token, episode_of_token, args.weighting)  # (N,), sum 1
    # Won and lost episodes apart: within each, both classes weigh the same, and the outcome tells nothing.
    won = None if args.labels == "outcome" else batch.won  # (those labels are the outcome)
    batch.value_weights = balanced_weights(batch.labels, won)                                   # (S,), sum 1
    budget, generator = args.questions * len(batch.episodes), torch.Generator().manual_seed(seed)
    asked = choose_questions(batch.labels, won, budget, generator)                              # (S,) bool
    batch.question_weights = balanced_weights(torch.where(asked, batch.labels, LEFT_OUT), won)  # (S,), sum 1
    return batch


def gradients(args, run, batch, grpo_coef=1.0, classifier_coef=None):
    """Gradients of L = L_GRPO + lambda * L_cls over the batch of one optimizer step, micro-batch by
    micro-batch.

    The coefficients serve to look at one part alone. Returns a dictionary of sums over the batch: the parts
    of the loss, KL, entropy, how many verdicts were right.
    """
    coef = args.classifier_coef if classifier_coef is None else classifier_coef                 # lambda
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    device, tally = next(run.model.parameters()).device, Tally()
    micros = micro_batches(batch.episodes, args.micro_tokens)
    for micro, ours in own_share(micros, run.shared, even=is_sharded(run.model)):
        part = batch.part(micro, device)  # its slices: (s,) per step, (n,) per sampled token
        out = forward(run.model, part.sequences, part.sampled, args.temperature,
                      branches=part.branches(run.question), value_head=run.value_head,
                      action_ends=part.action_ends, head_layer=args.head_layer, entropy_grad=args.epo > 0)
        if not ours:  # weights are spread: another process counts this one, and waits for our share of them
            (0.0 * out["logprobs"].sum()).backward()
            continue
        loss, parts = grpo_loss(                                                                # eqs. 2-4
            logprobs=out["logprobs"], old_logprobs=part.old_logprobs,
            advantages=part.advantages[part.step_of_token], weights=part.token_weights, clip=args.clip,
            ref_logprobs=part.ref_logprobs, kl_coef=args.kl_coef, importance=part.importance)
        smooth, parts["turn_entropy"] = smooth_entropy(run, out["entropy"], part, turns=len(batch.labels))
        loss = grpo_coef * (loss + smooth)  # smooth: 0 but for --epo
        # The gradient of both forms goes through the hidden states into the trunk that chooses the actions.
        if "verdicts" in out:
            asked, says_good = part.question_weights > 0, run.question.says_good(out["verdict_logits"])
            parts["generative_loss"] = generative_loss(out["verdicts"], part.question_weights[asked])   # 5a
            loss = loss + coef * parts["generative_loss"]
            tally.judge("generative", says_good, part.labels[asked], part.won[asked])
        if "values" in out:
            parts["value_loss"] = value_head_loss(out["values"], part.labels, part.value_weights)       # 5b
            loss = loss + coef * parts["value_loss"]
            tally.judge("value", out["values"] > 0, part.labels, part.won)
        loss.backward()
        tally.add(parts, loss=loss, entropy=(part.token_weights * out["entropy"]).sum(),
                  gap=(part.token_weights * (out["logprobs"] - part.old_logprobs).abs()).sum())
    parameters = [p for part in run.optimizer.param_groups for p in part["params"]]
    return add_up(run.shared, parameters, tally.sums)[0]


# ------------------------------------------------------------------------------------------------------- main

def main():
    args = parse_arguments()
    try:
        run = setup(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped before the run began")
    again = f"python train.py --resume {args.out}"
    with run.pool:
        try:
            prepare(run, LABELS[args.labels], weigh)
            begin = time.time()
            train(args, run)
            print(f"{(time.time() - begin) / 60:.1f} minutes")
        except OSError as error:
            sys.exit(f"train.py: cannot write to --out {args.out}: {error.strerror or error}. What is there "
                     f"is whole; once that is mended, go on with: {again}")
        except NoCritic as error:
            sys.exit(f"train.py: {error} {again}")
        except KeyboardInterrupt:
            sys.exit(f"\ntrain.py: stopped. Go on from the last checkpoint with: {again}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="GRPO with the good/bad classifier on text games.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument_group("what is played").add_argument
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--level", default="L1", choices=levels.LEVELS, help="what is trained and tested: games/levels.py")
    flag("--games", default="auto", choices=["auto", "official", "generated"],
         help="ALFWorld's; auto: official where their data is found")
    flag("--task-types", nargs="+", help="train on these only: ALFWorld 1-6, ScienceWorld's names, or "
         "`short` (its default with --model tiny)")
    flag("--max-steps", type=int, help="steps per episode (default 20 on generated games, 50 on official "
         "ones; ScienceWorld: by its tasks)")
    flag("--reward", default="score", choices=["score", "success"], help="ScienceWorld's: score / 100, or 1 "
         "for 100")
    flag = parser.add_argument_group("who plays").add_argument
    flag("--model", default="tiny", help="`tiny`, or any Hugging Face folder or hub name")
    flag("--cold-start", default="auto", choices=["auto", "train", "none"], help="for --model tiny. auto: "
         "the policy in policies/tiny, on official games trained on with their expert; train: train one now; "
         "none: random weights. What is trained is cached in policies/")
    flag("--cold-start-episodes", type=int, default=1500, help="expert games where a cold start is trained")
    flag("--engine", default="auto", choices=["auto", "torch", "vllm"],
         help="who samples; auto: vLLM where it is installed and there is a GPU")
    flag("--engine-memory", type=float, default=0.4, help="share of the GPU's memory for vLLM")
    flag("--engine-gap", type=float, default=0.1, help="stop where the engine's log-probabilities are "
         "further than this from the trainer's, in nats per token on average: its weights are stale, or its "
         "arithmetic is another")
    flag("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    flag("--tis-clip", type=float, default=2.0, help="vLLM: largest importance weight against the trainer")
    flag("--lora-rank", type=int, default=0, help="train low-rank additions of this rank (peft); 0: all "
         "weights")
    flag("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
         help="of the matrix products; weights and their updates stay in float32, frozen weights under LoRA "
         "do not. auto: bfloat16 on a GPU")
    flag("--shard", action="store_true", help="spread the weights over all processes (FSDP)")
    flag("--gradient-checkpointing", action="store_true", help="compute activations again: less memory")
    flag("--show-actions", action="store_true", help="name the admissible commands in every observation")
    flag("--temperature", type=float, default=1.0, help="of sampling; the trainer scores with the same")
    flag("--max-new-tokens", type=int, help="per answer (default 24 for our tiny policies, 512 for others)")
    flag("--max-context", type=int, help="tokens; an episode that would grow longer ends there (default "
         "2048, others 8192)")
    flag = parser.add_argument_group("how it learns").add_argument
    flag("--iterations", type=int, help="rounds of playing and updating (default 32, ScienceWorld 10)")
    flag("--tasks", type=int, default=16, help="games per iteration")
    flag("--group-size", type=int, default=8, help="episodes per game (G)")
    flag("--updates", type=int, default=2, help="optimizer steps per iteration, each on its share of the "
         "groups")
    flag("--lr", type=float, help="peak rate of AdamW (default 5e-4 for our tiny policies, 1e-6 for others)")
    flag("--warmup", type=int, default=3, help="iterations over which the rate rises: Adam's first steps are "
         "noise")
    flag("--lr-end", type=float, default=0.0, help="the rate falls to this share of its peak; 1 keeps it "
         "constant")
    flag("--clip", type=float, default=0.2, help="clip range of the ratio")
    flag("--kl-coef", type=float, default=0.01, help="weight of the KL to the start; 0 saves its forward "
         "pass")
    flag("--credit", default="grpo", choices=list(CREDIT), help="from outcomes to advantages of single "
         "steps: credit.py")
    flag("--epo", type=float, default=0.0, help="weight of EPO's entropy smoothing (the paper's: 0.001); 0: "
         "none")
    flag("--advantage", default="std", choices=["std", "mean"], help="divide by the group's std, or only "
         "subtract its mean")
    flag("--weighting", default="token", choices=["token", "step", "episode"], help="what counts equally in "
         "the loss")
    flag("--correct", type=float, default=0.0, metavar="THRESHOLD", help="an instruction joins the prompt "
         "against each flaw that more than this share of steps has: support/corrections.py; 0: none")
    flag("--max-norm", type=float, default=1.0, help="gradient clipping")
    flag("--micro-tokens", type=int, default=8192, help="padded tokens per forward pass: memory, never the "
         "objective")
    flag = parser.add_argument_group("the classifier").add_argument
    flag("--classifier", default="value", choices=["none", "generative", "value", "both"],
         help="form of L_cls")
    flag("--classifier-coef", type=float, default=0.3, help="lambda")
    flag("--labels", default="flaws", choices=list(LABELS), help="good and bad steps: support/labels.py")
    flag("--critic-url", help="of the critic for --labels critic, up to /v1")
    flag("--critic-model", help="its name there")
    flag("--head-lr", type=float, default=1e-3, help="peak rate of the value head, whatever the policy's is")
    flag("--head-layer", type=int, default=-1, help="hidden state that the value head reads: 0 the "
         "embeddings, 1 after the first layer, ..., -1 the last")
    flag("--control", default="none", choices=list(CONTROLS), help="take something away from L_cls: "
         "support/controls.py")
    flag("--questions", type=int, default=3, help="steps that the generative classifier is asked about, per "
         "episode of the batch")
    flag("--warmup-updates", type=int, help="supervised updates on L_cls before RL, in every arm alike (also "
         "with --classifier none), since a policy trained on games alone cannot answer the question (default "
         "40 for our tiny policies, 0 for others and where cold_start.py --critic has taught it)")
    flag("--norms-every", type=int, default=8, help="iterations between measurements of the gradient norms "
         "of L_GRPO and lambda L_cls apart (two more backward passes each)")
    flag = parser.add_argument_group("the run").add_argument
    flag("--eval-games", type=int, help="games of the level's test, before and after (default 200, "
         "ScienceWorld 300)")
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
                stored = json.load(file)
            args = argparse.Namespace(**{**vars(args), **stored, "resume": args.resume, "out": args.resume})
        except (OSError, ValueError):
            parser.error(f"--resume {args.resume}: no config.json of a run in there")
    check(args, parser.error)
    return args


if __name__ == "__main__":
    main()

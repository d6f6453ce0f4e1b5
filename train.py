"""GRPO with the good/bad classifier (GCD) on text games, the whole loop.

    python train.py --env alfworld                        # GRPO alone; no GPU, no data: 5 to 10 minutes
    python train.py --env alfworld --classifier value     # with the remedy, L_cls (or generative, both)
    python train.py --env alfworld --credit adca          # the same labels in the advantage instead
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
from support.flags import make_parser
from support.labels import LABELS
from support.logs import Tally, flaw_advantages, progress
from support.policies import sync
from support.processes import add_up, clip_gradients, is_sharded, own_share
from support.run import (collect_episodes, compare_engine, finish_iteration, gradient_norms_apart, prepare,
                         score, set_rate, smooth_entropy, step_if_finite)
from support.setup import settled, setup


def train(args, run):
    """The method. Shapes: E episodes, S steps, N sampled tokens, in groups of G episodes of one game."""
    begin, parameters = time.time(), [p for part in run.optimizer.param_groups for p in part["params"]]
    for iteration in range(run.done + 1, args.iterations + 1):
        # Games, sampling and choices depend on the seed and the iteration alone: a resumed run repeats them.
        seed, clock = args.seed * 1_000_003 + iteration, time.perf_counter()
        set_rate(run.optimizer, args, iteration)

        # 1. Rollout: every game is played G times from the same initial state by the current policy. Episodes
        #    of another game, or from another state, would be no baseline for one another.
        games = levels.sample_games(run.games, args.tasks, seed)
        episodes, report = collect_episodes(run, games, seed)
        batch, played = lay_out(episodes), time.perf_counter()  # flat tensors, laid end to end

        # 2. The outcome, compared with the others of its group, is the advantage of all steps of an episode.
        #    Inside a won episode that praises flawed steps too; in expectation over won and lost it does not.
        outcome, signal = group_advantages(batch.reward, batch.group, args.advantage == "std")  # (E,)   eq. 1
        batch.advantages = outcome[batch.episode_of_step]                                       # (S,)

        # 3. Labels: which single steps were good and which bad, whatever became of the episode. They are
        #    information that GRPO alone does not have: the fair comparison is --credit adca, which puts the
        #    same labels into the advantage.
        batch.labels = batch.true_labels = LABELS[args.labels](batch, run)                      # (S,)
        batch.labels = CONTROLS[args.control](batch, seed)  # unchanged, but for a control of an experiment

        # 4. Credit: rules that look at single steps; `grpo`, the default, gives the advantages of 2 again
        #    (which `--labels outcome` has read).
        batch.advantages = CREDIT[args.credit](episodes, args.advantage == "std", batch.labels)  # (S,)

        # 5. Whole groups for each optimizer step, their weights, and what the reference says of their tokens.
        #    All of it before the first step changes the policy.
        shares = deal(batch, args.updates)
        batches = [weigh(args, batch.part(share), seed + i) for i, share in enumerate(shares)]
        gaps = [score(run, part) for part in batches]

        # 6. Gradients of the loss, clipped; a step. Every group is used once: more epochs over the same
        #    episodes would move the policy away from the one whose advantages these are.
        sums = []
        for i, part in enumerate(batches):
            measured = not sums and iteration % args.norms_every == 1 % args.norms_every  # 1, then every n-th
            apart = gradient_norms_apart(run, part, gradients) if measured else {}
            coef = classifier_coef(args, run, part, gradients, weigh, seed + i)                 # lambda
            sums.append(gradients(args, run, part, classifier_coef=coef) | apart)
            compare_engine(run, gaps, sums)  # did the engine sample from the policy that we train?
            sums[-1]["grad_norm"] = clip_gradients(parameters, args.max_norm)
            step_if_finite(run, part, sums[-1])
        sync(run.engine, run.model)  # the next episodes are sampled from the new policy

        # 7. Log, save, evaluate at the end.
        now = time.perf_counter()
        row = {"groups_without_signal": 1.0 - signal.float().mean().item(), "seconds_play": played - clock,
               "seconds_update": now - played, **flaw_advantages(episodes, batch.advantages),
               **correct(run, episodes)}  # what the next prompts say
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
    run.model.train()  # for gradient checkpointing; there is no dropout, it would be another policy's loss
    run.optimizer.zero_grad(set_to_none=True)  # what measurements before this step have left
    device, tally = next(run.model.parameters()).device, Tally()
    micros = micro_batches(batch.episodes, args.micro_tokens)
    shares = own_share(micros, run.shared, even=is_sharded(run.model))
    for micro, ours in progress("updating", unit=" micro-batches", over=shares):
        # Its slices of the batch, (s,) per step, (n,) per sampled token. All weights were computed over the
        # whole batch, so the parts' losses add up, and memory alone decides on the size of a micro-batch.
        part = batch.part(micro, device)
        out = forward(run.model, part.sequences, part.sampled, args.temperature,
                      branches=part.branches(run.question), value_head=run.value_head,
                      action_ends=part.action_ends, head_layer=args.head_layer, entropy_grad=args.epo > 0)
        if not ours:  # weights are spread: another process counts this one, but all must run its pass
            (0.0 * out["logprobs"].sum()).backward()
            continue
        loss, parts = grpo_loss(                                                                # eqs. 2-4
            logprobs=out["logprobs"], old_logprobs=part.old_logprobs,
            advantages=part.advantages[part.step_of_token], weights=part.token_weights, clip=args.clip,
            ref_logprobs=part.ref_logprobs, kl_coef=args.kl_coef, importance=part.importance)
        smooth, parts["turn_entropy"] = smooth_entropy(run, out["entropy"], part, turns=len(batch.labels))
        loss = grpo_coef * (loss + smooth)  # smooth: 0 but for --epo
        # The gradient of both forms goes through the hidden states into the trunk that chooses the actions:
        # to answer, it must represent an action where it is right apart from the same one where it is wrong.
        if "verdicts" in out:
            asked, says_good = part.question_weights > 0, run.question.says_good(out["verdict_logits"])
            parts["generative_loss"] = generative_loss(out["verdicts"], part.question_weights[asked])   # 5a
            loss = loss + coef * parts["generative_loss"]
            tally.judge("generative", says_good, part.labels[asked], part.won[asked])
        if "values" in out:
            parts["value_loss"] = value_head_loss(out["values"], part.labels, part.value_weights)       # 5b
            loss = loss + coef * parts["value_loss"]
            tally.judge("value", out["values"] > 0, part.labels, part.won)
        loss.backward()  # adds to the gradients of the micro-batches before
        tally.add(parts, loss=loss, entropy=(part.token_weights * out["entropy"]).sum(),
                  gap=(part.token_weights * (out["logprobs"] - part.old_logprobs).abs()).sum())
    parameters = [p for part in run.optimizer.param_groups for p in part["params"]]
    return add_up(run.shared, parameters, tally.sums)[0]


# ------------------------------------------------------------------------------------------------------- main

def main():
    # What a user can cause ends in one line that says what to do; a traceback is a bug of ours.
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
    parser, group = make_parser("GRPO with the good/bad classifier on text games.")
    flag = group("most used")
    flag("--env", default="alfworld", choices=levels.ENVS, help="which text game")
    flag("--level", default="L1", choices=levels.LEVELS, help="what is trained and tested: games/levels.py")
    # The tiny policy starts inside the danger zone: it has learnt from a careless expert (cold_start.py).
    flag("--model", default="tiny", help="`tiny`, `smollm2`, a folder, hub name or .gguf file")
    # None by default: neither form won more or had fewer flaws where it was tried (docs/experiment.md).
    flag("--classifier", default="none", choices=["none", "generative", "value", "both"],
         help="the form of L_cls, the remedy; none: GRPO alone")
    # What counts beside GRPO's gradient is the ratio of the two norms (--norms-every), since Adam divides the
    # common scale out. An untaught question at lambda = 0.3 had 40 times GRPO's norm and wiped a policy out.
    flag("--classifier-coef", type=float, default=0.3, help="lambda")
    flag("--credit", default="grpo", choices=list(CREDIT), help="outcomes to advantages of steps: credit.py")
    flag("--iterations", type=int, help="rounds of playing and updating (default 32, ScienceWorld 10)")
    flag("--seed", type=int, default=0, help="of games, sampling and shuffling")
    flag("--out", metavar="RUN", help="folder of the run (default runs/ENV-CLASSIFIER-seedN-TIME)")
    flag("--resume", metavar="RUN", help="go on with the run in this folder; its own config.json counts")

    flag = group("what is played")
    flag("--games", default="auto", choices=["auto", "official", "generated"],
         help="ALFWorld's; auto: official where their data is found")
    flag("--task-types", nargs="+", help="only these: ALFWorld 1-6, ScienceWorld's names, or `short`")
    flag("--max-steps", type=int, help="per episode (default 20, official games 50, ScienceWorld: by task)")
    flag("--reward", default="score", choices=["score", "success"], help="ScienceWorld's: score / 100 or won")
    flag("--eval-games", type=int, help="before and after, of the level's test (200, ScienceWorld 300)")

    flag = group("how it learns")
    flag("--tasks", type=int, default=16, help="games per iteration")
    # A larger group sees rare flaws more often, and its mean is a better baseline: (1 - 1/G) of the signal.
    flag("--group-size", type=int, default=8, help="episodes per game (G)")
    flag("--updates", type=int, default=2, help="optimizer steps per iteration, each on groups of its own")
    flag("--lr", type=float, help="peak rate of AdamW (default 5e-4 for our tiny policies, others 1e-6)")
    # Adam's first steps have the same length whatever the gradient: without a slow start the very first one
    # moved the policy by 3.5 nats. The fall to 0 lets the last iterate be the one that counts.
    flag("--warmup", type=int, default=3, help="iterations over which the rate rises")
    flag("--lr-end", type=float, default=0.0, help="the rate falls to this share of its peak; 1: constant")
    flag("--clip", type=float, default=0.2, help="clip range of the ratio, eq. 3")
    flag("--kl-coef", type=float, default=0.01, help="weight of the KL to --model; 0 saves a pass")
    flag("--epo", type=float, default=0.0, help="weight of EPO's entropy smoothing (the paper's: 0.001)")
    # An explicit instruction moves a policy that follows it out of the danger zone, while it stands.
    flag("--correct", type=float, default=0.0, metavar="THRESHOLD",
         help="the prompt forbids flaws commoner than this")
    flag("--advantage", default="std", choices=["std", "mean"], help="divide by the group's std, or do not")
    # Failures are long: per token they weigh more, per episode a long one is punished less for each step.
    flag("--weighting", default="token", choices=["token", "step", "episode"], help="what counts equally")
    flag("--max-norm", type=float, default=1.0, help="gradient clipping")
    flag("--micro-tokens", type=int,
         help="per forward pass: memory and speed, never the objective (default 3072 on a CPU, else 8192)")

    flag = group("the classifier, more")
    # `rules` leaves unflawed steps of lost episodes out, and so gives the outcome away; `flaws` does not.
    flag("--labels", default="flaws", choices=list(LABELS), help="good and bad steps: support/labels.py")
    flag("--critic-url", help="of the critic for --labels critic, up to /v1")
    flag("--critic-model", help="its name there")
    flag("--head-lr", type=float, default=1e-3, help="the value head's own: at 1e-6 it would never learn")
    flag("--head-layer", type=int, default=-1, help="read by it: 0 embeddings, 1 first layer, ..., -1 last")
    flag("--control", default="none", choices=list(CONTROLS), help="take from L_cls: support/controls.py")
    flag("--questions", type=int, default=3, help="generative: asked per episode; each costs tokens")
    # A policy trained on games alone cannot answer the question, and unlearns to play while it learns to.
    # In every arm alike, also without a classifier: else an arm would be better for being trained longer.
    flag("--warmup-updates", type=int, help="before RL (40; 0 if taught by cold_start.py, or not tiny)")
    flag("--norms-every", type=int, default=8, help="iterations between the norms of both gradients apart")

    flag = group("who plays")
    flag("--cold-start", default="auto", choices=["auto", "train", "none"],
         help="of `tiny`; auto: the one in policies/; train: one on expert episodes; none: random weights")
    flag("--cold-start-episodes", type=int, default=1500, help="expert games, where one is trained")
    flag("--engine", default="auto", choices=["auto", "torch", "vllm"],
         help="who samples; auto: vLLM where it is installed and there is a GPU")
    flag("--engine-memory", type=float, default=0.4, help="share of the GPU's memory for vLLM")
    # An engine with stale weights or other arithmetic samples from another policy than the one that is
    # trained, and nothing else would say so: better no run than a wrong one.
    flag("--engine-gap", type=float, default=0.1, help="stop beyond: nats/token between engine and trainer")
    flag("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    flag("--tis-clip", type=float, default=2.0, help="vLLM: largest importance weight against the trainer")
    flag("--lora-rank", type=int, default=0, help="train additions of this rank (peft); 0: all weights")
    # Weights and updates stay in float32 (bfloat16 would round a rate of 1e-6 away), frozen ones do not.
    flag("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
         help="of the matrix products; auto: bfloat16 on a GPU")
    flag("--shard", action="store_true", help="spread the weights over all processes (FSDP)")
    flag("--gradient-checkpointing", action="store_true", help="compute activations again: less memory")
    flag("--show-actions", action="store_true", help="name the admissible commands in every observation")
    # Greedy episodes of a group would all be the same: no variance, no advantage, no signal.
    flag("--temperature", type=float, default=1.0, help="of sampling; the trainer scores with the same")
    flag("--max-new-tokens", type=int, help="per answer (default 24 for our tiny policies, others 512)")
    flag("--max-context", type=int, help="tokens; a longer episode ends there (default 2048, others 8192)")

    flag = group("the run")
    # The dynamics, shown: log pi of fixed probes; leak and own correction of each flaw (coupling.py).
    flag("--probes", metavar="FILE", help="log how likely these good and flawed actions are; made if missing")
    flag("--coupling-every", type=int, default=0, help="iterations between split updates (as dear as one)")
    flag("--save-every", type=int, default=10, help="iterations between checkpoints")
    flag("--workers", type=int, default=os.cpu_count(), help="environment processes")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    return settled(parser.parse_args(), parser.error)


if __name__ == "__main__":
    main()

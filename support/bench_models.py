"""Playing and updating with a language model, timed apart: `python -m support.bench --only models`.

    python -m support.bench --only models --model smollm2 --precision bfloat16 --lora-rank 16

As tokens per second, and as a share of what the same cores reach in the model's own matrix products: what is
missing to 100% is attention, everything between the products, Python, and matrices of too few rows (while
answers are written, as many as there are conversations).
"""

import os
import time
from types import SimpleNamespace

import torch

from games import levels
from games.pool import EnvPool
from rollout import play
from support.batches import lay_out
from support.labels import LABELS
from support.language_models import model_folder
from support.policies import make_chat, trainable
from support.setup import make_engine


def matmul_speed(model, dtype, rows, repeats=5):
    """Floating-point operations per second of the feed-forward product (rows, D) @ (D, F), at best."""
    config = model.config.get_text_config()
    x = torch.randn(rows, config.hidden_size, dtype=dtype, device=model.device)
    w = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=model.device)
    best = float("inf")
    for _ in range(repeats):
        clock = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - clock) / 10)
    return 2 * x.numel() * len(w) / best


def operations(model, read, sampled, backward=0):
    """Floating-point operations of the matrix products with weights for `read` tokens, `sampled` of which
    meet the output layer. backward: 0 none, 1 frozen weights (gradients of their inputs alone), 2 trained."""
    inner = [m.weight for m in model.get_decoder().modules()
             if isinstance(m, torch.nn.Linear) and m.weight.shape[0] > 0]
    head = model.get_output_embeddings().weight.numel()
    return 2 * (1 + backward) * (read * sum(w.numel() for w in inner) + sampled * head)


def bench_models(name="smollm2", precision="bfloat16", lora_rank=16, tasks=3, group=8, max_steps=12):
    """An iteration of 24 episodes of at most 12 steps on generated houses: GRPO alone, no reference."""
    from train import gradients, weigh
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, half = model_folder(name), precision == "bfloat16"
    args = SimpleNamespace(
        engine="torch", shard=False, device=device, precision=precision, temperature=1.0, max_new_tokens=32,
        clip=0.2, kl_coef=0.0, classifier_coef=0.0, micro_tokens=4096, head_layer=-1, epo=0.0, iterations=1,
        labels="flaws", weighting="token", questions=0)
    model, _, tokenizer = trainable(folder, device, half, lora_rank, with_reference=False)
    chat, _ = make_chat(tokenizer, "alfworld", folder)
    engine = make_engine(args, model, chat, folder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)  # time it, change nothing
    dtype = torch.bfloat16 if half else torch.float32
    speed = matmul_speed(model, dtype, 2048)
    games = levels.sample_games(levels.list_games("alfworld", "train", "generated"), tasks, 0)
    with EnvPool(os.cpu_count()) as pool:
        play(engine, pool, chat, games[:1], 1, 1)  # warm up
        clock = time.perf_counter()
        episodes, report = play(engine, pool, chat, games, group, max_steps, seed=1)
        play_seconds = time.perf_counter() - clock
    batch = lay_out(episodes)
    batch.advantages = 2.0 * torch.arange(len(batch.won)).remainder(2).float() - 1.0
    batch.labels = batch.true_labels = LABELS["flaws"](batch, None)
    weigh(args, batch, seed=0)
    run = SimpleNamespace(args=args, model=model, optimizer=optimizer, value_head=None, question=None,
                          shared=None, turn_entropies=[])
    clock = time.perf_counter()
    gradients(args, run, batch)
    optimizer.step()
    update_seconds = time.perf_counter() - clock
    tokens, sampled = sum(len(e.tokens) for e in episodes), sum(sum(e.sampled) for e in episodes)
    prompts = [next(i for i, ours in enumerate(e.sampled) if ours) for e in episodes]
    own = tokens - sum(prompts) + sum(prompts[::group])  # a group's prompt is read once
    steps = sum(len(e.steps) for e in episodes)
    print(f"\n{name}, {precision}, {f'LoRA {lora_rank}' if lora_rank else 'all weights'}, on {device}, "
          f"{torch.get_num_threads()} threads; matrix products {speed / 1e9:,.0f} GFLOP/s at 2,048 rows")
    given = (tokens - sum(prompts) - sampled) / max(1, steps - len(episodes))
    print(f"  {len(episodes)} episodes, {steps} steps, {tokens:,} tokens, {sampled:,} sampled; first prompt "
          f"{sum(prompts) / len(prompts):.0f}, answer {sampled / steps:.0f}, observation {given:.0f} tokens")
    for what, seconds, count, work in (
            ("playing", report["sample"], sampled, operations(model, own, sampled)),
            ("updating", update_seconds, tokens, operations(model, tokens, sampled, 1 if lora_rank else 2))):
        each = "sampled tokens/s" if what == "playing" else "tokens/s"
        print(f"  {what:9} {seconds:7.1f} s {count / seconds:9,.0f} {each:16}   "
              f"{100 * work / seconds / speed:5.1f}% of the matrix products' speed")
    print(f"  an iteration {play_seconds + update_seconds:.1f} s, environments {report['env']:.1f} s of them")

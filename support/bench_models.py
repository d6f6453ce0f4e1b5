"""Playing and updating with a language model, timed apart: `python -m support.bench --only models`.

    python -m support.bench --only models --model smollm2 --precision bfloat16 --lora-rank 16

As tokens per second, and as a share of what the same cores reach in the model's own matrix products: what is
missing to 100% is attention, everything between the products, Python, and matrices of too few rows (while
answers are written, as many as there are conversations).

`--only memory` counts what an update of larger ones needs.
"""

import os
import time
from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from games import levels
from games.pool import EnvPool
from rollout import play
from support.batches import lay_out
from support.labels import LABELS
from support.language_models import model_folder
from support.policies import add_lora, compute_in_bfloat16, make_chat, trainable
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


# ----------------------------------------------------------------------------------------------------------- memory

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied: of Qwen2.5-Instruct
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True), "7B": (3584, 18_944, 28, 28, 4, 152_064, False)}


def bench_memory(counts=(256, 512)):
    """What a forward pass keeps for the backward pass, in bytes per token, and with the number of parameters what fits.

    Counted on one and two layers of the real shape (random weights, bfloat16 arithmetic) at two numbers of tokens: the
    slope is what a token costs a layer; what does not grow (autocast's copies of the weights) drops out.
    """
    def build(shape, layers, lora):
        hidden, wide, _, heads, kv_heads, *_ = shape
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=1024, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, tie_word_embeddings=False)).to(torch.bfloat16 if lora else torch.float32)
        return add_lora(model, 32) if lora else model

    def kept(model, tokens):
        """Bytes of all tensors that autograd saves in a forward pass."""
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long)).last_hidden_state
        return sum(seen.values()) + 0 * out.numel()  # alive until here, so that no storage's address is used twice

    print(f"\nmemory of an update, counted at {counts} tokens; AdamW in float32, micro-batches of 8,192 tokens")
    for name, shape in SHAPES.items():
        hidden, _, layers, _, _, vocabulary, tied = shape
        for lora in (False, True):
            per_token, parameters, trained = {}, {}, {}
            for n in (1, 2):
                model = build(shape, n, lora)
                parameters[n] = sum(p.numel() for p in model.parameters())
                trained[n] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                compute_in_bfloat16(model)
                model.train()
                few, many = (kept(model, tokens) for tokens in counts)
                per_token[n] = (many - few) / (counts[1] - counts[0])
                del model
            total = layers * (parameters[2] - parameters[1]) + (1 if tied else 2) * vocabulary * hidden
            learnt = layers * (trained[2] - trained[1]) if lora else total
            layer = per_token[2] - per_token[1]
            # Trained weights: 16 bytes (weight, gradient, two moments), and autocast's copy of 2; frozen ones: 2, which
            # without LoRA are the reference policy of the KL term (with LoRA that is the same model, adapters off).
            fixed = 2 * total + (16 if lora else 18) * learnt
            logits = 4 * 4 * 2**24  # token_logprobs: a chunk, its gradient, two in passing
            whole = fixed + logits + 8192 * layers * layer
            # Checkpointing keeps each layer's input (2 or 4 bytes a number) and one layer's activations at a time.
            again = fixed + logits + 8192 * (layers * hidden * (2 if lora else 4) + layer)
            print(f"  {name:4} {'LoRA 32' if lora else 'full   '}  {total / 1e9:.2f}e9 parameters, {learnt / 1e6:6,.0f}e6 trained: "
                  f"fixed {fixed / 1e9:5.1f} GB, {layer / 1e3:4.0f} kB per token and layer; together {whole / 1e9:.0f} GB, "
                  f"with checkpointing {again / 1e9:.0f} GB")

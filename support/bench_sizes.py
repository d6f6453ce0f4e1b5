"""What a tiny policy's shape and the size of a micro-batch cost: `python -m support.bench --only sizes`.

Random weights and random texts of the default run's lengths, since speed depends on neither: so that all are timed in
one process, in turns, and it is the ratios that count.
"""

import time

import torch

from engines.torch_engine import TorchEngine
from support.policies import SIZES, tiny_model

EPISODES, LENGTH = 36, 440             # of an update, tokens of an episode
TALKS, PROMPT, TURNS, ANSWER, OBSERVATION = 64, 130, 8, 8, 22


class NoTokenizer:
    """What `tiny_model` asks of a tokenizer."""
    eos_token_id, pad_token_id = 2, 0

    def __len__(self):
        return 808


def learn(model, micro_tokens):
    """Seconds for the forward and backward passes over some episodes, so many tokens at a time."""
    count = max(1, micro_tokens // LENGTH)
    ids = torch.randint(3, 800, (EPISODES, LENGTH), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    for part in ids.split(count):
        model(input_ids=part).logits.sum().backward()
    return time.perf_counter() - begin


def sample(model):
    """Seconds for some conversations of several turns, answers of one length."""
    engine = TorchEngine(model, 2, 1.0, max_new_tokens=ANSWER)
    engine.ends = []  # every answer as long as the others
    engine.start(0)
    talks = [[5] * PROMPT for _ in range(TALKS)]
    begin = time.perf_counter()
    for _ in range(TURNS):
        for row, ids in enumerate(talks):
            engine.submit(row, ids)
        for row, new, _ in engine.poll():
            talks[row] = talks[row] + new + [7] * OBSERVATION
    return time.perf_counter() - begin


def bench_sizes(repeats=3):
    """A table: each shape, sampled and learnt tokens per second, the best of some rounds."""
    shapes = {"1M": SIZES["1M"], "1M, one key-value head": {**SIZES["1M"], "kv_heads": 1}, "0.5M": SIZES["0.5M"]}
    models = {name: tiny_model(NoTokenizer(), **shape) for name, shape in shapes.items()}
    best = {}
    for _ in range(repeats):
        for name, model in models.items():
            for what, seconds in ((8192, learn(model, 8192)), (3072, learn(model, 3072)), ("sample", sample(model))):
                best[name, what] = min(seconds, best.get((name, what), seconds))
    print(f"\ntokens/s, {torch.get_num_threads()} threads{'':12} sampled {'':12} learnt in micro-batches of 8,192 / 3,072")
    for name in models:
        sampled, (large, small) = TALKS * TURNS * ANSWER / best[name, "sample"], (
            EPISODES * LENGTH / best[name, tokens] for tokens in (8192, 3072))
        first = best["1M", "sample"] / best[name, "sample"]
        print(f"  {name:28} {sampled:9,.0f} ({first:.1f} times) {large:12,.0f} / {small:,.0f} "
              f"({best['1M', 8192] / best[name, 3072]:.1f} times, together)")

"""Runs that survive: checkpoints that appear complete or not at all, and resuming to the same numbers.

A checkpoint is an ordinary Hugging Face folder (loads with plain transformers; a LoRA adapter stands merged in it, and by
itself in `adapter/`, which loads with plain peft), plus `trainer.pt`: optimizer, value head, iteration. Nothing random is
stored: the games, sampling and shuffling of an iteration are seeded by (seed, iteration).
"""

import contextlib
import json
import os
import shutil
import signal

import torch

from support.policies import notes_of, plain_state_dict, save_policy
from support.processes import load_optimizer, load_weights, whole


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C in here takes effect at the end: what is being written gets finished."""
    came = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    except ValueError:  # not the main thread: nobody sends us Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def write_atomically(path, text):
    """The file holds the old text or the new one, never half of it."""
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)


def checkpoints(out):
    """Names of the finished checkpoints in a run's folder, oldest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted(n for n in names if n.startswith("checkpoint-") and not n.endswith((".partial", ".old")))


def write_trainer(value_head, iteration=0, optimizer_state=None):
    """What `save_policy` is to write beside the weights: a function from the unfinished folder."""
    return lambda folder: torch.save({"iteration": iteration, "optimizer": optimizer_state,
                                      "value_head": value_head and value_head.state_dict()},
                                     os.path.join(folder, "trainer.pt"))


def load_head(folder, value_head, layer=-1):
    """Put the value head that a policy was saved with, by a cold start or an earlier run, into this one. Whether there
    is one that reads the same layer. Raises ValueError where it cannot be read."""
    path = os.path.join(folder, "trainer.pt")
    if not os.path.isfile(path) or notes_of(folder).get("head_layer", -1) != layer:
        return False
    try:
        saved = torch.load(path, map_location=value_head.weight.device, weights_only=True)["value_head"]
        if saved is not None:
            value_head.load_state_dict(saved)
    except Exception as error:  # truncated files make torch raise all sorts of things
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): remove it to begin with a new value "
                         "head") from error
    return saved is not None


def save_checkpoint(out, model, tokenizer, optimizer, value_head, iteration, keep=2, write=True, **notes):
    """Write `checkpoint-000010/` into the run's folder; the `keep` newest stay. Raises OSError (a full disk, say).

    A sharded model: all processes must call it, one with `write`.
    """
    folder = os.path.join(out, f"checkpoint-{iteration:06d}")
    state, optimizer_state = plain_state_dict(model), whole(optimizer.state_dict())
    if not write:
        return folder

    with uninterrupted():
        save_policy(folder, model, tokenizer, extras=write_trainer(value_head, iteration, optimizer_state), state=state,
                    iteration=iteration, **notes)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(os.path.join(out, old))
    return folder


def load_checkpoint(out, model, optimizer, value_head, device, write=True):
    """Put the newest checkpoint that can be read into model, optimizer and value head; returns its iteration, 0 if none.

    A damaged one (a truncated file) is named and passed over. metrics.jsonl is cut back to the checkpoint (by the process
    that may `write`): what was logged after it will be logged again, with the same numbers.
    """
    from safetensors.torch import load_file
    iteration = 0
    for name in reversed(checkpoints(out)):
        folder = os.path.join(out, name)
        try:
            trainer = torch.load(os.path.join(folder, "trainer.pt"), map_location=device, weights_only=True)
            if hasattr(model, "peft_config"):
                from peft import set_peft_model_state_dict
                weights = load_file(os.path.join(folder, "adapter", "adapter_model.safetensors"))
                load = lambda: set_peft_model_state_dict(model, weights)
            else:
                weights = {}
                for part in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors")):
                    weights |= load_file(os.path.join(folder, part))
                load = lambda: load_weights(model, weights, strict=not model.config.tie_word_embeddings)
        except Exception as error:  # truncated files make torch and safetensors raise all sorts of things
            print(f"passing over {name}: it cannot be read ({type(error).__name__})")
            continue
        load()
        load_optimizer(optimizer, trainer["optimizer"])
        if value_head is not None:
            value_head.load_state_dict(trainer["value_head"])
        iteration = trainer["iteration"]
        break
    path = os.path.join(out, "metrics.jsonl")
    if write and os.path.exists(path):
        with open(path) as file:
            whole = [line for line in file if line.endswith("\n")]  # a kill may have left half a line
        kept = [line for line in whole if iteration and json.loads(line)["iteration"] <= iteration]
        write_atomically(path, "".join(kept))
    return iteration

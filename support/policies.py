"""The policy: the tiny one of ours, and loading and saving of any.

**The tiny policy** is an ordinary Hugging Face folder: Qwen2 architecture, untied embeddings, a tokenizer trained on the
texts of the games, a ChatML template. Every other file treats it exactly as it treats Qwen/Qwen2.5-1.5B-Instruct.
"""

import errno
import functools
import json
import math
import os
import shutil
import sys
import time

import torch

from actor import attention_masks, output_logits
from rollout import TAGS, ChatFormat, system_prompt
from support.processes import shard, whole

# Where the default runs start, by what is played (games.levels.choose_games).
SHIPPED = {"generated": "tiny-reads", "official": "tiny-official-careless", "simulator": "tiny-scienceworld"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<action>", "</action>", "<think>", "</think>"]
TAG_MARKS = [mark for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>")]  # where RLVMR's tags are taught
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def train_tokenizer(texts, vocab_size=1024, tags=False):
    """A byte-level BPE whose merges never leave a word, so that nearly every word of the games is one token.

    tags: RLVMR's four are tokens, too.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits stay apart ("cabinet 12" is three tokens); `assistant\n` may become one.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Za-z]+\n?| ?[0-9]| ?[^\sA-Za-z0-9]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL + MARKS + TAG_MARKS * tags,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHATML
    return tokenizer


SIZES = {  # of the tiny policy, by its parameters: the smaller learns and plays nearly twice as fast
    "0.5M": dict(hidden=96, heads=3, kv_heads=1, feed_forward=256),
    "1M": dict(hidden=128, heads=4, kv_heads=4, feed_forward=384),
}


def tiny_model(tokenizer, hidden=128, layers=4, heads=4, kv_heads=None, feed_forward=384, positions=2048, seed=0):
    """A Qwen2 causal model, randomly initialised; kv_heads: key-value heads (default: as many as heads).

    Embeddings are untied: an engine that reloads weights in place may keep a stale output layer where they are tied.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    size = 8 * math.ceil(len(tokenizer) / 8)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=size, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=positions,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))


def add_tags(model, tokenizer, seed=0):
    """RLVMR's tags as tokens of a tiny policy that was made without them, their embeddings new. In place."""
    tokenizer.add_tokens([mark for mark in TAG_MARKS if mark not in tokenizer.get_vocab()], special_tokens=True)
    torch.manual_seed(seed)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8), mean_resizing=False)


def load_policy(folder, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from any Hugging Face folder or hub name; one clear line where that is impossible.

    Raises FileNotFoundError where transformers cannot load it, ValueError where we cannot honour it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    logging.disable_progress_bar()
    try:
        # AutoTokenizer reads model type qwen2 and puts Qwen2's way of splitting words in place of the one that the
        # folder was saved with; a folder that names the generic class means what its tokenizer.json says.
        generic = get_tokenizer_config(folder).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # a missing folder, a torn file, an unknown architecture: each raises something else
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hub = "" if os.path.isdir(folder) else " (There is no such folder here. If its download broke off, start again.)"
        raise FileNotFoundError(f"{folder} is not a checkpoint that transformers can load: {why}{hub}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # Gemma 2 squashes attention scores; SDPA silently does not
    for module in model.modules():  # dropout would train another distribution than the one sampled from
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.to(device)
    try:
        check_model(model)
    except Exception as error:  # an argument that the model does not take, an unexpected shape, ...
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: {type(model).__name__} cannot be trained here: its attention does not "
                         f"take our masks and positions, or something follows its output layer ({why})") from error
    return model, tokenizer


@torch.no_grad()
def check_model(model):
    """Raise where `output_logits` and `attention_masks` do not give the log-probabilities of a plain pass.

    Ten random tokens and a branch of four after the sixth, against two separate sequences. A sliding window
    is made short for the moment, so that ten tokens tell. What fails: ALiBi (BLOOM, MPT), recurrent layers,
    output layers with more to them.
    """
    config, device = model.config.get_text_config(), model.device
    window, was_training = getattr(config, "sliding_window", None), model.training
    tokens = torch.randint(config.vocab_size, (1, 14), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.tensor([[*range(10), *range(6, 10)]], device=device)
    row, column = torch.arange(14, device=device)[:, None], torch.arange(14, device=device)
    visible = (column <= row) & ((row < 10) | (column < 6) | (column >= 10))                    # (14, 14)
    try:
        model.eval()
        if window is not None:
            config.sliding_window = 4
        masks = attention_masks(model, visible[None], positions, positions)
        hidden = model.get_decoder()(input_ids=tokens, position_ids=positions, attention_mask=masks,
                                     use_cache=False).last_hidden_state                         # (1, 14, D)
        ours = output_logits(model, hidden)[0]                                                  # (14, V)
        branch = torch.cat([tokens[:, :6], tokens[:, 10:]], dim=1)
        plain = torch.cat([model(input_ids=tokens[:, :10]).logits[0], model(input_ids=branch).logits[0, 6:]])
    finally:
        if window is not None:
            config.sliding_window = window
        model.train(was_training)
    gap = (ours.float().log_softmax(-1) - plain.float().log_softmax(-1)).abs().mean().item()
    if not gap < (1e-3 if model.dtype == torch.float32 else 0.2):
        raise ValueError(f"log-probabilities are {gap:.2g} nats off")


def add_lora(model, rank):
    """Train low-rank additions to all linear layers instead of the weights themselves (Hu et al. 2021), through peft.

    The weights are frozen; with the additions switched off (`disable_adapter`) the model is the one it began as, so that
    the KL's reference costs no second copy.
    """
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"))


@functools.cache  # said once
def note_slow_bfloat16():
    """A line where a matrix product in bfloat16 takes much longer than in float32 on this processor; returns how many
    times as long, on one thread.

    Below 1 with AMX or AVX-512 BF16. With AVX2 alone, as on most laptops, torch has no fast path: 30 to 60 was measured.
    """
    threads, seconds = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b  # the first one also sets up
        tries = []
        for _ in range(3):  # on a busy machine one may have been interrupted
            clock = time.perf_counter()
            a @ b
            tries.append(time.perf_counter() - clock)
        seconds[dtype] = min(tries)
    torch.set_num_threads(threads)
    slower = seconds[torch.bfloat16] / seconds[torch.float32]
    if slower > 4:
        print(f"note: products in bfloat16 take {slower:.0f} times as long as in float32 on this processor (no AMX, no "
              "AVX-512 BF16): leave --precision bfloat16 out", file=sys.stderr, flush=True)
    return slower


def compute_in_bfloat16(model):
    """Matrix products in bfloat16, weights and their updates in float32: at a rate of 1e-6 bfloat16 would round most
    updates away. In place."""
    for part in (model.get_decoder(), model.get_output_embeddings()):
        device = next(part.parameters()).device.type
        part.forward = torch.autocast(device, dtype=torch.bfloat16)(part.forward)
    if device == "cpu":
        note_slow_bfloat16()


def trainable(folder, device="cpu", half=False, lora_rank=0, gradient_checkpointing=False, with_reference=True, seed=0,
              sharded=False):
    """(model to train, reference or None, tokenizer). sharded: both spread over all processes, see processes.py.

    half: compute in bfloat16. Frozen weights are then stored in it as well, trained ones are not. With LoRA the reference
    is the model itself: use it inside `reference.disable_adapter()`.
    """
    device = "cpu" if sharded else device  # whole it may not fit
    model, tokenizer = load_policy(folder, device, torch.bfloat16 if half and lora_rank else torch.float32)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reference = None
    if with_reference and not lora_rank:
        reference = load_policy(folder, device, torch.bfloat16 if half else torch.float32)[0].requires_grad_(False)
    torch.manual_seed(seed)
    if lora_rank:
        model = add_lora(model, lora_rank)
    for one in (model, reference):
        if one is not None and sharded:
            shard(one, half)
        elif one is not None and half:
            compute_in_bfloat16(one)
    return model, model if with_reference and lora_rank else reference, tokenizer


def plain_state_dict(model):
    """The weights as plain transformers knows them, LoRA's additions merged in. `model` itself is left as it is, since
    merging and unmerging in place would not give back the same bits. A sharded model: all processes must call it."""
    if not hasattr(model, "peft_config"):
        return whole(model.state_dict())
    base = model.get_base_model()
    state = {k.replace(".base_layer.", "."): v for k, v in base.state_dict().items() if ".lora_" not in k}
    for name, module in base.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            state[f"{name}.weight"] = (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
    return state


def sync(engine, model):
    """The engine samples from the model's present weights from now on. All processes must call it.

    Nothing to do where the engine holds the very model that is trained."""
    if getattr(engine, "model", None) is not model:
        engine.load(plain_state_dict(model))


def save_policy(folder, model, tokenizer, dtype=None, extras=None, state=None, **notes):
    """Write a Hugging Face folder atomically: a reader finds the old one or the new one, never half of it.

    extras: called with the unfinished folder, to write more into it. state: the weights, where they differ. Raises OSError, and then leaves no half folder.
    """
    partial = f"{folder.rstrip('/')}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        adapted = hasattr(model, "peft_config")
        state = {k: v.to(dtype or v.dtype) for k, v in (state or plain_state_dict(model)).items()}
        (model.get_base_model() if adapted else model).save_pretrained(partial, state_dict=state)
        if adapted:
            model.save_pretrained(os.path.join(partial, "adapter"))
        tokenizer.save_pretrained(partial)
        with open(os.path.join(partial, "notes.json"), "w") as file:
            json.dump(notes, file, indent=1)
        if extras:
            extras(partial)
    except BaseException as error:
        # torch and safetensors report a full disk in ways of their own: look before we make room again
        parent = os.path.dirname(os.path.abspath(folder))
        full = isinstance(error, Exception) and os.path.isdir(parent) and shutil.disk_usage(parent).free < 2**20
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(errno.ENOSPC, "No space left on device", folder) if full else error
    if os.path.isdir(folder):  # never a moment without one of the two
        os.replace(folder, folder.rstrip("/") + ".old")
    os.replace(partial, folder)
    shutil.rmtree(folder.rstrip("/") + ".old", ignore_errors=True)


def make_chat(tokenizer, env, folder):
    """(chat format, whether it is a tiny policy of ours).

    Ours know the short prompt (noted as "short"), and so do language models that were cold-started on it
    ("brief"); others need the instructions.
    """
    notes = notes_of(folder)
    short, tags = notes.get("prompt") in ("short", "brief"), bool(notes.get("tags"))
    chat = ChatFormat(tokenizer, system_prompt(env, short, tags), tags, generation_ends(folder))
    chat.corrections = tuple(notes.get("corrections", ()))  # a checkpoint's: it is played as it was trained
    return chat, notes.get("prompt") == "short"


def answer_tokens(tiny, tags):
    """How many tokens an answer may have where nobody says: a tagged one tells what is seen before it acts."""
    return (64 if tags else 24) if tiny else 512


def check_tags(folder):
    """Raises ValueError, one line, where the policy in `folder` was never taught RLVMR's tags."""
    if not notes_of(folder).get("tags"):
        raise ValueError(f"--credit rlvmr needs a policy that was taught tags, and {folder} was not: "
                         f"python cold_start.py --tags --sloppy 0.3 --init {folder} --out NEW, then --model NEW")


def generation_ends(folder):
    """The ids at which the model's makers end a generation: none to several (Llama 3 has three)."""
    from transformers import GenerationConfig
    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # no such file
        return []
    return ends if isinstance(ends, list) else [ends]


def notes_of(folder):
    """What was noted when the folder was saved: a dictionary, empty where nothing was."""
    try:
        with open(os.path.join(folder, "notes.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}

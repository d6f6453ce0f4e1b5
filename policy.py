"""The policy: the tiny one of ours, and loading and saving of any.

**The tiny policy** is an ordinary Hugging Face folder: Qwen2 architecture, untied embeddings, a tokenizer trained on the
texts of the games, a ChatML template. Every other file treats it exactly as it treats Qwen/Qwen2.5-1.5B-Instruct.
"""

import json
import math
import os
import shutil

import torch

from rollout import SYSTEM, SYSTEM_INSTRUCT, ChatFormat

SHIPPED = {"alfworld": "tiny", "scienceworld": "tiny-scienceworld"}  # policies in the repository, of each environment
QUESTION = "good or bad?"  # the generative classifier's question, here so that the tokenizer has its words
VERDICTS = ("bad", "good")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<action>", "</action>", "<think>", "</think>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def train_tokenizer(texts, vocab_size=1024):
    """A byte-level BPE whose merges never leave a word, so that nearly every word of the games is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits stay apart ("cabinet 12" is three tokens); `assistant\n` may become one.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Za-z]+\n?| ?[0-9]| ?[^\sA-Za-z0-9]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL + TAGS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(tokenizer, hidden=128, layers=4, heads=4, feed_forward=384, positions=2048, seed=0):
    """A Qwen2 causal model of some 1 million parameters, randomly initialised.

    Embeddings are untied: an engine that reloads weights in place may keep a stale output layer where they are tied.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    size = 8 * math.ceil(len(tokenizer) / 8)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=size, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))


def load_policy(folder, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from any Hugging Face folder or hub name; one clear line where that is impossible."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    logging.disable_progress_bar()
    try:
        # AutoTokenizer reads model type qwen2 and puts Qwen2's way of splitting words in place of the one that the
        # folder was saved with; a folder that names the generic class means what its tokenizer.json says.
        generic = get_tokenizer_config(folder).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise FileNotFoundError(f"{folder} is not a checkpoint that transformers can load: {str(error).splitlines()[0]}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def save_policy(folder, model, tokenizer, dtype=None, **notes):
    """Write a Hugging Face folder atomically: a reader finds the old one or the new one, never half of it."""
    partial = f"{folder.rstrip('/')}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    state = {k: v.to(dtype or v.dtype) for k, v in model.state_dict().items()}
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    if notes:
        with open(os.path.join(partial, "notes.json"), "w") as file:
            json.dump(notes, file, indent=1)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def make_chat(tokenizer, env, folder):
    """(chat format, whether it is a tiny policy of ours). Ours knows the short prompt; others need the instructions."""
    tiny = notes_of(folder).get("prompt") == "short"
    return ChatFormat(tokenizer, (SYSTEM if tiny else SYSTEM_INSTRUCT)[env]), tiny


def notes_of(folder):
    """What was noted when the folder was saved: a dictionary, empty where nothing was."""
    try:
        with open(os.path.join(folder, "notes.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}

"""The tiny policy and its supervised cold start on expert episodes.

    # the policy in the repository: first to see, then to act like a careless expert (27% of valid_unseen)
    python cold_start.py --out policies/first --episodes 24000 --epochs 3 --stop-step 750
    python cold_start.py --out policies/tiny --init policies/first --sloppy 0.5 --episodes 7000 --epochs 2 --lr 1.5e-3 --seed 1
    python cold_start.py --out policies/official --games official --init policies/tiny --episodes 1000 --lr 5e-4

**The policy** is an ordinary Hugging Face folder: Qwen2 architecture, untied embeddings, a tokenizer trained on the
texts of the games, a ChatML template. Every other file treats it exactly as it treats Qwen/Qwen2.5-1.5B-Instruct.

**The cold start** imitates a search expert: cross-entropy on the expert's answers, and with a small weight on the
observations as well, since predicting what the world answers teaches a model from scratch to copy names, which
choosing an action needs (`--lm-coef 0` gives plain supervised fine-tuning, as in the paper).
"""

import argparse
import json
import math
import os
import random
import shutil
import time

import torch
from torch.nn import functional as F
from tqdm import tqdm

import envs
from env_pool import EnvPool
from expert import FITS, search_expert, things
from rollout import NO_ACTION, SYSTEM, ChatFormat, Episode, Step

QUESTION = "good or bad?"  # the generative classifier's question, here so that the tokenizer has its words
VERDICTS = ("bad", "good")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<action>", "</action>", "<think>", "</think>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ----------------------------------------------------------------------------------------------------- the tiny policy

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


def tokenizer_texts(games, pool):
    """What the policy will read and write: the expert's episodes, and every name ALFWorld has."""
    names = sorted(set(FITS) | {o for objects in FITS.values() for o in objects} | {"desklamp", "floorlamp"})
    texts = [f" {name}" for name in names] * 20 + ["system\n", "user\n", "assistant\n"] * 1000
    texts += [SYSTEM["alfworld"], NO_ACTION, QUESTION, "Nothing happens.", *VERDICTS] * 20
    texts += ["You have closed the. You turn off. There's nothing special about. This is a clean cool hot cold. look "
              "inventory examine close You are carrying: You are not carrying anything. You are facing the"] * 20
    for _, turns, _ in play_expert(games, pool):
        for observation, command, *_ in turns:
            texts += [observation, command]
    return texts


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


# ------------------------------------------------------------------------------------------------------ expert episodes

def slip(rng, receptacles, last, before, want, here):
    """What a careless player does before the right command: a list of commands that change nothing for good."""
    kind = rng.choice(["made up", "idle", "again", "wander"])
    if kind == "again" and last:
        return [last]
    if kind == "wander" and here:
        elsewhere = [r for r in receptacles if r != here and not want.endswith(r)]
        if elsewhere:
            return [f"go to {rng.choice(elsewhere)}", f"go to {here}"]
    if kind == "made up":
        thing = rng.choice(things(before.text) or ["book 1"])
        place = rng.choice(receptacles)
        command = rng.choice([f"take {thing} from {place}", f"open {place}", f"move {thing} to {place}", f"go to {here}"])
        if command not in before.admissible:
            return [command]
    return [rng.choice(["look", "inventory"])]


def play_expert(games, pool, max_steps=50, batch=64, sloppy=0.0, seed=0):
    """Yields (game, turns, won) per game; turns are (observation, command, before, after).

    sloppy: chance of a `slip` before each of the expert's commands. The expert is not told of them.
    """
    rng = random.Random(seed)
    for begin in range(0, len(games), batch):
        chunk = [games[i] for i in range(begin, min(begin + batch, len(games)))]
        first = pool.reset(chunk)
        now = {s: o for s, o in enumerate(first) if not isinstance(o, Exception)}
        experts, turns, queue, here = {}, {s: [] for s in now}, {}, {}

        def plan(slot, want):
            """The expert's next command, and perhaps a slip before it."""
            place = here.get(slot)
            last = turns[slot][-1][1] if turns[slot] else None
            slips = slip(rng, things(first[slot].text), last, now[slot], want, place) if rng.random() < sloppy else []
            queue[slot] = slips + [want]

        for slot, observation in now.items():
            try:
                experts[slot] = search_expert(observation.text)
                plan(slot, next(experts[slot]))
            except (ValueError, StopIteration):  # a task it does not know, nothing it can do
                continue
        while queue:
            asked = {slot: commands.pop(0) for slot, commands in queue.items()}
            for (slot, command), after in zip(asked.items(), pool.step(list(asked.items()))):
                turns[slot].append((now[slot].text, command, now[slot], after))
                now[slot] = after
                if after.done or len(turns[slot]) >= max_steps:
                    del queue[slot]
                elif not queue[slot]:  # the expert's own command: it sees what came of it
                    if command.startswith("go to "):
                        here[slot] = command.removeprefix("go to ")
                    try:
                        plan(slot, experts[slot].send(after.text))
                    except StopIteration:
                        del queue[slot]
        for slot, observation in now.items():
            yield chunk[slot], turns[slot], observation.won


def expert_episodes(games, pool, chat, max_steps=20, progress=True, sloppy=0.0, seed=0):
    """The expert's won episodes as `Episode`s: what the expert said counts as sampled, so losses apply as in RL."""
    remembered = {}

    def ids(text, make):
        if (text, make) not in remembered:
            remembered[text, make] = make(text)
        return remembered[text, make]

    def answer(command):
        return chat.tokenizer.encode(f"<action>{command}</action>", add_special_tokens=False) + [chat.eos]

    episodes = []
    games_played = play_expert(games, pool, max_steps, sloppy=sloppy, seed=seed)
    for game, turns, won in tqdm(games_played, total=len(games), desc="expert episodes", disable=not progress):
        if not won:
            continue
        episode = Episode(game, len(episodes), won=True, reward=1.0)
        for i, (observation, command, *_) in enumerate(turns):
            episode.give(chat.first_prompt(observation) if i == 0 else ids(observation, chat.next_prompt))
            start, new = len(episode.tokens), ids(command, answer)
            episode.sample(new, [0.0] * len(new))
            episode.steps.append(Step(start, start + len(new), command))
        episodes.append(episode)
    return episodes


# ------------------------------------------------------------------------------------------------- supervised training

def cold_start(model, episodes, epochs=1, batch=64, lr=2e-3, lm_coef=0.1, seed=0, progress=True, stop=None):
    """Supervised training in place: cross-entropy on the expert's tokens + lm_coef * cross-entropy on the others.

    Both are means over their own tokens of a batch. Learning rate: linear warm-up, then cosine to a tenth.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    shuffle = torch.Generator().manual_seed(seed)
    total, warmup, done = epochs * (len(episodes) // batch), 100, 0
    bar = tqdm(total=total, desc="cold start", disable=not progress)
    for _ in range(epochs):
        # Shuffle, then sort by length inside pools of 16 batches: little padding, and still random batches.
        order = torch.randperm(len(episodes), generator=shuffle).tolist()
        pools = [sorted(order[i:i + 16 * batch], key=lambda j: len(episodes[j].tokens)) for i in range(0, len(order), 16 * batch)]
        batches = [p[i:i + batch] for p in pools for i in range(0, len(p) - batch + 1, batch)]
        for k in torch.randperm(len(batches), generator=shuffle).tolist():
            chosen = [episodes[j] for j in batches[k]]
            width = max(len(e.tokens) for e in chosen)
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)                                  # (B, T)
            weight = torch.zeros(len(chosen), width, dtype=torch.long)                                  # 0 pad 1 given 2 expert
            for row, e in enumerate(chosen):
                tokens[row, :len(e.tokens)] = torch.tensor(e.tokens)
                weight[row, :len(e.tokens)] = torch.tensor(e.sampled).long() + 1
            # Right padding needs no mask: under causal attention no real token sees what comes after it.
            logits = model(input_ids=tokens).logits[:, :-1].float()                                     # (B, T-1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")     # (B * (T-1),)
            kind = weight[:, 1:].flatten()
            expert_loss, given_loss = loss[kind == 2].mean(), loss[kind == 1].mean()
            rate = lr * min((done + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, done / max(1, total))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            (expert_loss + lm_coef * given_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            bar.update()
            bar.set_postfix(expert=f"{expert_loss.item():.3f}", given=f"{given_loss.item():.3f}")
            if done == stop:
                bar.close()
                return model
    bar.close()
    return model


def make_cold_start(args, games, pool):
    """The folder of the tiny policy that train.py's --cold-start asks for.

    Generated games: the policy that comes with the repository. Official games are longer and have thirty receptacles:
    that policy, trained on with official expert episodes. What is trained here is cached and found by the next run.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    shipped = os.path.join(here, "policies", "tiny")
    if args.cold_start == "auto" and args.games == "generated" and os.path.isdir(shipped):
        return os.path.relpath(shipped)
    count = 0 if args.cold_start == "none" else args.cold_start_episodes
    folder = os.path.join(here, "policies", f"cache-{args.games}-{count}-seed{args.seed}")
    if os.path.isdir(folder):
        return os.path.relpath(folder)
    chosen = envs.sample_games(games, count or 400, args.seed)
    if count and args.games == "official" and os.path.isdir(shipped):
        (model, tokenizer), lr = load_policy(shipped), 1e-3
    else:
        tokenizer, lr = train_tokenizer(tokenizer_texts(chosen[:400], pool)), 2e-3
        model = tiny_model(tokenizer, seed=args.seed)
    if count:
        episodes = expert_episodes(chosen, pool, ChatFormat(tokenizer, SYSTEM[args.env]), args.max_steps)
        cold_start(model, episodes, epochs=4, batch=32, lr=lr, seed=args.seed)
    save_policy(folder, model, tokenizer, prompt="short", cold_start_episodes=count)
    return os.path.relpath(folder)


def main():
    parser = argparse.ArgumentParser(description="Supervised cold start of the tiny policy on expert episodes.")
    parser.add_argument("--out", default="policies/tiny", help="folder to write (a Hugging Face checkpoint)")
    parser.add_argument("--games", default="generated", choices=["auto", "official", "generated"])
    parser.add_argument("--episodes", type=int, default=3000, help="training games that the expert plays")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the episodes")
    parser.add_argument("--batch", type=int, default=32, help="episodes per update")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--lm-coef", type=float, default=0.1, help="weight of the loss on observation tokens")
    parser.add_argument("--max-steps", type=int, help="longer expert episodes are left out (default 20; 50 on official games)")
    parser.add_argument("--sloppy", type=float, default=0.0, help="chance of a careless action before each of the expert's")
    parser.add_argument("--stop-step", type=int, help="stop after so many updates, in the middle of the schedule: a policy "
                        "that leaves room to learn by reward")
    parser.add_argument("--init", help="start from this policy (its tokenizer too) instead of random weights")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="environment processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        args.games = envs.choose_games(args.games)
        games = envs.sample_games(envs.list_games("alfworld", "train", args.games), args.episodes, args.seed)
        model, tokenizer = load_policy(args.init) if args.init else (None, None)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    args.max_steps = args.max_steps or (20 if args.games == "generated" else 50)
    begin = time.time()
    with EnvPool(args.workers) as pool:
        tokenizer = tokenizer or train_tokenizer(tokenizer_texts(games[:400], pool))
        episodes = expert_episodes(games, pool, ChatFormat(tokenizer, SYSTEM["alfworld"]), args.max_steps,
                                   sloppy=args.sloppy, seed=args.seed)
    model = model or tiny_model(tokenizer, seed=args.seed)
    print(f"{len(episodes)} of {len(games)} games won by the expert in {time.time() - begin:.0f} s; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    cold_start(model, episodes, args.epochs, args.batch, args.lr, args.lm_coef, args.seed, stop=args.stop_step)
    # float16 halves the file; the policy is loaded in float32 and its weights are exact in both.
    save_policy(args.out, model, tokenizer, torch.float16, prompt="short", cold_start=vars(args),
                minutes=round((time.time() - begin) / 60, 1))
    print(f"saved {args.out} after {(time.time() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

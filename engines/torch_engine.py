"""Sampling by PyTorch: any transformers model, on any device; what is common to a group is computed once.

The layers are the model's own, as transformers has them. Under them lies engines/conversations.py, put in
place through transformers' public interface for attention functions while this engine computes, and for no
longer: the very same model is trained in between.
"""

import contextlib

import torch
from transformers import AttentionInterface

from actor import output_logits
from engines.conversations import Conversations


class TorchEngine:
    """Samples answers for many conversations at once; keys and values live on from turn to turn.

    The interface of every engine (the other one: vllm_engine.py): `start(seed)`; `submit(row, tokens)` a
    conversation as ids; `poll()` for those that have ended their turn, as (row, new ids, their
    log-probabilities). This one answers all that were submitted at once. All conversations begin together;
    those no longer submitted are forgotten.
    """

    def __init__(self, model, ends, temperature=1.0, *, max_new_tokens):
        """ends: the token id that ends a turn, or several such ids. Raises ValueError for a model whose
        attention cannot be replaced: at once, not after an hour of games."""
        self.model, self.ends = model, [ends] if isinstance(ends, int) else sorted(ends)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.trunk = model.get_decoder()
        self.device = next(model.parameters()).device
        # At a time: scores of a head, which should stay in a processor's cache; tokens.
        self.max_scores, self.max_tokens = (2**16, 2**12) if self.device.type == "cpu" else (2**22, 2**14)
        try:
            self._check()
        except Exception as error:  # who knows what an unknown model raises
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{type(model).__name__} cannot be sampled from by the PyTorch engine, its "
                             f"attention cannot be replaced ({why}); use --engine vllm") from error

    def _check(self):
        """Raise unless two conversations of two turns have the log-probabilities of a plain pass."""
        generator, wanted, gaps = torch.Generator().manual_seed(0), self.max_new_tokens, []
        size = self.model.config.get_text_config().vocab_size
        some = lambda n: torch.randint(size, (n,), generator=generator).tolist()
        talks, self.max_new_tokens = [some(5), some(3)], 2
        self.start(0)
        for _ in range(2):
            for b, (ids, logprobs) in enumerate(self.generate([0, 1], talks)):
                whole, at = talks[b] + ids, len(talks[b])
                with torch.no_grad():
                    logits = self.model(input_ids=torch.tensor([whole], device=self.device)).logits[0].float()
                plain = torch.log_softmax(logits / (self.temperature or 1.0), -1)               # (T, V)
                gaps += [abs(plain[at + i - 1, token].item() - logprobs[i]) for i, token in enumerate(ids)]
                talks[b] = whole + some(2 + b)
        self.max_new_tokens = wanted
        if not sum(gaps) / len(gaps) < 0.1:  # bfloat16 stays well below
            raise ValueError(f"log-probabilities are {sum(gaps) / len(gaps):.2g} nats off")

    def start(self, seed):
        """Forget all conversations. `seed` makes the sampling repeat."""
        self.cache, self.rows, self.submitted = None, [], {}
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def load(self, weights):
        """Sample from these weights from now on: a state dictionary as plain transformers names it."""
        self.model.load_state_dict(weights)

    def submit(self, row, tokens):
        self.submitted[row] = tokens

    def poll(self):
        asked, self.submitted = dict(sorted(self.submitted.items())), {}
        answers = self.generate(list(asked), list(asked.values()))
        return [(row, *answer) for row, answer in zip(asked, answers)]

    @torch.inference_mode()
    def generate(self, rows, sequences):
        """Continue conversations until each has ended its turn.

        Args:
            rows: names of the conversations (the same name means the same conversation, longer by now).
            sequences: their full token ids so far.
        Returns: a list of (new ids, log-probabilities under the sampling distribution), in `rows`' order.
        """
        self.model.eval()
        asked = dict(zip(rows, sequences))
        with self._own_attention():
            hidden = self._begin(asked) if self.cache is None else self._go_on(asked)           # (R, D)
            return self._answer(hidden, rows)

    @contextlib.contextmanager
    def _own_attention(self):
        """The model attends as `Conversations` says, for now."""
        usual = self.trunk.config._attn_implementation
        # SDPA has no soft cap: a model that runs by it does without, as it does in training.
        softcap = {} if usual == "eager" else {"softcap": None}
        AttentionInterface.register("conversations", lambda *inputs, **options: self.cache.attend(
            *inputs, **{**options, **softcap}))
        self.trunk.set_attn_implementation("conversations")
        try:
            yield
        finally:
            self.trunk.set_attn_implementation(usual)

    def _begin(self, asked):
        """Read the first prompts, each once: hidden states (R, D) at their ends."""
        prompts = {}  # prompt -> its number; a group's conversations begin alike
        group = [prompts.setdefault(tuple(ids), len(prompts)) for ids in asked.values()]
        self.rows, self.cache = list(asked), Conversations(group, self.device, self.max_scores)
        return self._read(self.cache.prompts, [list(ids) for ids in prompts])[self.cache.group]

    def _go_on(self, asked):
        """Forget who is not asked, read what the others have not seen: hidden states (R, D) at their ends."""
        if not asked.keys() <= set(self.rows):
            raise ValueError("a conversation that did not begin with the others: call start first")
        if len(asked) < len(self.rows):
            self._to_front([row in asked for row in self.rows])
            self.rows = self.rows[:len(asked)]
            self.cache.drop(len(asked))
        known = zip(self.rows, self.cache.lengths())
        return self._read(self.cache.tails, [asked[row][n:] for row, n in known])

    def _to_front(self, keep):
        order = self.cache.to_front(keep)
        self.rows = [self.rows[i] for i in order]
        return order

    def _read(self, store, texts):
        """Add `texts` (R lists of ids) to the rows of a store, some rows at a time; hidden states (R, D) at
        their ends."""
        found, begin = [], 0
        while begin < len(texts):
            end = begin + 1
            while end < len(texts) and sum(map(len, texts[begin:end + 1])) <= self.max_tokens:
                end += 1
            counts = [len(ids) for ids in texts[begin:end]]
            hidden = self._pass(store, begin, counts, sum(texts[begin:end], []))
            counts = torch.tensor(counts, device=self.device)
            self.cache.finish(counts)
            found.append(hidden[counts.cumsum(0) - 1])
            begin = end
        return torch.cat(found)

    def _pass(self, store, first, counts, tokens):
        """Hidden states (N, D) of `tokens` (N ids), counts[i] of them for row first + i."""
        positions = self.cache.prepare(store, first, counts)                                    # (1, N)
        tokens = torch.as_tensor(tokens, device=self.device)[None]                              # (1, N)
        return self.trunk(input_ids=tokens, position_ids=positions, past_key_values=self.cache,
                          use_cache=True).last_hidden_state[0]

    def _answer(self, hidden, rows):
        """Sample from hidden states (R, D) on until every conversation has ended its turn."""
        ids, logprobs = {row: [] for row in rows}, {row: [] for row in rows}
        running = [True] * len(rows)
        for i in range(self.max_new_tokens):
            token, logprob = self._choose(output_logits(self.model, hidden).float())            # (n,), (n,)
            for b, (t, l) in enumerate(zip(token.tolist(), logprob.tolist())):
                if running[b]:
                    ids[self.rows[b]].append(t)
                    logprobs[self.rows[b]].append(l)
                    running[b] = t not in self.ends
            left = sum(running)
            if not left or i == self.max_new_tokens - 1:
                break
            if 2 * left <= len(running):  # rows that have ended ride along until they are the greater part
                order = self._to_front(running + [False] * (len(self.rows) - len(running)))[:left]
                token, running = token[order], [True] * left
            n = len(running)
            hidden = self._pass(self.cache.tails, 0, [1] * n, token)
            self.cache.finish(torch.tensor(running, device=self.device))  # who rides along writes beyond
        return [(ids[row], logprobs[row]) for row in rows]

    def _choose(self, logits):
        """Sample from softmax(logits / temperature), or at temperature 0 take the largest, scored at 1;
        (n, V) -> tokens (n,), log-probabilities (n,)."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            token = logprobs.argmax(dim=-1)
        else:  # the first whose cumulative probability exceeds a uniform number; double: large vocabularies
            cumulative = logprobs.double().exp().cumsum(-1)
            uniform = torch.rand(len(logits), 1, dtype=torch.double, device=self.device,
                                 generator=self.generator)
            token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        return token, logprobs.gather(1, token[:, None])[:, 0]

"""Sampling by PyTorch: any transformers model, on any device, with a KV cache that lives on from turn to turn."""

import torch

from actor import attention_masks, output_logits


class RaggedCache:
    """Keys and values of rows with different lengths, each row filled from the left without gaps.

    Stands where transformers expects its `Cache`: each layer calls `update`. What lies right of a row's length is
    rubbish from padding; the attention mask never lets it be seen, and the row's next tokens overwrite it.
    """

    def __init__(self, size):
        self.layers = {}  # layer -> [keys, values], each (B, heads, capacity, head_dim): attention reads it in order
        self.size = size  # B
        self.rows = None  # (b,) the rows that take part in the current forward pass; None: all
        self.at = None    # (b, q) where the current forward pass writes
        self.limit = 0    # columns that the current forward pass reads

    def update(self, keys, values, layer, *_, **__):  # each (b, heads, q, head_dim)
        rows = torch.arange(self.size, device=keys.device) if self.rows is None else self.rows
        stored = self.layers.setdefault(layer, [None, None])
        for i, new in enumerate((keys, values)):
            if stored[i] is None or stored[i].shape[2] < self.limit:
                grown = new.new_zeros(self.size, new.shape[1], 2 * self.limit, new.shape[3])
                if stored[i] is not None:
                    grown[:, :, :stored[i].shape[2]] = stored[i]
                stored[i] = grown
            stored[i][rows[:, None], :, self.at] = new.transpose(1, 2)  # indexing puts (b, q) first: (b, q, heads, head_dim)
        part = slice(None) if self.rows is None else rows
        return stored[0][part, :, :self.limit], stored[1][part, :, :self.limit]

    def keep(self, rows):
        self.size = len(rows)
        for stored in self.layers.values():
            stored[0], stored[1] = stored[0][rows], stored[1][rows]

    def get_seq_length(self, *_):
        return 0  # positions are always passed explicitly


class TorchEngine:
    """Samples answers for many conversations at once; the KV cache lives on from turn to turn.

    The interface of every engine (the other one: vllm_engine.py): `start(seed)`; `submit(row, tokens)` a conversation as
    ids; `poll()` for those that have ended their turn, as (row, new ids, their log-probabilities). This one answers all
    that were submitted at once. Rows that no longer take part are dropped from the cache: finished episodes cost nothing.
    """

    def __init__(self, model, ends, temperature=1.0, max_new_tokens=24):
        """ends: the token id that ends a turn, or several such ids. Raises ValueError for a model that the cache does not
        suit: at once, not after an hour of games."""
        self.model, self.ends = model, {ends} if isinstance(ends, int) else set(ends)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.trunk = model.get_decoder()
        self.device = next(model.parameters()).device
        try:
            self._check()
        except Exception as error:  # an unknown use of the cache raises anything
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{type(model).__name__} cannot be sampled from by the PyTorch engine, whose cache it uses in a "
                             f"way of its own ({why}); use --engine vllm") from error

    def _check(self):
        """Raise unless two conversations of two turns have the log-probabilities of the model's plain forward pass."""
        generator, wanted, gaps = torch.Generator().manual_seed(0), self.max_new_tokens, []
        some = lambda n: torch.randint(self.model.config.get_text_config().vocab_size, (n,), generator=generator).tolist()
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
            raise ValueError(f"its log-probabilities are {sum(gaps) / len(gaps):.2g} nats off")

    def start(self, seed):
        """Forget all conversations. `seed` makes the sampling repeat."""
        self.cache, self.rows, self.lengths, self.submitted = None, None, None, {}
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def load(self, weights):
        """Sample from these weights from now on: a state dictionary as plain transformers names it."""
        self.model.load_state_dict(weights)

    def submit(self, row, tokens):
        self.submitted[row] = tokens

    def poll(self):
        asked, self.submitted = dict(sorted(self.submitted.items())), {}
        return [(row, *answer) for row, answer in zip(asked, self.generate(list(asked), list(asked.values())))]

    @torch.inference_mode()
    def generate(self, rows, sequences):
        """Continue conversations until each has ended its turn.

        Args:
            rows: names of the conversations (the same number means the same conversation, longer by now).
            sequences: their full token ids so far.
        Returns: a list of (new ids, log-probabilities under the sampling distribution), in the order of `rows`.
        """
        self.model.eval()
        if self.rows is None:
            self.rows, self.lengths = list(rows), torch.zeros(len(rows), dtype=torch.long, device=self.device)
            self.cache = RaggedCache(len(rows))
        elif self.rows != list(rows):  # some have finished
            place = {row: i for i, row in enumerate(self.rows)}
            index = torch.tensor([place[row] for row in rows], device=self.device)
            self.cache.keep(index)
            self.rows, self.lengths = list(rows), self.lengths[index]

        known = self.lengths.tolist()
        chunks = [ids[n:] for ids, n in zip(sequences, known)]  # what the cache has not seen
        hidden = self._read(chunks)                                                             # (B, D)
        widths = torch.tensor([len(c) for c in chunks], device=self.device)
        self.lengths = self.lengths + widths

        ids, logprobs = [[] for _ in rows], [[] for _ in rows]
        running = [True] * len(rows)
        for i in range(self.max_new_tokens):
            token, logprob = self._choose(output_logits(self.model, hidden).float())            # (B,), (B,)
            for b, (t, l) in enumerate(zip(token.tolist(), logprob.tolist())):
                if running[b]:
                    ids[b].append(t)
                    logprobs[b].append(l)
                    running[b] = t not in self.ends
            if not any(running) or i == self.max_new_tokens - 1:
                break
            # Rows whose turn has ended ride along: what they write lies beyond their length.
            hidden = self._forward(token[:, None])[:, 0]
            self.lengths = self.lengths + torch.tensor(running, device=self.device)
        return list(zip(ids, logprobs))

    def _read(self, chunks, padded_tokens=4096):
        """Hidden states (B, D) at the end of each row's new ids. Rows of similar length go together: little padding, and
        attention scores small enough for a processor's cache."""
        order, parts, found = sorted(range(len(chunks)), key=lambda b: len(chunks[b])), [[]], [None] * len(chunks)
        for b in order:
            if parts[-1] and (len(parts[-1]) + 1) * len(chunks[b]) > padded_tokens:
                parts.append([])
            parts[-1].append(b)
        for part in parts:
            width = len(chunks[part[-1]])
            batch = torch.tensor([chunks[b] + [0] * (width - len(chunks[b])) for b in part], device=self.device)  # (b, q)
            hidden = self._forward(batch, torch.tensor(part, device=self.device))                                 # (b, q, D)
            for i, b in enumerate(part):
                found[b] = hidden[i, len(chunks[b]) - 1]
        return torch.stack(found)

    def _forward(self, batch, rows=None):
        """Hidden states (b, q, D) of the next q tokens of these rows; row b's tokens start at position lengths[b]."""
        lengths = self.lengths if rows is None else self.lengths[rows]
        positions = lengths[:, None] + torch.arange(batch.shape[1], device=self.device)        # (b, q)
        self.cache.rows, self.cache.at, self.cache.limit = rows, positions, int(positions.max()) + 1
        columns = torch.arange(self.cache.limit, device=self.device)
        visible = columns <= positions[:, :, None]                                             # (b, q, limit)
        masks = attention_masks(self.model, visible, positions, columns.expand(len(batch), -1))
        return self.trunk(input_ids=batch, position_ids=positions, attention_mask=masks, past_key_values=self.cache,
                          use_cache=True).last_hidden_state

    def _choose(self, logits):
        """Sample from softmax(logits / temperature), or take the largest at temperature 0; (B, V) -> (B,), (B,)."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            token = logprobs.argmax(dim=-1)
        else:
            token = torch.multinomial(logprobs.exp(), 1, generator=self.generator)[:, 0]
        return token, logprobs.gather(1, token[:, None])[:, 0]

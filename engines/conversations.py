"""Keys and values of many conversations, and attention over them: what lies under a model's own layers.

    game A   prompt -----+---- answer, observation, answer, ...        conversation 0
                         +---- answer, observation, ...                conversation 1
    game B   prompt -----+---- ...                                     conversation 2

The prompt that a group's conversations share is computed and kept once; what each has of its own is its
*tail*. A pass takes the new tokens of all conversations laid end to end, one row without padding, through
transformers' own layers; only attention must know which token belongs to whom, and it is here. It attends to
prompt and tail apart: all queries of a group meet their prompt in one matrix product (a processor would
spend its time reading the same keys again and again), and the two parts are put together by their normalisers
(as in Dao et al. 2022, FlashAttention):

    softmax over both = w * softmax over the prompt + (1 - w) * softmax over the tail
    w = Z_prompt / (Z_prompt + Z_tail)

Tails are attended to in blocks of neighbours with equally many new tokens: all at once where each has one
(while an answer is written), nearly one by one where observations are read. So nothing is padded, and a
block's scores stay in a processor's cache. Storage grows by half and is never copied otherwise: rows that
take part stay in front by exchanging places.
"""

import functools

import torch

UNSEEN = torch.finfo(torch.float32).min


class Store:
    """Keys and values of rows of different lengths, each filled from the left without gaps.

    What lies right of a row's length is rubbish; attention never looks there, and new tokens overwrite it.
    """

    def __init__(self, rows, device):
        self.rows = rows                                                      # R, those in use: the first
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)     # (R,)
        self.layers = {}  # layer -> [keys, values], each (R, key-value heads, capacity, head_dim)

    def write(self, layer, rows, places, new, needed):
        """Keep keys and values, `new`: each (N, heads, head_dim), of tokens at `places` (N,) of `rows` (N,).

        needed: how many columns there must be.
        """
        stored = self.layers.setdefault(layer, [None, None])
        for i, one in enumerate(new):
            if stored[i] is None or stored[i].shape[2] < needed:
                known = 0 if stored[i] is None else stored[i].shape[2]
                room = max(256, needed * 3 // 2)
                grown = one.new_empty(len(self.lengths), one.shape[1], room, one.shape[2])
                if known:
                    grown[:, :, :known] = stored[i]
                grown[:, :, known:] = 0  # rubbish that is not a number would go through a weight of zero
                stored[i] = grown
            stored[i][rows, :, places] = one

    def to_front(self, keep):
        """Put the rows that `keep` (R,) names first, exchanging as few as possible. Returns the new order."""
        count, order = sum(keep), list(range(self.rows))
        holes = [i for i in range(count) if not keep[i]]
        others = [i for i in range(count, self.rows) if keep[i]]
        for i, j in zip(holes, others):
            order[i], order[j] = j, i
        if holes:
            filled = int(self.lengths[:self.rows].max())
            for stored in self.layers.values():
                for tensor in stored:
                    moved = tensor[holes, :, :filled]
                    tensor[holes, :, :filled] = tensor[others, :, :filled]
                    tensor[others, :, :filled] = moved
            self.lengths[:self.rows] = self.lengths[order]
        return order


class Conversations:
    """Stands where transformers expects its `Cache` (`update`), and is the attention (`attend`) of a pass.

    R conversations in G groups. Only the first `tails.rows` conversations and `prompts.rows` groups are live.
    """

    def __init__(self, group, device, max_scores=2**16):
        """group: R ints, which prompt each conversation begins with. max_scores: of one head, at a time."""
        self.group, self.max_scores = torch.tensor(group, device=device), max_scores                  # (R,)
        self.prompts, self.tails = Store(max(group) + 1, device), Store(len(group), device)

    def lengths(self):
        """R ints: how many tokens of each live conversation are known."""
        live = self.tails.rows
        return (self.prompts.lengths[self.group[:live]] + self.tails.lengths[:live]).tolist()

    def to_front(self, keep):
        """Live conversations that `keep` names first; returns the new order. Nothing is forgotten: `drop`."""
        order = self.tails.to_front(keep)
        self.group[:self.tails.rows] = self.group[order]
        return order

    def drop(self, count):
        """Keep the first `count` conversations only, and the prompts that they need."""
        self.tails.rows = count
        needed = torch.zeros(self.prompts.rows, dtype=torch.bool, device=self.group.device)
        needed[self.group[:count]] = True
        order = self.prompts.to_front(needed.tolist())
        place = torch.empty(len(order), dtype=torch.long, device=self.group.device)
        place[order] = torch.arange(len(order), device=self.group.device)
        self.group[:count] = place[self.group[:count]]
        self.prompts.rows = int(needed.sum())

    # ------------------------------------------------------------------------------------------------ a pass

    def prepare(self, store, first, counts):
        """The next pass adds counts[i] tokens to row first + i of `store`: self.prompts or self.tails.

        counts: n ints, all at least 1. Returns (1, N) the tokens' positions in their conversations.
        """
        device, n, total = self.group.device, len(counts), sum(counts)
        self.store, self.first, self.masks, most = store, first, {}, self.max_scores
        count, before = torch.tensor(counts, device=device), store.lengths[first:first + n]       # (n,), (n,)
        row = torch.arange(n, device=device).repeat_interleave(count, output_size=total)              # (N,)
        within = torch.arange(total, device=device) - (count.cumsum(0) - count)[row]                  # (N,)
        self.row, self.place = first + row, before[row] + within                                  # (N,), (N,)
        after = (before + count).tolist()
        self.limit = max(after)
        # Blocks: (first row, rows, new tokens of each, number of the first such token, columns seen).
        self.blocks, i, token = [], 0, 0
        while i < n:
            q, j, limit = counts[i], i + 1, after[i]
            while j < n and counts[j] == q and (j + 1 - i) * q * max(limit, after[j]) <= most:
                limit, j = max(limit, after[j]), j + 1
            step = q if j > i + 1 else max(1, most // limit)  # a long text goes in pieces
            for k in range(0, q, step):
                self.blocks.append((first + i, j - i, min(step, q - k), token + k, limit))
            i, token = j, token + (j - i) * q
        if store is self.prompts:
            return self.place[None]
        self._grid(self.group[self.row])
        self.position = self.place + self.prompts.lengths[self.group[self.row]]                       # (N,)
        return self.position[None]

    def _grid(self, group):
        """Lay tokens of the groups `group` (N,) on a grid (G, m), a row for each prompt in use."""
        used, member = group.unique(return_inverse=True)
        self.used = used
        if 2 * len(used) > self.prompts.rows:  # most of them: take all, without a copy
            used, member = torch.arange(self.prompts.rows, device=group.device), group
            self.used = slice(0, self.prompts.rows)
        size = torch.bincount(member, minlength=len(used))                                            # (G,)
        order, m = member.argsort(stable=True), int(size.max())
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(group), device=group.device) - (size.cumsum(0) - size)[member[order]]
        self.cell = member * m + rank                                            # (N,) where each token is on
        self.grid = torch.zeros(len(used) * m, dtype=torch.long, device=group.device)
        self.grid[self.cell] = torch.arange(len(group), device=group.device)   # (G * m,) which token is where
        self.prompt_length = self.prompts.lengths[used]                                               # (G,)
        self.prompt_limit = int(self.prompt_length.max())

    def finish(self, counts):
        """After the pass: its tokens are known. counts: (n,), those to be kept (riding along: 0)."""
        self.store.lengths[self.first:self.first + len(counts)] += counts

    def update(self, keys, values, layer, *_, **__):
        """transformers' cache interface: keep the pass's keys and values, each (1, heads, N, head_dim)."""
        self.layer = layer
        new = [x[0].transpose(0, 1) for x in (keys, values)]                            # (N, heads, head_dim)
        self.store.write(layer, self.row, self.place, new, self.limit)
        return keys, values

    def get_seq_length(self, *_):
        return 0  # positions are always passed explicitly

    def _window(self, window):
        """Additive masks under this sliding window: of each block (n, 1, 1, q, T), and of the prompts
        (G, 1, 1, m or 1, P). A token sees itself and what came before it."""
        own = []
        for _, n, q, token, limit in self.blocks:
            at = self.place[token:token + n * q].view(n, q, 1)
            columns = torch.arange(limit, device=at.device)
            seen = columns <= at if window is None else (columns <= at) & (columns > at - window)
            own.append(torch.where(seen, 0.0, UNSEEN)[:, None, None])
        if self.store is self.prompts:
            return own, None
        columns = torch.arange(self.prompt_limit, device=self.row.device)
        seen = (columns < self.prompt_length[:, None])[:, None]                                    # (G, 1, P)
        if window is not None:
            near = columns > self.position[self.grid][:, None] - window                           # (G * m, P)
            seen = seen & near.view(len(seen), -1, near.shape[1])                                  # (G, m, P)
        return own, torch.where(seen, 0.0, UNSEEN)[:, None, None]

    def attend(self, module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None,
               s_aux=None, **_):
        """transformers' attention interface: query (1, H, N, d) -> (1, N, H, d_v) and None for the weights.

        softcap: scores are squashed into (-softcap, softcap), Gemma 2. s_aux: (H,) a score of each head that
        takes its share of the weight and gives nothing, gpt-oss.
        """
        if sliding_window not in self.masks:
            self.masks[sliding_window] = self._window(sliding_window)
        own_masks, prompt_mask = self.masks[sliding_window]
        part = functools.partial(attend_to, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                                 softcap=softcap)
        keys, values = self.store.layers[self.layer]
        asked = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))                # (N, kv, rep, d)
        parts = []
        for (row, n, q, token, limit), mask in zip(self.blocks, own_masks):
            some = asked[token:token + n * q].unflatten(0, (n, q))                   # (n, q, kv, rep, d)
            some = some.permute(0, 2, 3, 1, 4)                                       # (n, kv, rep, q, d)
            found = part(some, keys[row:row + n, :, :limit], values[row:row + n, :, :limit], mask)
            parts.append([x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in found])        # (n * q, kv, rep, .)
        means, log_z = (torch.cat(x) for x in zip(*parts))                # (N, kv, rep, d_v), (N, kv, rep, 1)
        if prompt_mask is not None:
            keys, values = (x[self.used, :, :self.prompt_limit] for x in self.prompts.layers[self.layer])
            together = asked[self.grid].unflatten(0, (len(keys), -1))                     # (G, m, kv, rep, d)
            together = together.permute(0, 2, 3, 1, 4)                                    # (G, kv, rep, m, d)
            found = part(together, keys, values, prompt_mask)
            prompt_means, prompt_log_z = (x.permute(0, 3, 1, 2, 4).flatten(0, 1)[self.cell] for x in found)
            means = means.lerp_(prompt_means, torch.sigmoid(prompt_log_z - log_z))
            log_z = torch.logaddexp(log_z, prompt_log_z) if s_aux is not None else None
        if s_aux is not None:
            means = means * torch.sigmoid(log_z - s_aux.float().view(*means.shape[1:3], 1))
        return means.flatten(1, 2)[None].to(query.dtype), None


def attend_to(query, keys, values, mask, scaling, softcap):
    """Attention over some of the keys: query (b, kv, rep, q, d), keys (b, kv, k, d), values (b, kv, k, d_v).

    mask: added to the scores. Returns the means (b, kv, rep, q, d_v), log Z (b, kv, rep, q, 1), in float32.
    """
    shape = query.shape[:-1]
    scores = (query.flatten(2, -2) @ keys.transpose(2, 3)).float().mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(*shape, -1).add_(mask)
    largest = scores.amax(-1, keepdim=True)
    scores = scores.sub_(largest).exp_()
    total = scores.sum(-1, keepdim=True)
    means = (scores.to(values.dtype).flatten(2, -2) @ values).view(*shape, -1).float()
    return means.div_(total), largest.add_(total.log_())

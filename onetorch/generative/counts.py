"""What n-gram counts say of the next byte, for a network that is left to learn what they do not know.

The distribution is that of the count model (`ngram.py`: interpolated, modified Kneser-Ney), here over all 256 bytes at once and at every place of a batch:

    p_n(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p_{n-1}(w | h'),    p_0 = 1 / 256.

While a network is trained on the very text that was counted, the byte to be predicted is taken out of the counts (leaving one out, Ney, Essen & Kneser 1994):
c(h w) and c(h) are one less at the highest order, and at the order of n below it, where c is a number of different bytes before h w, if the n-gram and the byte
before it stand there alone in the text. Else the counts would know the answer, and the network would learn to believe them.

The text that was counted is a buffer of the module, so that it is in every checkpoint and model folder, under their hashes; its tables, about thirty times as
large, are made again from it, the same ones everywhere, in a tenth of a second for a million bytes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.generative.data import Text
from onetorch.generative.ngram import Codes, CountModel, Table
from onetorch.generative.vocabulary import BYTES

LEAST, MOST = 2, 7  # orders; the codes of eight bytes would not fit into an int64


class Level(NamedTuple):
    """The n-grams of one order. Those of context i, whose code (`ngram.codes`) is contexts[i], are numbers first[i] to first[i] + kinds[i]."""

    contexts: Tensor  # (contexts,) int64, sorted
    first: Tensor  # (contexts,) int64
    kinds: Tensor  # (contexts,) int64
    bytes: Tensor  # (n-grams,) int64
    counts: Tensor  # (n-grams,) int64
    totals: Tensor  # (contexts,) int64
    released: Tensor  # (contexts,) float32: the mass that the discounts took away, times the total
    discounts: Tensor  # (4,) float32: of counts 0, 1, 2 and more
    once: Tensor  # (n-grams,) int64, sorted: the codes of those that stand in the text once


class Counts(nn.Module):
    """Log-probabilities of the next byte by the n-grams of at most `order` bytes of a text of which the last `size` bytes are counted."""

    text: Tensor  # (size,) uint8
    length: Tensor  # () int64: how many of them there are

    def __init__(self, size: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("text", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("length", torch.zeros((), dtype=torch.int64))
        self._levels: list[Level] = []  # made when they are needed

    def count(self, text: Text) -> None:
        """Forget what was counted, and count `text`."""
        kept = torch.from_numpy(np.array(text[-len(self.text) :]))
        self.text.zero_()[: len(kept)] = kept.to(self.text.device)
        self.length.fill_(len(kept))
        self._levels = []

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._levels = []

    def levels(self) -> list[Level]:
        """The tables of orders 1, 2, … of what was counted; none as long as nothing was."""
        device = self.text.device
        if not self._levels and not self.length:
            return []
        if not self._levels or self._levels[0].contexts.device != device:
            model = CountModel(self.text[: self.length].cpu().numpy(), self.order)
            tables = [*model.lower[: self.order - 1], model.highest[-1]]
            self._levels = [_level(table, whole, device) for table, whole in zip(tables, model.highest, strict=True)]
        return self._levels

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, tokens: Tensor, start: int = 0, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(log p (B, T - start, 256) of the byte after each of tokens (B, T) from the place `start` on, and for each order g(h), (B, T - start, order)).

        `counted` (B, T - start) are the bytes that follow, where these places were counted themselves: they are taken out. float32.
        """
        B, T = tokens.shape
        N, at = B * (T - start), torch.arange(B * (T - start), device=tokens.device)
        seen = torch.arange(start + 1, T + 1, device=tokens.device).repeat(B)  # (N,) bytes of the window before the one to be predicted
        since = max(start + 1 - self.order, 0)  # no n-gram reaches farther back
        contexts, code = [torch.zeros_like(seen)], torch.zeros_like(tokens[:, since:])  # of 0, 1, … bytes, (N,) each
        for n in range(1, self.order):
            code = code + (F.pad(tokens[:, since:], (n - 1, 0))[:, : T - since] << 8 * (n - 1))
            contexts.append(code[:, start - since :].contiguous().view(-1))

        levels, next_byte = self.levels(), None if counted is None else counted.reshape(-1).contiguous()
        alone = []  # (N,) for each order: the n-gram up to the byte that follows stands in the text once
        if next_byte is not None:
            alone = [_find(level.once, context << 8 | next_byte)[1] for level, context in zip(levels, contexts, strict=False)]
        p, shares = torch.full((N, BYTES), 1 / BYTES, device=tokens.device), torch.ones(N, self.order, device=tokens.device)
        for n, (level, context) in enumerate(zip(levels, contexts, strict=False), 1):
            row, known = _find(level.contexts, context)
            known &= seen >= n - 1
            kinds = level.kinds[row] * known
            place = at.repeat_interleave(kinds)  # (M,) of the N places, for each n-gram that goes on from its context
            gram = torch.arange(len(place), device=tokens.device) + (level.first[row] - kinds.cumsum(0) + kinds)[place]
            following, count, total, released = level.bytes[gram], level.counts[gram], level.totals[row], level.released[row]
            discount = level.discounts[count.clamp(max=3)]
            if next_byte is not None:
                out = following == next_byte[place]  # at most one n-gram for each place
                if n < self.order:
                    out &= torch.where(seen >= n, alone[n], alone[n - 1])[place]  # what stands before the window is not known
                count, before = count - out.long(), discount
                discount = level.discounts[count.clamp(max=3)]
                released = released.index_add(0, place[out], (discount - before)[out])
                total = total.index_add(0, place[out], torch.ones_like(place[out]), alpha=-1)
                known &= total > 0
            inverse = torch.where(known, 1 / total, 0.0)
            share = torch.where(known, released * inverse, 1.0)
            shares[:, n - 1] = share
            p *= share[:, None]
            p.view(-1).index_add_(0, place * BYTES + following, (count - discount) * inverse[place])
        return p.log_().view(B, T - start, BYTES), shares.view(B, T - start, self.order)


def _level(table: Table, whole: Table, device: torch.device) -> Level:
    """`whole` counts every occurrence of the same n-grams."""

    def tensor(values: Any, dtype: type = np.int64) -> Tensor:
        return torch.from_numpy(np.asarray(values).astype(dtype)).to(device)

    first = np.searchsorted(table.codes, table.contexts << np.uint64(8))
    once: Codes = whole.codes[whole.counts == 1]
    return Level(
        tensor(table.contexts), tensor(first), tensor(np.diff(first, append=len(table.codes))), tensor(table.codes & np.uint64(BYTES - 1)),
        tensor(table.counts), tensor(table.totals), tensor(table.released, np.float32), tensor((0.0, *table.discounts), np.float32), tensor(once),
    )  # fmt: skip


def _find(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """(where each query stands in the sorted keys, whether it does)."""
    if not len(keys):
        return torch.zeros_like(queries), torch.zeros_like(queries, dtype=torch.bool)
    found = torch.searchsorted(keys, queries).clamp_(max=len(keys) - 1)
    return found, keys[found] == queries

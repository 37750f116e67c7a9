"""The count model: interpolated n-grams on bytes with modified Kneser-Ney smoothing (Chen & Goodman 1998), the line a trained model has to beat.

With c(h w) how often the byte w follows the context h of n - 1 bytes, and h' the context without its first byte,

    p_n(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p_{n-1}(w | h'),    p_0 = 1 / 256,

where g(h) is what the discounts took away, so that the bytes' probabilities sum to one. Only the highest order counts occurrences; below it c(h w) is the
number of different bytes seen before h w. A context never seen leaves p_{n-1} as it is. The discounts D for counts 1, 2 and more come from the numbers of
n-grams seen once to four times; the highest order is chosen on the tuning split.

Eight bytes fit into one 64-bit integer, so an n-gram is a number, counting is sorting, and looking up is binary search: a text of ten million bytes is counted
and scored in some seconds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onetorch.generative.data import FRACTION, Text, digest
from onetorch.runs import cache

ORDERS = 8  # the highest order there can be
LIMIT = 16 << 20  # bytes that are counted at most: the last ones, those next to the held-out text
SCORED = 1 << 20  # bytes that are scored at most, in 64 pieces spread evenly over the held-out text

CACHE = "count_models"  # where results are kept between runs

Codes = NDArray[np.uint64]


@dataclass(frozen=True)
class Table:
    """One order's n-grams as sorted codes with their counts, and its contexts, sorted too, with total count and mass given to the order below."""

    codes: Codes
    counts: NDArray[np.int64]
    contexts: Codes
    totals: NDArray[np.int64]
    released: NDArray[np.float64]
    discounts: tuple[float, float, float]

    def mix(self, codes: Codes, below: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of each n-gram's last byte given the others, when the order below gives it probability `below`."""
        count = _lookup(self.codes, self.counts, codes)
        total = _lookup(self.contexts, self.totals, codes >> np.uint64(8))
        released = _lookup(self.contexts, self.released, codes >> np.uint64(8))
        discount = np.array((0.0, *self.discounts))[np.minimum(count, 3)]
        return np.where(total > 0, (count - discount + released * below) / np.maximum(total, 1), below)


def _lookup(keys: Codes, values: NDArray, queries: Codes) -> NDArray:
    """values[i] where keys[i] is the query, else zero."""
    order = np.argsort(queries)  # neighbouring searches touch neighbouring memory: several times faster
    found = np.empty(len(queries), dtype=np.int64)
    found[order] = np.minimum(np.searchsorted(keys, queries[order]), len(keys) - 1)
    return np.where(keys[found] == queries, values[found], 0)


def codes(text: Text, order: int) -> Codes:
    """Every n-gram of the text as a number, its last byte the lowest; (len(text) - order + 1,), none where the text is shorter."""
    out = np.zeros(max(len(text) - order + 1, 0), dtype=np.uint64)
    for i in range(order):
        out = (out << np.uint64(8)) | text[i : i + len(out)]
    return out


def _table(keys: Codes, counts: NDArray[np.int64]) -> Table:
    ones, twos, threes, fours = (np.count_nonzero(counts == k) for k in (1, 2, 3, 4))
    if ones and twos:
        y = ones / (ones + 2 * twos)
        raw: tuple[float, ...] = (1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes if threes else 1.5)
    else:
        raw = (0.5, 0.75, 0.9)  # too small a text to estimate them
    discounts = tuple(float(min(max(d, 0.05), k - 0.05)) for k, d in enumerate(raw, 1))  # never a negative probability, never none for what was not seen
    first = np.flatnonzero(np.diff(keys >> np.uint64(8), prepend=~(keys[:1] >> np.uint64(8))))  # where a context begins
    taken = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    return Table(keys, counts, keys[first] >> np.uint64(8), np.add.reduceat(counts, first), np.add.reduceat(taken, first), discounts)  # type: ignore[arg-type]


class CountModel:
    """Counts of a text for every highest order up to `order`."""

    def __init__(self, text: Text, order: int = ORDERS) -> None:
        if not 1 <= order <= ORDERS:
            raise ValueError(f"order must lie in 1 to {ORDERS}, got {order}")
        if len(text) <= order:
            raise ValueError(f"the text must be longer than the order {order}, got {len(text)} bytes")
        self.highest: list[Table] = []  # for orders 1, 2, …: as the highest order
        self.lower: list[Table] = []  # as an order below it
        for n in range(1, order + 1):
            keys, counts = np.unique(codes(text, n), return_counts=True)
            self.highest.append(_table(keys, counts))
            if n > 1:
                # Each different n-gram is one byte before its last n - 1.
                self.lower.append(_table(*np.unique(keys & np.uint64((1 << 8 * (n - 1)) - 1), return_counts=True)))

    def probabilities(self, text: Text) -> list[NDArray[np.float64]]:
        """p(byte | all before it) for the text's second and later bytes, one array for each highest order."""
        below, found = np.full(len(text) - 1, 1 / 256), []
        for n, highest in enumerate(self.highest, 1):
            # The first bytes have short contexts; they keep what the order below gave them.
            start = max(n - 2, 0)
            grams = codes(text, n)[1 if n == 1 else 0 :]
            top = below.copy()
            top[start:] = highest.mix(grams, below[start:])
            found.append(top)
            if n <= len(self.lower):
                below = below.copy()
                below[start:] = self.lower[n - 1].mix(grams, below[start:])
        return found


def bits_per_byte(train: Text, held_out: Text) -> float:
    """What the count model needs on `held_out` (all bytes but the first, or 64 pieces where it is longer than SCORED) after counting `train`.

    Its highest order is the best one for the last ninth of `train` (the tuning split), after counting the rest of it. For the same two texts a machine counts
    once and keeps the number.
    """
    key = " ".join(map(digest, (np.frombuffer(Path(__file__).read_bytes(), np.uint8), train, held_out)))
    known = cache.get(CACHE, key)
    if not isinstance(known, float):
        known = _count_and_score(train[-LIMIT:], held_out)
        cache.put(CACHE, key, known)  # where it cannot be kept, it is counted again next time
    return known


def _count_and_score(train: Text, held_out: Text) -> float:
    cut = len(train) - len(train) // (FRACTION - 1)
    order = 1 + int(np.argmin(_bits(CountModel(train[:cut], min(ORDERS, cut - 1)), train[cut:])))
    return float(_bits(CountModel(train, order), held_out)[-1])


def _bits(model: CountModel, text: Text) -> NDArray[np.float64]:
    """Bits per byte for each highest order."""
    pieces = [text] if len(text) <= SCORED else [text[s : s + SCORED // 64] for s in np.linspace(0, len(text) - SCORED // 64, 64).astype(int)]
    scored = [model.probabilities(piece) for piece in pieces]
    return np.array([-np.log2(np.concatenate(p)).mean() for p in zip(*scored, strict=True)])

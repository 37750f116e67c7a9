"""Byte-pair vocabularies (Gage 1994; Sennrich et al. 2016): the 256 bytes, and the pairs that were the most frequent ones of a text, joined one after another.

A vocabulary is its merges, (N - 256, 2) whole numbers: token 256 + i is spelt as token merges[i, 0] and token merges[i, 1] after it, both made before it. Any
bytes can be written in it and read back. Merges never cross the borders of words, where a word is a run of letters, of up to three digits, of other marks, or
of white space, with the space before it, of at most 32 bytes (the idea of Radford et al. 2019; bytes above 127 count as letters).

A text has other spellings than the one that `encode` finds, which a model gives some probability too: its bits per byte, counted by this spelling alone, are
an upper bound, as they are for every model of byte pairs.
"""

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onetorch.generative.data import Text

BYTES = 256
WORD = re.compile(rb" ?[A-Za-z\x80-\xff]{1,31}| ?[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]{1,31}|\s{1,31}(?!\S)|\s{1,31}")
PIECE = 1 << 22  # bytes that are cut into words at a time
LEARNT_FROM = 1 << 25  # bytes of a text that pairs are counted in at most, in pieces spread evenly over it

Merges = NDArray[np.int32]


def words(text: Text) -> Iterator[list[bytes]]:
    """The text's words in their order, some at a time; joined they are the text."""
    begin = 0
    while begin < text.size:
        piece = text[begin : begin + PIECE].tobytes()
        found = WORD.findall(piece)
        if begin + len(piece) < text.size:
            piece = piece[: -len(found.pop())]  # it may go on in the next piece
        yield found
        begin += len(piece)


def learn(text: Text, size: int) -> Merges:
    """The merges of a vocabulary of `size` tokens: each time the pair that stands in the text most often, of equals the one with the lower numbers.

    ValueError where no word of the text is left to be joined before `size` is reached.
    """
    count: Counter[bytes] = Counter()
    parts = max(-(-text.size // PIECE), 1)
    for i in np.unique(np.linspace(0, parts - 1, LEARNT_FROM // PIECE).astype(np.int64)):
        for found in words(text[i * PIECE : (i + 1) * PIECE]):
            count.update(found)
    spelt, often = [list(w) for w in count], list(count.values())
    pairs: defaultdict[tuple[int, int], int] = defaultdict(int)
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, tokens in enumerate(spelt):
        for pair in itertools.pairwise(tokens):
            pairs[pair] += often[w]
            where[pair].add(w)
    queue = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(queue)
    merges = np.zeros((size - BYTES, 2), np.int32)
    for i in range(len(merges)):
        while queue and -queue[0][0] != pairs[queue[0][1]]:
            _, pair = heapq.heappop(queue)  # its count has fallen since
            if pairs[pair]:
                heapq.heappush(queue, (-pairs[pair], pair))
        if not queue:
            raise ValueError(f"the text gives a vocabulary of {BYTES + i} at most, where every word is a token; got {size}")
        _, chosen = heapq.heappop(queue)
        merges[i] = chosen
        risen = set()
        for w in where.pop(chosen):
            tokens = spelt[w]
            for pair in itertools.pairwise(tokens):
                pairs[pair] -= often[w]
            tokens = spelt[w] = _join(tokens, chosen, BYTES + i)
            for pair in itertools.pairwise(tokens):
                pairs[pair] += often[w]
                if BYTES + i in pair:
                    where[pair].add(w)
                    risen.add(pair)
        for pair in risen:
            heapq.heappush(queue, (-pairs[pair], pair))
    return merges


def _join(tokens: list[int], pair: tuple[int, int], joined: int) -> list[int]:
    """The tokens with `joined` in place of each occurrence of `pair`, from the left."""
    out: list[int] = []
    i = 0
    while i < len(tokens):
        if tokens[i] == pair[0] and tokens[i + 1 : i + 2] == [pair[1]]:
            out.append(joined)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


class Vocabulary:
    """What a model's tokens stand for. Without merges they are the bytes.

    ValueError where the merges are not (M, 2) or one of them joins tokens that it does not come after.

    >>> vocabulary = Vocabulary(np.array([[97, 98], [256, 99]]))
    >>> vocabulary.encode(np.frombuffer(b"abcab", np.uint8)).tolist()
    [257, 256]
    """

    def __init__(self, merges: NDArray[np.integer]) -> None:
        if merges.ndim != 2 or merges.shape[1] != 2 or (merges < 0).any() or (merges >= BYTES + np.arange(len(merges))[:, None]).any():
            raise ValueError("merges: expected pairs (M, 2), the i-th of tokens from 0 to 255 + i; the vocabulary is damaged")
        self.size = BYTES + len(merges)
        self._spelt = [bytes([b]) for b in range(BYTES)]
        for first, second in merges.tolist():
            self._spelt.append(self._spelt[first] + self._spelt[second])
        self.lengths: NDArray[np.int64] = np.array([len(s) for s in self._spelt])  # bytes of each token
        self._rank = {pair: i for i, pair in enumerate(map(tuple, merges.tolist()))}

    def encode(self, text: Text) -> NDArray[np.unsignedinteger]:
        """The tokens that spell the text, as whole numbers without sign; bytes as they are where there are no merges."""
        if not self._rank:
            return text
        dtype = np.uint16 if self.size <= 1 << 16 else np.uint32
        number: dict[bytes, int] = {}  # of each different word
        begins, sizes, flat = [0], list[int](), list[int]()
        out: list[NDArray[np.unsignedinteger]] = []
        for found in words(text):
            for word in found:
                if word not in number:
                    number[word] = len(sizes)
                    tokens = self._spell(word)
                    flat += tokens
                    sizes.append(len(tokens))
                    begins.append(len(flat))
            at = np.fromiter(map(number.__getitem__, found), np.int64, len(found))
            size, begin = np.array(sizes)[at], np.array(begins)[at]
            out.append(np.array(flat, dtype)[np.repeat(begin - (size.cumsum() - size), size) + np.arange(size.sum())])
        return np.concatenate(out) if out else np.zeros(0, dtype)

    def _spell(self, word: bytes) -> list[int]:
        tokens = list(word)
        while len(tokens) > 1:
            rank, pair = min((self._rank.get(pair, self.size), pair) for pair in itertools.pairwise(tokens))
            if rank == self.size:
                break
            tokens = _join(tokens, pair, BYTES + rank)
        return tokens

    def decode(self, tokens: list[int]) -> bytes:
        """The bytes that tokens stand for."""
        return b"".join(map(self._spelt.__getitem__, tokens))

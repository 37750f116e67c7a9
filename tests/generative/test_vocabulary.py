import itertools
from pathlib import Path

import numpy as np
import pytest

from onetorch.generative import data, vocabulary
from onetorch.generative.vocabulary import Vocabulary, learn


def text(content: bytes) -> data.Text:
    return np.frombuffer(content, np.uint8)


def test_merges_by_hand() -> None:
    # " ab" stands three times, " abc" twice: the pairs a-b 5 times and space-a 5 times (the lower number first), then " a"-b 5 times, " ab"-c twice.
    merges = learn(text(b" ab ab ab abc abc"), 259)
    assert merges.tolist() == [[32, 97], [256, 98], [257, 99]]
    own = Vocabulary(merges)
    assert own.encode(text(b" abc abx")).tolist() == [258, 257, 120]
    assert own.lengths[[97, 256, 257, 258]].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="at most, where every word is a token; got 300"):
        learn(text(b" ab ab ab abc abc"), 300)


def test_a_pair_of_equals_is_joined_from_the_left() -> None:
    own = Vocabulary(np.array([[97, 97], [256, 256]]))
    assert own.encode(text(b"aaaaaaa")).tolist() == [257, 256, 97]


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_come_back(seed: int) -> None:
    random = np.random.default_rng(seed)
    own = Vocabulary(learn(data.read(Path(data.__file__)), 600))
    for content in (random.integers(0, 256, 5000, np.uint8).tobytes(), random.choice([b" ", b"\n", b"a", b"\xc3\xa9", b"7", b"."], 5000).tobytes(), b"", b"\0"):
        assert own.decode(own.encode(text(content)).tolist()) == content


def test_words_are_the_text_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    source = data.read(Path(data.__file__))
    whole = [w for found in vocabulary.words(source) for w in found]
    assert b"".join(whole) == source.tobytes()
    assert b" return" in whole  # with the space before it, and the indent apart
    for piece in (67, 100, 1001):
        monkeypatch.setattr(vocabulary, "PIECE", piece)
        assert [w for found in vocabulary.words(source) for w in found] == whole
    own = Vocabulary(learn(source, 400))
    pieces = own.encode(source)
    monkeypatch.setattr(vocabulary, "PIECE", 1 << 22)
    assert np.array_equal(own.encode(source), pieces)


def test_it_learns_what_counting_anew_each_time_learns() -> None:
    source = data.read(Path(data.__file__))
    spelt: dict[tuple[int, ...], int] = {}
    for found in vocabulary.words(source):
        for word in found:
            spelt[tuple(word)] = spelt.get(tuple(word), 0) + 1
    expected = []
    for new in range(256, 400):
        pairs: dict[tuple[int, int], int] = {}
        for word, n in spelt.items():
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        expected.append(list(best))
        joined: dict[tuple[int, ...], int] = {}
        for word, n in spelt.items():
            out: list[int] = []
            for token in word:
                # From the left: a token that has just been joined is not its left half any more.
                if out and (out[-1], token) == best:
                    out[-1] = new
                else:
                    out.append(token)
            joined[tuple(out)] = joined.get(tuple(out), 0) + n
        spelt = joined
    assert learn(source, 400).tolist() == expected


def test_damaged_merges_are_refused() -> None:
    for merges in ([[0, 256]], [[-1, 0]], [0, 1]):
        with pytest.raises(ValueError, match="the vocabulary is damaged"):
            Vocabulary(np.array(merges))

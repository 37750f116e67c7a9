from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetorch.generative import data, ngram


def array(text: bytes) -> data.Text:
    return np.frombuffer(text, dtype=np.uint8)


def test_codes_are_the_bytes_in_order() -> None:
    assert ngram.codes(array(b"\1\2\3\4"), 3).tolist() == [0x010203, 0x020304]
    assert ngram.codes(array(b"\xff" * 8), 8).tolist() == [2**64 - 1]
    assert ngram.codes(array(b"ab"), 3).tolist() == []


def test_a_text_small_enough_to_count_by_hand() -> None:
    # "abab": a 2, b 2; ab 2, ba 1. Single bytes are too few to estimate discounts: 1/2 for a count of one, 3/4 for two.
    model = ngram.CountModel(array(b"abab"), 2)
    after_a_b, after_a_a, after_x_a = (model.probabilities(array(t)) for t in (b"ab", b"aa", b"xa"))
    # Order 1 as the highest: p(a) = (2 - 3/4) / 4 + (2 * 3/4 / 4) / 256.
    p1 = 1.25 / 4 + 1.5 / 4 / 256
    assert after_x_a[0] == pytest.approx([p1])
    assert after_a_b[0] == pytest.approx([p1])
    # Order 1 below order 2: one byte was seen before a, one before b. p(a) = p(b) = (1 - 1/2) / 2 + (2 * 1/2 / 2) / 256.
    q = 0.5 / 2 + 1.0 / 2 / 256
    # Pairs: n1 = n2 = 1, n3 = 0, so D(2) = 2 - 3 n3 / n2 n1 / (n1 + 2 n2) = 2, kept below 2 at 1.95. After a: b twice of two; x was never a context.
    assert after_a_b[1] == pytest.approx([0.05 / 2 + 1.95 / 2 * q])
    assert after_a_a[1] == pytest.approx([1.95 / 2 * q])
    assert after_x_a[1] == pytest.approx([q])


def naive(train: bytes, highest: int, history: bytes, symbol: int) -> float:
    """The definition, by counting with dictionaries; `ngram` sorts integers instead."""
    p = 1 / 256
    for n in range(1, highest + 1):
        if n - 1 > len(history):
            break
        grams = Counter(train[i : i + n] for i in range(len(train) - n + 1))
        if n < highest:
            grams = Counter(g[1:] for g in {train[i : i + n + 1] for i in range(len(train) - n)})
        of = Counter(grams.values())
        D = {0: 0.0, 1: 0.5, 2: 0.75, 3: 0.9}
        if of[1] and of[2]:
            y = of[1] / (of[1] + 2 * of[2])
            D |= {k: min(max(k - (k + 1) * y * of[k + 1] / of[k] if of[k] else 1.5, 0.05), k - 0.05) for k in (1, 2, 3)}
        context = history[len(history) - n + 1 :]
        seen = {g[-1]: c for g, c in grams.items() if g[:-1] == context}
        if seen:
            total = sum(seen.values())
            released = sum(D[min(c, 3)] for c in seen.values())
            c = seen.get(symbol, 0)
            p = (c - D[min(c, 3)] + released * p) / total
    return p


def sentence(seed: int, size: int) -> bytes:
    rng = np.random.default_rng(seed)
    words = [b"the ", b"then ", b"hen ", b"one ", b"bone ", b"tone, ", b"none.\n", b"a "]
    return b"".join(words[i] for i in rng.choice(len(words), size, p=np.array([8, 5, 4, 3, 2, 2, 1, 1]) / 26))


def test_equals_the_definition() -> None:
    train, text = sentence(0, 150), sentence(1, 4) + b"zebra the"
    model = ngram.CountModel(array(train), 4)
    found = model.probabilities(array(text))
    for highest in range(1, 5):
        expected = [naive(train, highest, text[:i], text[i]) for i in range(1, len(text))]
        assert found[highest - 1] == pytest.approx(expected, rel=1e-12), highest


@pytest.mark.parametrize("history", [b"t", b"the", b"e then", b"one, bone", b"\xff\0q", b"the \xff"])
def test_sums_to_one(history: bytes) -> None:
    model = ngram.CountModel(array(sentence(0, 400)))
    p = np.array([[order[-1] for order in model.probabilities(array(history + bytes([b])))] for b in range(256)])  # (256, orders)
    assert (p > 0).all()
    assert p.sum(0) == pytest.approx(1.0, abs=1e-12)


def test_bits_per_byte_of_what_cannot_be_compressed_and_of_what_can() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    assert 7.9 < ngram.bits_per_byte(noise[:15_000], noise[15_000:]) < 8.6
    assert ngram.bits_per_byte(array(b"abcdefgh" * 500), array(b"abcdefgh" * 50)) < 0.05


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="order must lie in 1 to 8, got 9"):
        ngram.CountModel(array(b"abcdefghijkl"), 9)
    with pytest.raises(ValueError, match="longer than the order 3"):
        ngram.CountModel(array(b"abc"), 3)


def test_the_same_texts_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counted: list[int] = []

    class Counted(ngram.CountModel):
        def __init__(self, *arguments: Any) -> None:
            counted.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(ngram, "CountModel", Counted)
    train, text = array(sentence(0, 150)), array(sentence(1, 50))
    first = ngram.bits_per_byte(train, text)
    assert len(counted) == 2  # to choose the order, and to count
    assert ngram.bits_per_byte(train.copy(), text.copy()) == first
    assert len(counted) == 2
    assert ngram.bits_per_byte(train, text[1:]) != first
    assert len(counted) == 4

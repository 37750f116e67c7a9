import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onetorch.generative import data, gpt
from onetorch.generative.counts import Counts
from onetorch.generative.ngram import CountModel
from onetorch.runs import checkpoint, folder, plan
from onetorch.runs.errors import Stopped
from onetorch.runs.run import Run

ORDER = 4
TINY = gpt.Config(
    counts=ORDER, count_bytes=8000, steps=4, batch=4, context=32, layers=1, heads=2, width=16, ngram_orders=(), ngram_rows=1, warmup=1, rotary_base=30.0,
    base_width=None, base_batch=None, lr_matrix=0.02, lr_embedding=0.02, lr_head=0.005, eval_every=4, eval_windows=4, eval_samples=1,
)  # fmt: skip


def words(size: int, seed: int = 0) -> data.Text:
    drawn = np.random.default_rng(seed).choice(["to ", "be ", "or ", "not ", "that ", "is ", "the ", "question.\n", "tobé "], size)
    return np.frombuffer("".join(drawn).encode()[:size], np.uint8)


def counted(text: data.Text, size: int = 8000) -> Counts:
    found = Counts(size, ORDER)
    found.count(text)
    return found


def start(config: gpt.Config, place: Path, **more: Any) -> Run:
    return Run(place, config, fixed=plan.parse("threads=1,dtype=float32,attention=explicit"), quiet=True, **more)


def test_it_is_the_count_model_over_all_bytes() -> None:
    train, other = words(3000), words(400, 1)
    logp, shares = counted(train)(torch.from_numpy(other[None, :-1].astype(np.int64)))
    assert logp.shape == (1, 399, 256)
    assert shares.shape == (1, 399, ORDER)
    assert logp.exp().sum(-1).sub(1).abs().max() < 1e-5
    expected = CountModel(train, ORDER).probabilities(other)[-1]
    found = logp[0].exp()[torch.arange(399), torch.from_numpy(other[1:].astype(np.int64))]
    assert np.allclose(found.numpy(), expected, rtol=1e-4)
    assert shares[0, 10, 0] == shares[0, 90, 0]  # one context of no bytes
    assert (shares <= 1).all()
    assert (shares[0, 100:, -1] < 1).any()


def test_without_counts_nothing_is_known() -> None:
    logp, shares = Counts(100, ORDER)(torch.zeros(2, 5, dtype=torch.int64))
    assert torch.allclose(logp, torch.tensor(-math.log(256)))
    assert (shares == 1).all()


def test_the_last_bytes_of_a_longer_text_are_counted() -> None:
    text, window = words(3000), torch.from_numpy(words(50, 1)[None].astype(np.int64))
    assert torch.equal(counted(text, 1000)(window)[0], counted(text[-1000:])(window)[0])


def one_less(text: bytes, model: CountModel, at: int) -> float:
    """p(text[at] | the ORDER - 1 bytes before it) with that place taken out of the counts, by dictionaries."""
    places = [i for i in range(len(text)) if i != at]
    p = 1 / 256
    for n in range(1, ORDER + 1):
        if n == ORDER:
            grams = Counter(text[i - n + 1 : i + 1] for i in places if i >= n - 1)
            discounts = (0.0, *model.highest[n - 1].discounts)
        else:  # different bytes before an n-gram
            before = defaultdict(set)
            for i in places:
                if i >= n:
                    before[text[i - n + 1 : i + 1]].add(text[i - n])
            grams = Counter({gram: len(found) for gram, found in before.items()})
            discounts = (0.0, *model.lower[n - 1].discounts)
        after = {gram: count for gram, count in grams.items() if gram[:-1] == text[at - n + 1 : at]}
        total = sum(after.values())
        if total:
            count = after.get(text[at - n + 1 : at + 1], 0)
            p = (count - discounts[min(count, 3)] + sum(discounts[min(c, 3)] for c in after.values()) * p) / total
    return p


def test_the_byte_to_be_predicted_is_taken_out_of_the_counts() -> None:
    text = words(600)
    model, module = CountModel(text, ORDER), counted(text)
    window = torch.from_numpy(text[None, 100:301].astype(np.int64))
    logp, _ = module(window[:, :-1], counted=window[:, 1:])
    assert logp.exp().sum(-1).sub(1).abs().max() < 1e-5
    found = logp[0].exp()[torch.arange(200), window[0, 1:]]
    for t in range(ORDER, 200, 7):  # byte 100 + t + 1; before it the bytes are of the window
        assert found[t].item() == pytest.approx(one_less(text.tobytes(), model, 101 + t), rel=1e-4), t
    whole, _ = module(window[:, :-1])
    assert logp.gather(-1, window[:, 1:, None]).mean() < whole.gather(-1, window[:, 1:, None]).mean() - 0.05
    # From a place on, as a cache asks for it, and a byte that was not counted there: nothing to take out.
    assert torch.equal(module(window[:, :-1], 50)[0], whole[:, 50:])
    unseen = torch.full_like(window[:, 1:], 7)
    assert torch.equal(module(window[:, :-1], counted=unseen)[0], whole)


def test_the_network_begins_as_the_count_model_and_learns_more(tmp_path: Path) -> None:
    # How a line goes on after eight dots depends on its beginning, where the counts do not reach: they see neither that it ends nor how.
    drawn = np.random.default_rng(0).integers(0, 2, 1500)
    text = np.frombuffer(b"".join((b"a........a\n", b"b........b\n")[i] for i in drawn), np.uint8)
    config = replace(TINY, steps=150, batch=16, count_bytes=20_000, eval_every=150)
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run, text)
    rows = list(folder.rows(tmp_path / "run"))
    window = data.batch(text[:14_850], 16, 32, torch.Generator().manual_seed(0))
    alone = counted(text[:14_850], 20_000)(window[:, :-1], counted=window[:, 1:])[0].gather(-1, window[:, 1:, None])
    assert rows[0]["loss"] == pytest.approx(-alone.mean().item(), rel=1e-5)
    assert rows[-1]["val_loss"] < 0.6 * rows[0]["loss"]
    assert int(model.counts.length) == 14_850
    results = gpt.evaluate(model, config, text, media=tmp_path, samples=1, length=40)
    assert results["bpb"] < 0.8 * results["ngram_bpb"]  # type: ignore[operator]


def test_counts_are_in_every_checkpoint_and_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(words(6000).tobytes())
    config = replace(TINY, data=tmp_path / "text.txt", ema=(0.9,))
    with start(config, tmp_path / "whole") as run:
        model = gpt.train(config, run)

    with pytest.raises(Stopped), start(config, tmp_path / "parts", time_limit=0.0) as run:
        gpt.train(config, run)
    assert len(list(folder.rows(tmp_path / "parts"))) == 1
    with start(config, tmp_path / "parts", resume=True) as run:
        gpt.train(config, run)
    weights = [(tmp_path / name / "checkpoints" / "00000004" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    rows = [[{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(tmp_path / name)] for name in ("whole", "parts")]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]

    found, _ = checkpoint.newest(tmp_path / "whole" / "checkpoints")
    assert found is not None
    other, window = gpt.build(config), torch.from_numpy(words(32, 2)[None].astype(np.int64))
    other(window)  # its tables are made, of nothing
    other.load_state_dict(found.model)
    assert torch.equal(other(window), model(window))
    samples = [gpt.generate(m, b"to be", 60, torch.Generator().manual_seed(1), cached=cached) for m, cached in ((model, True), (other, True), (other, False))]
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.parametrize("wrong", [{"counts": 1}, {"counts": 8}, {"counts": 4, "vocabulary": 300}, {"counts": 4, "images": "digits"}, {"count_bytes": 0}])
def test_wrong_configs_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match="count_bytes" if "count_bytes" in wrong else "counts must"):
        gpt.Config(**wrong)

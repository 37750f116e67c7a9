import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onetorch.generative import corpus, gpt, stream
from onetorch.generative.stream import Stream
from onetorch.runs import folder, plan
from onetorch.runs.errors import UsageError
from onetorch.runs.run import Run


class Documents:
    """Numbered documents of eight bytes, as a stream of `datasets` gives them."""

    def __init__(self, count: int) -> None:
        self.count, self.at, self.read = count, 0, list[int]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begin = self.at
        for i in range(begin, self.count):
            self.at = i + 1
            self.read.append(i)
            yield {"text": f"{i:08}", "id": i}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten documents, with the empty line after each, are a chunk; two are held out for each purpose."""
    monkeypatch.setattr(stream, "CHUNK", 100)
    monkeypatch.setattr(stream, "HELD_OUT", 20)


def numbers(windows: torch.Tensor) -> list[int]:
    """The documents that windows of 19 bytes hold a whole number of."""
    text = [bytes(w.tolist()).split(b"\n\n") for w in windows]
    return [int(word) for words in text for word in words if len(word) == 8]


def test_what_is_held_out_comes_first_and_is_not_trained_on() -> None:
    for held_out, expected, first in (("validation", b"00000000\n\n00000001\n\n", 2), ("tuning", b"00000002\n\n00000003\n\n", 4)):
        found = Stream(Documents(first + 20), "text", 19, held_out)  # type: ignore[arg-type]
        assert found.held_out.tobytes() == expected
        generator = torch.Generator().manual_seed(0)
        assert found.sample().tobytes() == b"".join(b"%08d\n\n" % i for i in range(first, first + 10))
        seen = [numbers(found.batch(5, 19, generator)) for _ in range(6)]  # 95 tokens a batch, 100 in a chunk: two batches of each
        for k, chunk in enumerate([range(first, first + 10), range(first + 10, first + 20), range(first, first + 10)]):
            assert set(seen[2 * k] + seen[2 * k + 1]) <= set(chunk)
            assert len(set(seen[2 * k] + seen[2 * k + 1])) > 3


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5])
def test_going_on_is_exact_wherever_it_stopped(stop: int) -> None:
    def batches(found: Stream, generator: torch.Generator, count: int) -> list[torch.Tensor]:
        return [found.batch(5, 19, generator) for _ in range(count)]

    whole = batches(Stream(Documents(27), "text", 19), torch.Generator().manual_seed(0), 8)
    generator = torch.Generator().manual_seed(0)
    before = Stream(Documents(27), "text", 19)
    first = batches(before, generator, stop)
    state = json.loads(json.dumps(before.state_dict()))
    after = Stream(Documents(27), "text", 19)
    after.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + batches(after, generator, 8 - stop), strict=True))


def test_only_what_is_asked_for_is_read() -> None:
    source = Documents(10**9)
    found = Stream(source, "text", 19)
    found.batch(4, 19, torch.Generator())
    assert source.read == list(range(12))


def test_what_cannot_be_streamed_is_named() -> None:
    with pytest.raises(UsageError, match=r"dataset d: a document has no text in the column 'body'; it has text, id \(--column\)"):
        Stream(Documents(9), "body", 19, name="d")
    with pytest.raises(UsageError, match="dataset d: too short, 10 tokens to train on after the held-out documents, the context is 19"):
        Stream(Documents(3), "text", 19, name="d").batch(1, 19, torch.Generator())

    class Broken(Documents):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            raise OSError("no route\nto host")

    with pytest.raises(UsageError, match="dataset d cannot be read further: no route to host"):
        Stream(Broken(9), "text", 19, name="d")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(UsageError, match=r"pip install 'onetorch\[hf\]'"):
            stream.dataset("owner/name")
    for wrong in ({"data": Path("a"), "dataset": "b"}, {"images": "digits", "dataset": "b"}):
        with pytest.raises(ValueError, match="dataset"):
            gpt.Config(**wrong)  # type: ignore[arg-type]


TINY = gpt.Config(
    dataset="numbers", steps=12, batch=4, context=16, layers=1, heads=2, width=16, ngram_rows=50, ngram_width=8, eval_every=6, eval_windows=2, eval_samples=1,
)  # fmt: skip


@pytest.mark.parametrize("vocabulary", [256, 262])
def test_a_run_on_a_stream_goes_on_bit_for_bit(vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HELD_OUT", 400)
    monkeypatch.setattr(stream, "CHUNK", 300)
    monkeypatch.setattr(stream, "dataset", lambda name: Documents(200))
    config = replace(TINY, vocabulary=vocabulary)

    class ToldError(Exception):
        pass

    def train(where: Path, stop: int = 0, resume: bool = False) -> None:
        run = Run(where, config, fixed=plan.parse("threads=1,dtype=float32,attention=explicit"), resume=resume, checkpoint_seconds=0, quiet=True)
        save = run.checkpoint

        def checkpoint(state: gpt.State) -> None:
            save(state)
            if state.iteration == stop:
                run._save(state)
                raise ToldError

        run.checkpoint = checkpoint  # type: ignore[method-assign]
        with run:
            gpt.train(config, run)

    train(tmp_path / "whole")
    with pytest.raises(ToldError):
        train(tmp_path / "parts", stop=7)
    train(tmp_path / "parts", resume=True)
    weights = [(tmp_path / name / "checkpoints" / "00000012" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    found = [[{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(tmp_path / name)] for name in ("whole", "parts")]
    assert found[0] == found[1]
    assert "val_bpb" in found[0][-1]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra hf")
def test_files_are_read_by_the_library(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": f"{10 * i + j:08}"}) + "\n" for j in range(10)), encoding="utf-8")
    found = Stream(stream.dataset(str(tmp_path)), "text", 19)
    assert found.held_out.tobytes() == b"00000000\n\n00000001\n\n"
    generator = torch.Generator().manual_seed(0)
    whole = [found.batch(5, 19, generator) for _ in range(8)]
    generator.manual_seed(0)
    again = Stream(stream.dataset(str(tmp_path)), "text", 19)
    first = [again.batch(5, 19, generator) for _ in range(3)]
    state = json.loads(json.dumps(again.state_dict()))
    last = Stream(stream.dataset(str(tmp_path)), "text", 19)
    last.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + [last.batch(5, 19, generator) for _ in range(5)], strict=True))
    with pytest.raises(UsageError, match=r"dataset .*nothing cannot be read"):
        stream.dataset(str(tmp_path / "nothing"))
    config = replace(TINY, dataset=str(tmp_path), context=8)
    assert corpus.read(config).digest == corpus.read(config).digest

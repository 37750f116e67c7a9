import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import data
from onetorch.runs.errors import UsageError


def text(n: int) -> data.Text:
    return (np.arange(n) % 251).astype(np.uint8)


def test_a_file_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"h\xc3\xa9llo\n")
    assert data.read(tmp_path / "a.txt").tolist() == [104, 0xC3, 0xA9, 108, 108, 111, 10]


def test_a_folder_is_its_text_files_in_order_of_their_paths(tmp_path: Path) -> None:
    for name, content in {"b.txt": b"B", "a/z.txt": b"Z", "a/c.py": b"C", "a.txt": b"A", "x.bin": b"\0x", ".hidden": b"h", ".git/config": b"g"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert data.read(tmp_path).tobytes() == b"CZAB"  # a/c.py, a/z.txt, a.txt, b.txt


def test_the_standard_library_is_found_without_tests_and_packages() -> None:
    content = data.read(None).tobytes()
    assert len(content) > 2_000_000
    assert b"class ArgumentParser(" in content  # argparse.py
    assert content == data.read(None).tobytes()
    assert not {"site-packages", "test", "__pycache__"} & {part for p in data._files(Path(os.__file__).parent, data.LEFT_OUT) for part in p.parts[-3:-1]}


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: None, "no such file"),
    (lambda p: p.write_bytes(b""), "empty"),
    (lambda p: p.mkdir(), "no text"),
    (lambda p: (p.mkdir(), (p / "x").write_bytes(b"\0\1")), "no text"),
])  # fmt: skip
def test_what_is_no_text_is_named_in_one_line(tmp_path: Path, make, says: str) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(UsageError, match=says) as error:
        data.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "a.txt").chmod(0)
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UsageError, match=r"a\.txt cannot be read"):
            data.read(path)


def test_splits_are_eight_one_one_tenths_and_cover_the_text() -> None:
    train, tuning, validation = data.split(text(1003), 4)
    assert (train.size, tuning.size, validation.size) == (802, 100, 101)  # 1003 * 8 // 10, 1003 * 9 // 10 = 902
    assert np.concatenate([train, tuning, validation]).tolist() == text(1003).tolist()
    for held_out, sizes in (("validation", (902, 101)), ("tuning", (802, 100))):
        assert tuple(p.size for p in data.parts(text(1003), 4, held_out)) == sizes  # type: ignore[arg-type]
    assert data.parts(text(1003), 4, "validation")[0].tolist() == text(1003)[:902].tolist()


def test_a_text_too_short_for_the_context_says_how_much_is_needed() -> None:
    data.split(text(90), 4)  # a tenth is 9 bytes: two windows of 4 and the byte after them
    with pytest.raises(UsageError, match=r"name.txt: too short, 80 bytes.* 90 bytes are enough"):
        data.split(text(80), 4, "name.txt")
    with pytest.raises(ValueError, match="uint8"):
        data.split(np.zeros(100, dtype=np.int64), 4)  # type: ignore[arg-type]


def test_a_batch_holds_consecutive_bytes_and_depends_on_its_generator_alone() -> None:
    first = data.batch(text(200), 5, 7, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    again = data.batch(text(200), 5, 7, torch.Generator().manual_seed(1))
    assert first.shape == (5, 8)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert (first.diff(dim=1) == 1).all()


def test_batches_reach_every_window_and_never_leave_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {int(row[0]) for _ in range(50) for row in data.batch(text(10), 8, 7, generator)}
    assert seen == {0, 1, 2}  # 10 bytes hold three windows of 8


@pytest.mark.parametrize("size", [9, 24, 25, 26, 31, 33])
def test_windows_predict_every_byte_but_the_first_once(size: int) -> None:
    targets = [t for w in data.windows(text(size), 8, rows=2) for t in w[:, 1:].flatten().tolist()]
    assert targets == list(range(1, size))
    assert [w.shape[0] for w in data.windows(text(49), 8, rows=4)] == [4, 2]


def test_some_windows_are_spread_evenly() -> None:
    assert [w[:, 0].tolist() for w in data.windows(text(81), 8, count=4)] == [[0, 24, 48, 72]]  # windows 0, 3, 6, 9 of 10


def test_standard_error_of_batch_means_by_hand() -> None:
    one = np.ones(4)
    # Values as their own blocks: s^2 / n with s^2 = 5 / 3 (sum of squares 1.5^2 + 0.5^2 + 0.5^2 + 1.5^2 over 3), n = 4.
    assert data.block_standard_error(np.array([1.0, 2.0, 3.0, 4.0]), one) == pytest.approx((5 / 12) ** 0.5)
    # Two blocks with means 1 and 3: s^2 = 2, n = 2. Ignoring that neighbours are equal would have given sqrt(1/3).
    assert data.block_standard_error(np.array([1.0, 1.0, 3.0, 3.0]), one, blocks=2) == pytest.approx(1.0)
    # Weights 3/4 and 1/4 of means 0 and 4, mean 1: 2 * (9/16 * 1 + 1/16 * 9) = 9/4.
    assert data.block_standard_error(np.array([0.0, 4.0]), np.array([3.0, 1.0])) == pytest.approx(1.5)
    assert np.isnan(data.block_standard_error(np.array([1.0]), np.ones(1)))


def test_an_array_is_its_numbers_in_order_and_is_not_read_into_memory(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "images.npy", images)
    found = data.read(tmp_path / "images.npy")
    assert found.tolist() == list(range(24))
    assert not found.flags.owndata
    (tmp_path / "a.txt").write_bytes(b"text")
    assert not data.read(tmp_path / "a.txt").flags.owndata
    np.save(tmp_path / "floats.npy", np.zeros(3))
    with pytest.raises(UsageError, match=r"floats\.npy: expected an array of uint8, got float64"):
        data.read(tmp_path / "floats.npy")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match=r"bad\.npy cannot be read"):
        data.read(tmp_path / "bad.npy")


def bin_file(path: Path, tokens: list[int], head: bytes = b"") -> None:
    path.write_bytes(head + np.array(tokens, "<u2").tobytes())


def test_shards_are_one_sequence_with_validation_last(tmp_path: Path) -> None:
    bin_file(tmp_path / "train_1.bin", list(range(20)))
    bin_file(tmp_path / "val.bin", list(range(50, 60)))
    np.save(tmp_path / "train_2.npy", np.arange(20, 40, dtype=np.uint32))
    (tmp_path / "prepare.py").write_text("print()")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\0")
    found = data.shards(tmp_path)
    assert found is not None
    assert not any(a.flags.owndata for a in found.arrays)
    assert (found.size, found.held_out, found.largest()) == (50, 10, 59)
    assert found[np.array([[19, 20], [39, 40]])].tolist() == [[19, 20], [39, 50]]
    assert found[18:42][np.arange(24)].tolist() == [*range(18, 40), 50, 51]
    assert found[np.arange(0)].tolist() == []
    train, tuning, validation = data.split(found, 1)
    assert (train.size, tuning.size, validation.size) == (36, 4, 10)
    assert data.parts(found, 1, "validation")[0].size == 40
    assert [w.tolist() for w in data.windows(tuning, 2)] == [[[36, 37, 38]], [[38, 39]]]
    drawn = data.batch(train, 100, 4, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn.max() == 35


def test_digest_of_shards_is_that_of_their_bytes(tmp_path: Path) -> None:
    bin_file(tmp_path / "a.bin", [1, 2])
    bin_file(tmp_path / "b.bin", [3])
    found = data.shards(tmp_path)
    assert found is not None
    assert data.digest(found) == data.digest(np.array([1, 0, 2, 0, 3, 0], np.uint8))


def test_one_shard_is_its_file_with_or_without_a_header(tmp_path: Path) -> None:
    head = np.zeros(256, "<i4")
    head[:3] = [data.HEADER_MAGIC, 1, 3]
    bin_file(tmp_path / "a.bin", [7, 8, 9])
    bin_file(tmp_path / "b.bin", [7, 8, 9], head.tobytes())
    for name in ("a.bin", "b.bin"):
        found = data.shards(tmp_path / name)
        assert found is not None
        assert found[np.arange(3)].tolist() == [7, 8, 9]
        assert found.held_out == 0
    bin_file(tmp_path / "b.bin", [7, 8], head.tobytes())
    with pytest.raises(UsageError, match=r"b\.bin: its header says 3 tokens of 2 bytes, 4 bytes follow it"):
        data.shards(tmp_path / "b.bin")


def test_texts_and_pictures_are_no_shards_and_bad_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "c.bin").write_bytes(b"\0")
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 4), np.uint8))
    assert [data.shards(p) for p in (None, tmp_path, tmp_path / "a.txt", tmp_path / "images.npy", tmp_path / "none")] == [None] * 5
    with pytest.raises(UsageError, match=r"c\.bin: expected tokens of 2 bytes each \(uint16\), got 1 bytes"):
        data.shards(tmp_path / "c.bin")
    bin_file(tmp_path / "train.bin", [1])
    (tmp_path / "c.bin").unlink()
    with pytest.raises(UsageError, match=r"images\.npy: expected a row of uint16 or uint32"):
        data.shards(tmp_path)
    (tmp_path / "images.npy").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"images\.npy cannot be read"):
        data.shards(tmp_path)

from pathlib import Path

import numpy as np
import pytest

from onetorch.generative.describe import describe
from onetorch.runs.errors import UsageError


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello\n" * 10)
    (tmp_path / "b.txt").write_bytes(b"world\n" * 30)
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    rows = dict(describe(tmp_path))
    assert rows["kind"].startswith("text")
    assert rows["files"] == "2"
    assert rows["left out"] == "1 that hold a zero byte: c.bin"
    assert rows["bytes"] == "240 in 40 lines; 8 different ones"  # h e l o w r d and the end of a line
    assert rows["encoding"] == "UTF-8"
    assert rows["parts"] == "192 bytes to train on, 24 for tuning, 24 for validation"
    assert rows["context"] == "at most 11"  # two windows of 11 and the byte before them are 23


def test_a_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 50 + b"\xff" + b"y" * 50)
    assert "not UTF-8: invalid start byte at byte 50" in dict(describe(tmp_path / "a.txt"))["encoding"]


def test_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 4, 6), np.uint8), labels=np.arange(20) % 2)
    rows = dict(describe(tmp_path / "a.npz"))
    assert rows["images"] == "20 of 6 x 4 pixels, 1 channel"
    assert rows["labels"] == "2: 0 10, 1 10"
    assert rows["for gpt"] == "--images data --context 24 --vocabulary 257, pixel after pixel"
    assert rows["parts"].startswith("15 to train on")  # n / 1.618… has a fractional part below a fifth for n of 0, 5, 10, 13, 18


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"no array")
    (tmp_path / "short.txt").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good.png").write_bytes(b"no picture")
    for name in ("bad.npy", "short.txt", "missing", "folder"):
        with pytest.raises(UsageError, match="good.png" if name == "folder" else name):
            describe(tmp_path / name)


def test_token_shards(tmp_path: Path) -> None:
    for name, size in (("train.bin", 900), ("val.bin", 100)):
        (tmp_path / name).write_bytes((np.arange(size) % 65).astype("<u2").tobytes())
    rows = dict(describe(tmp_path))
    assert rows["kind"].startswith("token shards")
    assert rows["tokens"] == "1,000 in 2 files, uint16"
    assert rows["vocabulary"] == "the largest token is 64: --vocabulary 65 or more"
    assert rows["parts"] == "810 tokens to train on, 90 for tuning, 100 for validation (by the names of the files)"
    assert rows["context"] == "at most 44"
    assert "validation (the last tenth)" in dict(describe(tmp_path / "train.bin"))["parts"]

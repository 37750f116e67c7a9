"""Tensors out of pickles."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError, UsageError
from onetorch.share.port import tensors_of


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_state_dict_becomes_safetensors(tmp_path: Path, onetorch) -> None:
    weights = {"a.weight": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.int64)}
    torch.save({"epoch": 3, "model": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "w.pt")
    code, out, err = onetorch("port", "w.pt", "w.safetensors", "--key", "model")
    assert (code, err) == (0, "")
    assert "2 tensors, 56 bytes" in out
    found = sealed.parse(sealed.read(tmp_path / "w.safetensors")[0], "x")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], w) for n, w in weights.items())
    code, _, err = onetorch("port", "w.pt", "w.safetensors")
    assert code == 2
    assert "exists already" in err


def test_a_pickle_that_executes_is_refused(tmp_path: Path) -> None:
    torch.save({"w": Evil(tmp_path / "canary")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt is refused: UnpicklingError"):
        tensors_of(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()


def test_a_file_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    # A tensor of 8 GB in which every element is the same four bytes, and a compressed archive of zeros.
    torch.save({"w": torch.zeros(1).expand(1 << 31)}, tmp_path / "stride.pt")
    with pytest.raises(CheckpointError, match=r"stride.pt is refused: ValueError: \d+ bytes that claim to be tensors of 8589934592"):
        tensors_of(tmp_path / "stride.pt")
    torch.save({"w": torch.zeros(1 << 27)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for name in plain.namelist():
            with plain.open(name) as source, bomb.open(name, "w") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
    (tmp_path / "plain.pt").unlink()
    with pytest.raises(CheckpointError, match=r"bomb.pt is refused"):
        tensors_of(tmp_path / "bomb.pt")


def test_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"\.safetensors, \.pt"):
        tensors_of(tmp_path / "w.pkl")
    (tmp_path / "w.pt").symlink_to(tmp_path / "w.pkl")
    with pytest.raises(CheckpointError, match="symbolic link"):
        tensors_of(tmp_path / "w.pt")

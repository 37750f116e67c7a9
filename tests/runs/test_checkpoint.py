import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from onetorch.runs import checkpoint, sealed, state
from onetorch.runs.errors import CheckpointError, RunError

MODEL = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
STATE = {"m": torch.ones(3, dtype=torch.float64), "flags": torch.tensor([True, False, True]), "none": torch.zeros(0, 2)}


def save(parent: Path, step: int, **more: Any) -> Path:
    return checkpoint.save(parent, step, MODEL, STATE, {"step": step, **more})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    where = save(tmp_path / "c", 7, text="ü")
    found = checkpoint.load(where)
    assert where.name == "00000007"
    assert (found.step, found.record) == (7, {"step": 7, "text": "ü"})
    for saved, loaded in ((MODEL, found.model), (STATE, found.state)):
        assert saved.keys() == loaded.keys()
        assert all(saved[k].dtype == loaded[k].dtype and torch.equal(saved[k], loaded[k]) for k in saved)
    assert checkpoint.load(where, only_model=True).state == {}
    assert sorted(p.name for p in where.parent.iterdir()) == ["00000007"]


def test_the_manifest_holds_sizes_and_hashes_of_the_files(tmp_path: Path) -> None:
    where = save(tmp_path, 3)
    manifest = json.loads((where / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 3)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in where.iterdir() if p.name != "manifest.json"}
    assert manifest["files"] == files
    assert set(files) == {"model.safetensors", "state.safetensors", "state.json"}


def every_dtype() -> dict[str, torch.Tensor]:
    made = {str(dtype): torch.arange(5).to(dtype) for dtype in sealed.DTYPES}
    whole = torch.arange(24.0).reshape(4, 6)
    made |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(3, 0), "transposed": whole.t(), "slice": whole[1:3, ::2], "again": whole}
    made |= {"expanded": torch.ones(1).expand(4), "conjugate": torch.tensor([1 + 2j]).conj(), "parameter": nn.Parameter(torch.ones(2))}
    made['odd "name"\n'] = torch.ones(1)
    return made


def test_any_reader_of_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = tmp_path / "x.safetensors"
    sealed.write(path, sealed.dump(tensors))
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].float(), tensor.detach().float()) if not tensor.is_complex() else torch.equal(found[name], tensor), name
    entry = checkpoint._entry(sealed.dump(tensors))
    assert entry == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_the_header_is_as_the_format_says(tmp_path: Path) -> None:
    content = b"".join(bytes(piece) for piece in sealed.dump({"a": torch.tensor([1, 2], dtype=torch.uint8), "b": torch.tensor([1.0])}))
    size = int.from_bytes(content[:8], "little")
    header = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]}}
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size]) == {"__metadata__": {"format": "pt"}} | header
    assert content[8 + size :] == b"\x00\x00\x80\x3f\x01\x02"


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_a_tensor_that_cannot_be_saved_is_named_and_leaves_nothing(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(RunError, match="state odd: a tensor of"):
        checkpoint.save(tmp_path / "c", 1, {"odd": tensor}, {}, {"step": 1})
    assert not (tmp_path / "c").exists()


def test_a_large_state_is_saved_as_a_small_one(tmp_path: Path) -> None:
    big = {"big": torch.arange(1_500_007, dtype=torch.int32)}
    found = checkpoint.load(checkpoint.save(tmp_path, 1, big, big, {"step": 1}))
    assert torch.equal(found.model["big"], big["big"])
    assert torch.equal(found.state["big"], big["big"])


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fresh[1].weight = fresh[0].weight
    found = checkpoint.load(checkpoint.save(tmp_path, 1, tied.state_dict(), {}, {"step": 1}))
    fresh.load_state_dict(found.model)
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[0].weight, tied[0].weight)


def test_the_newest_two_are_kept_and_what_killed_saves_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".new-00000001-99").mkdir()
    (tmp_path / ".old-00000001-ab").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (5, 20, 100, 99_999_999, 100_000_000):
        save(tmp_path, step)
        checkpoint.retire(tmp_path)
    assert checkpoint.steps(tmp_path) == [100_000_000, 99_999_999]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100000000", "99999999", "notes.txt"]


def test_the_newest_that_verifies_is_taken(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "00000003" / "model.safetensors").unlink()
    (tmp_path / "00000002" / "state.json").write_text("{}")
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert ["model.safetensors is missing" in str(damaged[0]), "state.json is damaged: 2 bytes where the manifest says" in str(damaged[1])] == [True, True]


def test_damaged_newer_ones_are_set_aside_and_never_push_out_good_ones(tmp_path: Path) -> None:
    # Of three, two are damaged; were they counted, keeping "the newest two" after the next save would remove every good one.
    for step in (1, 5, 6):
        save(tmp_path, step)
    for step in ("00000005", "00000006"):
        (tmp_path / step / "manifest.json").write_text("")
    save(tmp_path, 2)
    checkpoint.retire(tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 1]
    assert sorted(p.name[:18] for p in tmp_path.glob(".damaged-*")) == [".damaged-00000005-", ".damaged-00000006-"]
    assert checkpoint.newest(tmp_path)[0].step == 2


def test_all_damaged_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        os.truncate(tmp_path / checkpoint.folder_name(step) / "state.safetensors", 10)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are unusable .*nothing was changed.*another --dir"):
        checkpoint.newest(tmp_path)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    where = save(tmp_path, 1)
    for path in sorted(where.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 7 if path.name != "manifest.json" else 1):
            flip(path, place)
            with pytest.raises(CheckpointError):
                checkpoint.load(where)
            path.write_bytes(content)
    assert checkpoint.load(where).step == 1


def rewrite(where: Path, **changes: Any) -> None:
    manifest = json.loads((where / "manifest.json").read_text()) | changes
    (where / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def forge(where: Path, name: str, content: bytes) -> None:
    (where / name).write_bytes(content)
    files = json.loads((where / "manifest.json").read_text())["files"]
    rewrite(where, files=files | {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: os.truncate(w / "model.safetensors", 20), "20 bytes where the manifest says"),
        (lambda w: flip(w / "state.json", 3), "its SHA-256 is not the manifest's"),
        (lambda w: (w / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda w: (w / "manifest.json").write_text("[" * 60_000), "not JSON"),
        (lambda w: (w / "manifest.json").write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda w: (w / "manifest.json").write_text(" " * 70_000), "at most 65536 are expected"),
        (lambda w: rewrite(w, format=0), "has format 0, this onetorch reads format 1; use the version"),
        (lambda w: rewrite(w, format=2), "has format 2"),
        (lambda w: rewrite(w, format=True), "has format True"),
        (lambda w: rewrite(w, step=2), "renamed or swapped"),
        (lambda w: rewrite(w, step=1.0), "renamed or swapped"),
        (lambda w: rewrite(w, more=1), "expected format, step and the files"),
        (lambda w: rewrite(w, files=None), "expected format, step and the files"),
        (lambda w: rewrite(w, files={"model.safetensors": 1, "state.safetensors": 1, "state.json": 1}), "needs bytes and sha256"),
        (lambda w: (w / "model.safetensors").rename(w / "x") and (w / "model.safetensors").symlink_to("x"), "is a symbolic link"),
        (lambda w: (w / "model.safetensors").unlink() or (w / "model.safetensors").mkdir(), "model.safetensors"),
        (lambda w: (w / "model.safetensors").unlink() or os.mkfifo(w / "model.safetensors"), "no regular file"),
        (lambda w: forge(w, "model.safetensors", b"\x80\x04K\x01."), "cannot be read although its hashes agree"),
        (lambda w: forge(w, "state.json", b"{"), "cannot be read although its hashes agree"),
        (lambda w: forge(w, "state.json", b"[" * 100_000), "cannot be read although its hashes agree"),
        (lambda w: forge(w, "state.json", b'{"step": 4}'), "of another step"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, said: str) -> None:
    where = save(tmp_path, 1)
    damage(where)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(where)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_swapped_or_renamed_checkpoint_is_found(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1, a=1), save(tmp_path, 2, a=2)
    shutil.copy(one / "state.json", two / "state.json")
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(two)
    two.rename(tmp_path / "00000009")
    with pytest.raises(CheckpointError, match="renamed or swapped"):
        checkpoint.load(tmp_path / "00000009")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(path: Path, pieces: list[Any]) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write", full)
        with pytest.raises(RunError, match=r"no checkpoint at step 2: .*the disk is full: free some space; earlier ones stand"):
            save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_a_state_with_everything_goes_through_files(tmp_path: Path) -> None:
    values = {"a": [1, (2, {"b": torch.eye(2)})], "inf": float("inf")}
    tensors: dict[str, torch.Tensor] = {}
    tree = state.pack(values, "x", tensors)
    found = checkpoint.load(checkpoint.save(tmp_path, 1, {}, tensors, {"step": 1, "tree": tree}))
    again = state.unpack(found.record["tree"], found.state)
    assert again["inf"] == float("inf")
    assert torch.equal(again["a"][1][1]["b"], torch.eye(2))

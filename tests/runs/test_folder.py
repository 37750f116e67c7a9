import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onetorch.runs import folder
from onetorch.runs.errors import RunError, UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def test_json_is_replaced_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    folder.write_json(path, {"format": 1, "a": "ü"})
    assert folder.read_json(path) == {"format": 1, "a": "ü"}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"x\.json: the disk is full: free some space"):
        folder.write_json(path, {"format": 1, "a": "new"})
    assert folder.read_json(path)["a"] == "ü"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged (not JSON"),
        (b"\xff\xff", "damaged (not JSON"),
        (b"[" * 100_000, "damaged (not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"format": 99}', "has format 99, this onetorch reads format 1; use the version of onetorch that wrote it"),
        (b"{}", "has format None"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunError) as caught:
        folder.read_json(tmp_path / "x.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x\.json is missing"):
        folder.read_json(tmp_path / "x.json")
    (tmp_path / "y.json").mkdir()
    with pytest.raises(RunError, match=r"y\.json"):
        folder.read_json(tmp_path / "y.json")


def test_the_lock_is_exclusive_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    code = f"from onetorch.runs.folder import Lock; from pathlib import Path; l = Lock(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert str(process.pid) in (folder.owner(tmp_path) or "")
        with pytest.raises(UsageError, match=f"is in use by process {process.pid} on .*wait for it or stop it"):
            folder.Lock(tmp_path)
        assert "in use by process" in str(folder.refuse(tmp_path))
        assert folder.status(tmp_path, {"status": "running"}) == "running"
        process.kill()
        process.wait()
    assert folder.owner(tmp_path) is None
    assert folder.status(tmp_path, {"status": "running"}) == "killed"
    assert "already holds a run" in str(folder.refuse(tmp_path))
    lock = folder.Lock(tmp_path)
    assert str(os.getpid()) in (folder.owner(tmp_path) or "")
    lock.release()


def test_rows_without_the_one_that_a_kill_cut_short(tmp_path: Path) -> None:
    assert list(folder.rows(tmp_path)) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in folder.rows(tmp_path)] == [1, 2]
    for damage in ("nonsense\n", "[]\n", '{"step": "1"}\n', "[" * 100_000 + "\n"):
        path.write_text('{"step": 1}\n' + damage + '{"step": 3}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl:2 is damaged"):
            list(folder.rows(tmp_path))


def test_config_names_file_and_field(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": {"sed": 1}}))
    with pytest.raises(UsageError, match=r"config\.json: there is no field 'sed' \(did you mean 'seed'\?\)"):
        folder.config(tmp_path, Config)

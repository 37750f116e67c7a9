"""What came from a stranger: nothing of it is executed, followed or believed unasked."""

import importlib._bootstrap_external as bootstrap
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import onetorch as package
from onetorch.runs import sealed, trust
from onetorch.runs.errors import CheckpointError, UsageError
from onetorch.share import folder, places
from onetorch.share.verify import verify


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def infect(path: Path, canary: Path) -> None:
    """source.py that executes in four places where reading a Config or importing would."""
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    text = path.read_text()
    text = text.replace("import enum\n", f"import enum\nX = {touch}\n", 1)
    text = text.replace("    FAST = 0.1\n", f"    FAST = 0.1\n    {touch}\n", 1)
    text = text.replace("rows: int = 32", f"rows: int = ({touch} or 32)", 1)
    path.write_text(text)


def test_code_of_a_received_model_runs_only_when_trusted(model: Path, canary: Path, tmp_path: Path, onetorch, reseal) -> None:
    infect(model / "source.py", canary)
    reseal(model)
    with pytest.raises(UsageError, match="--trust-code"):
        package.load(model)
    for words in (["verify", model], ["verify", model, "--results"], ["get", model, "got"], ["show", model / "source.py"], ["train", model / "source.py"],
                  ["new", "mine", "--from", model / "source.py"], ["eval", model], ["resume", model], ["train", model / "source.py", "--help"]):  # fmt: skip
        code, _, err = onetorch(*words)
        assert code in (2, 3), words
        assert "--trust-code" in err or "is a model folder, not a run" in err, err
        assert not canary.exists(), words
    code, out, _ = onetorch("verify", model, "--trust-code")
    assert code == 0
    assert canary.exists()
    assert "X = __import__('pathlib')" in out  # shown before


def test_own_model_folders_code_is_asked_for_too(model: Path, onetorch) -> None:
    assert onetorch("verify", model)[0] == 2  # the user has trained this code, but a model folder is a stranger's


def test_code_of_a_received_run_is_not_the_users(run: Path, canary: Path, onetorch) -> None:
    assert onetorch("eval", run)[0] == 0  # trained here
    infect(run / "source.py", canary)
    for words in (["eval", run], ["resume", run], ["eval", run, "--help"], ["share", run, "x", "--yes"], ["show", run / "source.py"]):
        code, _, err = onetorch(*words)
        assert code == 2, words
        assert "not code that you have trained" in err
        assert not canary.exists(), words
    with pytest.raises(UsageError, match="--trust-code"):
        package.load(run)
    assert onetorch("eval", run, "--trust-code")[0] == 0
    assert canary.exists()


def test_a_run_stays_the_users_where_it_is_moved(run: Path, tmp_path: Path, onetorch, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere" / "it"
    shutil.copytree(run, moved)
    assert onetorch("eval", moved)[0] == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    assert onetorch("eval", moved)[0] == 2


def test_a_link_to_code_elsewhere_is_not_followed(run: Path, canary: Path, tmp_path: Path, onetorch) -> None:
    (run / "source.py").rename(tmp_path / "other.py")
    infect(tmp_path / "other.py", canary)
    (run / "source.py").symlink_to(tmp_path / "other.py")
    assert onetorch("eval", run)[0] == 2
    assert not canary.exists()


def test_compiled_files_beside_the_source_are_not_believed(run: Path, canary: Path, onetorch) -> None:
    code = compile(f"import pathlib; pathlib.Path({str(canary)!r}).touch()", "source.py", "exec")
    (run / "__pycache__").mkdir()
    unchecked = bootstrap._code_to_hash_pyc(code, b"\0" * 8, False)
    (run / "__pycache__" / f"source.{sys.implementation.cache_tag}.pyc").write_bytes(unchecked)
    assert onetorch("eval", run)[0] == 0
    assert not canary.exists()


def test_a_config_cannot_import_a_module(tmp_path: Path, model: Path, onetorch, monkeypatch: pytest.MonkeyPatch, reseal) -> None:
    ppo = pytest.importorskip("onetorch.rl.ppo")
    from onetorch.runs.config import to_json

    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = {"format": 1, "recipe": "ppo", "algorithm": "onetorch.rl.ppo", "config": to_json(ppo.Config()) | {"env": "evil_module:Evil-v0"}}
    (model / "config.json").write_text(json.dumps(entry))
    reseal(model)
    code, _, err = onetorch("verify", model)
    assert code == 2
    assert "'import evil_module'" in err
    received = tmp_path / "received"
    received.mkdir()
    (received / "config.json").write_text(json.dumps(entry))
    code, _, err = onetorch("eval", received)
    assert code == 2
    assert "'import evil_module'" in err


def test_shown_code_hides_nothing(model: Path, onetorch, reseal) -> None:
    text = (model / "source.py").read_text()
    (model / "source.py").write_text(text + "# \x1b[2K\x1b[1A hidden \u202e rtl \r over\n", newline="")
    reseal(model)
    _, out, _ = onetorch("verify", model, "--trust-code")
    assert "\\x1b[2K\\x1b[1A hidden \\u202e rtl \\r over" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "sub/evil", "evil\\x", "model.safetensors\x00", ".bashrc", "torch.py", "manifest.json", ""])
def test_names_outside_the_list_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    data = json.loads((model / "manifest.json").read_text())
    data["files"][name] = {"bytes": 4, "sha256": "0" * 64}
    (model / "manifest.json").write_text(json.dumps(data, indent=1) + "\n")
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"manifest.json names the file"):
        folder.fetch(places.local(model), tmp_path / "got")
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "README.md"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing"])
def test_only_regular_files_are_read(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    (model / name).rename(tmp_path / "aside")
    if kind == "link":
        (model / name).symlink_to(tmp_path / "aside")
    elif kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        folder.read(places.local(model))


def test_sizes_are_compared_before_anything_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads((model / "manifest.json").read_text())
    listed["files"]["model.safetensors"]["bytes"] = 2**33
    (model / "manifest.json").write_text(json.dumps(listed, indent=1) + "\n")
    read: list[int] = []
    original = sealed.absorb
    monkeypatch.setattr(sealed, "absorb", lambda stream, size, *sinks: read.append(size) or original(stream, size, *sinks))
    with pytest.raises(CheckpointError, match="where the manifest says 8589934592"):
        folder.read(places.local(model))
    assert max(read) < 65_536


def test_a_config_cannot_ask_for_more_than_its_weights(model: Path, reseal) -> None:
    # In a process without limits the first would take 4 TB, the second forever.
    for change in ({"width": 10**6}, {"width": 10**9}):
        entry = json.loads((model / "config.json").read_text())
        entry["config"] |= change
        (model / "config.json").write_text(json.dumps(entry))
        reseal(model)
        with pytest.raises(CheckpointError, match=r"config.json asks for more memory than the weights explain"):
            verify(folder.read(places.local(model)), trust.anybody)


def test_inputs_cannot_ask_for_more_than_the_weights(model: Path, reseal) -> None:
    (model / "golden.safetensors").unlink()
    sealed.write(model / "golden.safetensors", sealed.dump({"input.0": torch.zeros(200_000, 16, dtype=torch.int8), "output": torch.zeros(1)}))
    reseal(model)
    with pytest.raises(CheckpointError, match=r"golden.safetensors"):
        verify(folder.read(places.local(model)), trust.anybody)


def test_unnamed_files_are_refused_and_hidden_ones_never_read(model: Path) -> None:
    (model / ".gitattributes").write_text("x")
    folder.read(places.local(model))
    (model / "torch.py").write_text("x")
    with pytest.raises(CheckpointError, match=r"torch.py is not named by the manifest"):
        folder.read(places.local(model))

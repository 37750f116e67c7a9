"""A trained run of `tiny.py` and its model folder, made once; copies for each test that changes one."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onetorch import cli

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("share")
    assert cli.main(["train", str(TINY), "--dir", str(where / "run"), "--optim.rate", "SLOW", "--width", "16"]) == 0
    assert cli.main(["share", str(where / "run"), str(where / "model"), "--license", "MIT", "--yes"]) == 0
    return where


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is worth waking other cores, which may be busy
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base / "run", tmp_path / "run")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base / "model", tmp_path / "model")


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """Give a folder a manifest that fits what stands in it."""

    def call(model: Path) -> None:
        contents = {p.name: p.read_bytes() for p in sorted(model.iterdir()) if p.name != "manifest.json"}
        files = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()}
        (model / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")

    return call


@pytest.fixture
def hub() -> Iterator[Any]:
    """The stand-in of the Hub, serving."""
    spec = importlib.util.spec_from_file_location("hub", Path(__file__).with_name("hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Hub() as serving:
        yield serving


@pytest.fixture
def onetorch(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: (exit code, what it printed, what it said on stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(w) for w in words])
        return code, *capsys.readouterr()

    return call

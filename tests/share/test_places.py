"""Folders behind URLs: an HTTP server of files, and a stand-in of the Hub."""

import functools
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch

from onetorch.runs.errors import UsageError
from onetorch.share import folder, places


def test_urls() -> None:
    assert [places.is_url(x) for x in ("s3://a/b", "hf://a/b", "a/b", "/a:b", Path("a"))] == [True, True, False, False, False]
    assert places.hub_repository("hf://ada/model") == "ada/model"
    for wrong in ("hf://ada", "hf://ada/model/file", "hf:///model"):
        with pytest.raises(UsageError, match="hf://owner/name"):
            places.hub_repository(wrong)
    with pytest.raises(UsageError, match="nothing"):
        places.Remote("nothing://x/y")


def test_over_http(model: Path, tmp_path: Path, onetorch) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/model"
        assert onetorch("get", url, "got", "--trust-code")[0] == 0
        (model / "README.md").write_text("changed")
        code, _, err = onetorch("get", url, "got2", "--trust-code")
        server.shutdown()
    assert code == 3
    assert "README.md is damaged" in err
    assert not (tmp_path / "got2").exists()


def test_hub(run: Path, tmp_path: Path, hub) -> None:
    pytest.importorskip("huggingface_hub")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "onetorch", *words], env=os.environ | settings, capture_output=True, text=True, timeout=120)

    shared = call("share", "run", "hf://ada/tiny", "--license", "Apache-2.0", "--yes")
    assert shared.returncode == 0, shared.stderr
    assert hub.private == {"ada/tiny"}
    assert hub.commits == 1
    files = hub.files["ada/tiny"]
    assert set(files) == {*folder.REQUIRED, folder.GOLDEN, folder.MANIFEST, ".gitattributes"}
    assert safetensors.torch.load(files["model.safetensors"]).keys() == {"encode.weight", "decode.weight", "decode.bias"}
    assert files["README.md"].startswith(b"---\nlibrary_name: onetorch\nlicense: apache-2.0\ntags: ")
    assert b'onetorch.load("hf://ada/tiny", trust_code=True)' in files["README.md"]
    got = call("get", "hf://ada/tiny", "--trust-code")
    assert got.returncode == 0, got.stderr
    assert "golden outputs agree" in got.stdout
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == files["model.safetensors"]
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"x"
    refused = call("get", "hf://ada/tiny", "again", "--trust-code")
    assert refused.returncode == 3
    assert "model.safetensors is damaged" in refused.stderr
    assert not (tmp_path / "again").exists()

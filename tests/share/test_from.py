"""Runs that begin from given weights."""

import json
from pathlib import Path

import pytest
import torch

from onetorch.runs import checkpoint, sealed
from onetorch.runs.config import to_json
from onetorch.runs.errors import CheckpointError, UsageError
from onetorch.runs.run import Run
from onetorch.share.load import load_run, weights_of

WORDS = ["--width", "16", "--steps", "3"]


def final(run: Path) -> dict[str, torch.Tensor]:
    found, _ = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return found.model | {f"state {k}": v for k, v in found.state.items()}


def test_training_goes_on_from_a_model_folder(model: Path, tmp_path: Path, onetorch) -> None:
    tiny = Path(__file__).with_name("tiny.py")
    assert onetorch("train", tiny, *WORDS, "--from", model, "--dir", "a")[0] == 0  # weights alone: nothing of the folder runs
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["from"]["path"] == str(model)
    assert record["from"]["recipe"] == "tiny"
    assert record["command"].endswith(f"--from {model}")
    began = sealed.parse(sealed.read(tmp_path / "a" / "initial.safetensors")[0], "x")
    assert all(torch.equal(began[n], w) for n, w in weights_of(str(model))[0].items())
    # Three steps of at most 1e-5 in each weight: the weights are near those, and not the fresh ones of a run without --from.
    assert onetorch("train", tiny, *WORDS, "--dir", "fresh")[0] == 0
    there, fresh = final(tmp_path / "a"), final(tmp_path / "fresh")
    assert (there["encode.weight"] - began["encode.weight"]).abs().max() < 1e-3
    assert (fresh["encode.weight"] - began["encode.weight"]).abs().max() > 1e-5
    assert torch.equal(there["state target.encode.weight"], began["encode.weight"])  # a copy made after run.initialize


def test_killed_before_its_first_checkpoint_it_begins_from_the_same_weights(run: Path, model: Path, tmp_path: Path, onetorch) -> None:
    tiny = Path(__file__).with_name("tiny.py")
    assert onetorch("train", tiny, *WORDS, "--from", model, "--dir", "a")[0] == 0
    whole = load_run(run)
    weights, origin = weights_of(str(model))
    config = whole.module.Config(width=16, steps=3)
    begun = Run(tmp_path / "b", config, source=tiny, weights=weights, origin=origin, quiet=True)
    begun.close("stopped")  # as one that was killed: no checkpoint
    for path in model.iterdir():
        path.unlink()  # and what it began from is gone
    assert onetorch("resume", tmp_path / "b")[0] == 0
    a, b = final(tmp_path / "a"), final(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_that_do_not_fit_are_refused(model: Path, onetorch) -> None:
    code, _, err = onetorch("train", Path(__file__).with_name("tiny.py"), "--from", model, "--dir", "a")
    assert code == 2
    assert "decode.bias is (16,) float32, the model's is (8,) float32" in err
    assert not Path("a").exists()  # the copy of the weights is taken back too


def test_weights_of_files_and_runs(run: Path, model: Path, tmp_path: Path) -> None:
    wanted = weights_of(str(model))[0]
    torch.save({"state_dict": wanted}, tmp_path / "w.pt")
    sources = [str(run), str(model / "model.safetensors")]
    for source in sources:
        assert all(torch.equal(weights_of(source)[0][name], t) for name, t in wanted.items())
    with pytest.raises(UsageError, match="there is no run"):
        weights_of(str(tmp_path / "none"))


def test_damaged_initial_weights_are_refused(run: Path, model: Path, tmp_path: Path) -> None:
    whole = load_run(run)
    weights, _ = weights_of(str(model))
    config = whole.module.Config(width=16, steps=3)
    Run(tmp_path / "b", config, weights=weights, quiet=True).close("stopped")
    path = tmp_path / "b" / "initial.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with Run(tmp_path / "b", config, resume=True, quiet=True) as again, pytest.raises(CheckpointError, match=r"initial.safetensors is damaged"):
        again.initialize(whole.model)
    assert to_json(config)["width"] == 16

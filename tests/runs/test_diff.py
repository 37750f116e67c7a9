"""What differs between two runs; trained ones, and weights written by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from written import curve, write

from onetorch import cli
from onetorch.runs import algorithm, checkpoint, diff
from onetorch.runs.errors import CheckpointError, RunError
from onetorch.runs.run import Run

idea = algorithm.read(Path(__file__).with_name("idea.py")).load()


def trained(path: Path, **values) -> Path:
    with Run(path, idea.Config(steps=12, **values), quiet=True) as run:
        model = idea.train(run.config, run)
        run.finish()
        run.result(**idea.evaluate(model, run.config))
    return path


def sections(a: Path, b: Path) -> dict[str, list[tuple[str, ...]]]:
    return dict(diff.compare_runs(a, b))


def test_equal_runs_are_said_to_be_equal(tmp_path: Path) -> None:
    found = sections(trained(tmp_path / "a"), trained(tmp_path / "b"))
    assert list(found) == [
        "config: the same",
        "origin: the same",
        "result: the same",
        "metrics: identical in 12 rows but for the time they took",
        "weights: identical, 4 tensors",
    ]


def test_differences_in_config_metrics_and_weights(tmp_path: Path) -> None:
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", lr=0.06)
    found = sections(a, b)
    assert found["config"][1:] == [("lr", "0.05", "0.06")]
    # The first step's loss is of the same weights; the running mean follows it.
    rows = {name: first for name, *_, first in found["metrics"][1:]}
    assert rows == {"loss": "2", "mean": "2"}
    models = [checkpoint.newest(p / "checkpoints", only_model=True)[0].model for p in (a, b)]
    for name, kind, largest, relative, elements in found["weights"][1:]:
        x, y = (m[name].double() for m in models)
        assert kind == f"F32 ({', '.join(map(str, x.shape))})"
        assert float(largest) == pytest.approx((y - x).abs().max().item(), rel=1e-5)
        assert float(relative) == pytest.approx(((y - x).abs().max() / x.abs().max()).item(), rel=1e-2)
        assert elements == f"{int((x != y).sum())} of {x.numel()}"


def test_rows_that_end_or_differ_late(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"seed": 0}, curve([1.0, 2.0, 3.0, 4.0]))
    b = write(tmp_path / "b", {"seed": 0}, curve([1.0, 2.0, 3.5]))
    found = sections(a, b)
    assert "metrics: A has 4 rows, B 3" in found
    assert found["metrics"][1] == ("loss", "4", "3.5", "-0.5", "3")
    assert "weights: A and B has no checkpoint" in found


def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): (torch.randn(3, 5, generator=generator) * 3).to(kind) for kind in kinds}
    save_file(tensors, tmp_path / "t.safetensors")
    read = diff.Tensors(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(diff.decode(read.raw(name), read.dtype(name)), tensor.double().numpy().ravel())


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for change in (
        b"",
        b"\xff" * 20,
        _file({**header, "x": header["x"] | {"data_offsets": [0, 9000]}}),
        _file({**header, "x": header["x"] | {"shape": [3]}}),
        _file({"x": 3}),
        _file([1]),
    ):
        path.write_bytes(change)
        with pytest.raises(RunError, match="no safetensors file"):
            diff.Tensors(path)


def _file(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


def test_a_damaged_checkpoint_is_not_compared(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    for model in b.glob("checkpoints/*/model.safetensors"):
        raw = bytearray(model.read_bytes())
        raw[-1] ^= 1
        model.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not what its manifest says"):
        sections(a, b)


def test_the_command_prints_tables_and_imports_no_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", seed=1)
    assert cli.main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    for words in ("CONFIG", "seed", "METRIC", "TENSOR", "0.weight", "0 of 4 tensors are identical"):
        assert words in out
    code = f"import sys; from onetorch import cli; cli.main(['diff', {str(a)!r}, {str(b)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert cli.main(["diff", str(a)]) == 2
    assert cli.main(["diff", str(a), str(tmp_path / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err

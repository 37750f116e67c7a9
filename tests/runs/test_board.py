"""TensorBoard's event files, read back by TensorBoard itself."""

import importlib.util
import sys
from pathlib import Path

import pytest
from written import curve, grid, write

from onetorch import cli

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard (extra board) is not installed")


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own
def test_every_number_is_there_with_its_step_and_time(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [*curve([3.0, 2.5, 0.1], every=10), {"step": 30, "return": 7, "note": "text"}]
    run = write(tmp_path / "r", {"seed": 0, "lr": 0.5}, rows)
    for _ in range(2):  # again: written anew, nothing twice
        assert cli.main(["board", str(run), "--out", str(tmp_path / "board")]) == 0
    events = EventAccumulator(str(tmp_path / "board" / "r"), size_guidance={"scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "return"]
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [step for step, _ in found] == [10, 20, 30]
    assert [value for _, value in found] == pytest.approx([3.0, 2.5, 0.1])
    begun = 1767225600  # 2026-01-01T00:00:00+0000
    assert [e.wall_time for e in events.Scalars("loss")] == pytest.approx([begun + 0.1, begun + 0.2, begun + 0.3])
    assert b"lr" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@needs_tensorboard
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = grid(tmp_path / "sweep", seeds=1)
    (tmp_path / "out" / "made-0.1-4-0").mkdir(parents=True)
    (tmp_path / "out" / "made-0.1-4-0" / "thesis.tex").touch()
    assert cli.main(["board", str(home), "--out", str(tmp_path / "out")]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "out" / "made-0.1-4-0" / "thesis.tex").exists()


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    assert cli.main(["board", str(grid(tmp_path / "sweep", seeds=1)), "--out", str(tmp_path / "board")]) == 2
    assert "pip install 'onetorch[board]'" in capsys.readouterr().err

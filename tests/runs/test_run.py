import dataclasses
import errno
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onetorch import cli
from onetorch.runs import algorithm, checkpoint, folder, provenance, sealed
from onetorch.runs import run as runs
from onetorch.runs.errors import CheckpointError, NonFinite, RunError, Stopped, UsageError
from onetorch.runs.run import Run

IDEA = Path(__file__).with_name("idea.py")
idea = algorithm.read(IDEA).load()


@dataclasses.dataclass
class State:
    model: nn.Module
    note: Any = None
    iteration: int = 0


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs with checkpoint_seconds=0 save after every iteration."""
    monkeypatch.setattr(runs, "CHECKPOINT_SHARE", math.inf)


def train(where: Path, resume: bool = False, config: Any = None, seconds: float = 0.0) -> None:
    config = config or idea.Config(steps=6)
    with Run(where, config, resume=resume, checkpoint_seconds=seconds, quiet=True) as run:
        idea.train(config, run)


def outcome(where: Path) -> tuple[Any, ...]:
    """What must not depend on interruptions: last step, weights, state and metrics but for the times."""
    found, damaged = checkpoint.newest(where / "checkpoints")
    assert found is not None
    assert damaged == []
    tensors = {k: v.tolist() for k, v in {**found.model, **found.state}.items() if not k.startswith("generators.numpy")}
    rows = [{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(where)]
    return found.step, tensors, found.record["state"]["fields"], rows


def tree(where: Path) -> dict[str, bytes]:
    return {str(p.relative_to(where)): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file()}


class Killed(BaseException):
    pass


def dies_after(step: int) -> Callable[[Any, Any], None]:
    def checkpoint_and_die(self: Run, state: Any) -> None:
        if self.iteration == step:
            self._flush()
            raise Killed
        original(self, state)

    original = Run.checkpoint
    return checkpoint_and_die


# -- the folder ----------------------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    train(tmp_path / "r", config=idea.Config(steps=6, hidden=(3,)))
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {"config.json", "run.json", "metrics.jsonl", "checkpoints", "source.py"}
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["algorithm"] == "source.py"
    assert config["config"] == {"seed": 0, "steps": 6, "lr": 0.05, "hidden": [3], "pause": 0.0, "break_at": 0}
    assert (tmp_path / "r" / "source.py").read_bytes() == IDEA.read_bytes()
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["progress"] == {"done": 6, "total": 6, "unit": "steps", "scale": 1}
    assert {"torch", "numpy", "python"} <= record["versions"].keys()
    assert record["hardware"]["cores"] >= 1
    assert record["cost"]["seconds"] > 0
    assert [row["step"] for row in folder.rows(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]


def test_taking_the_run_away_changes_nothing(tmp_path: Path) -> None:
    class Nothing:
        """What remains of the verbs when every line that says `run.` is deleted."""

        def restore(self, state: Any) -> Any:
            return state

        def steps(self, done: int, total: int) -> Any:
            return range(done + 1, total + 1)

        def ignore(self, *args: Any, **values: Any) -> None:
            pass

        finite = log = checkpoint = ignore

    with Run(tmp_path / "r", idea.Config(steps=6), quiet=True) as run:
        model = idea.train(idea.Config(steps=6), run)
    bare = idea.train(idea.Config(steps=6), Nothing())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True))


def test_a_run_in_library_use_can_be_loaded_and_resumed(tmp_path: Path, every: None) -> None:
    import onetorch

    train(tmp_path / "r")
    model = onetorch.load(tmp_path / "r")
    assert not model.training
    found, _ = checkpoint.newest(tmp_path / "r" / "checkpoints")
    assert all(torch.equal(v, found.model[k]) for k, v in model.state_dict().items())
    before = outcome(tmp_path / "r")
    train(tmp_path / "r", resume=True)
    assert outcome(tmp_path / "r") == before


def test_a_run_refused_before_its_first_iteration_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for where in ("r", "runs/of/today", "mine/r"):
        with pytest.raises(UsageError, match="no such environment"), Run(tmp_path / where, idea.Config(), quiet=True):
            raise UsageError("no such environment")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_folder_that_is_not_for_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    train(tmp_path / "r")
    before = tree(tmp_path)
    for where, said in (("file", "is a file"), ("full", r"thesis\.tex stands in it"), ("r", "already holds a run; `onetorch resume")):
        with pytest.raises(UsageError, match=said):
            Run(tmp_path / where, idea.Config())
    with pytest.raises(UsageError, match="holds no run"):
        Run(tmp_path / "full", idea.Config(), resume=True)
    with pytest.raises(UsageError, match=r"is not the config that was given"):
        Run(tmp_path / "r", idea.Config(lr=1.0), resume=True)
    with pytest.raises(UsageError, match="an instance of a dataclass"):
        Run(tmp_path / "new", idea.Config)
    del before["r/run.lock"]
    after = tree(tmp_path)
    del after["r/run.lock"]
    assert after == before


def test_a_second_run_in_the_folder_names_the_first(tmp_path: Path) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True):
        for resume in (False, True):
            with pytest.raises(UsageError, match=f"is in use by process {os.getpid()} on"):
                Run(tmp_path / "r", idea.Config(), resume=resume)


def test_what_a_killed_beginning_leaves_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{")
    (tmp_path / "r" / "run.lock").write_text("")
    train(tmp_path / "r")
    assert outcome(tmp_path / "r")[0] == 6


# -- log -----------------------------------------------------------------------------------------------------------------------------------------


def test_rows_hold_what_was_logged(tmp_path: Path) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.log(1, a=1, b=2.5, c=torch.tensor(3.5), d=np.float32(0.5), e="text", f=True, g=None, h=np.int64(4))
        run.log(1, a=0.1)
        run.log(10**12, a=-0.0)
    rows = list(folder.rows(tmp_path / "r"))
    assert {k: v for k, v in rows[0].items() if "seconds" not in k} == {"step": 1, "a": 1, "b": 2.5, "c": 3.5, "d": 0.5, "e": "text", "f": True, "h": 4}
    assert list(rows[0])[:3] == ["step", "seconds", "cpu_seconds"]
    assert [row["step"] for row in rows] == [1, 1, 10**12]


@pytest.mark.parametrize(
    ("step", "values", "said"),
    [
        (2, {"loss": math.nan}, "not finite at step 2: {'loss': nan}"),
        (2, {"loss": torch.tensor(math.inf)}, "not finite at step 2: {'loss': inf}"),
        (2, {"loss": torch.ones(2)}, "loss must be one number or a text"),
        (2, {"loss": [1]}, "loss must be one number or a text"),
        (2, {"loss": np.complex64(1)}, "no number or text at step 2: {'loss'"),
        (2, {"seconds": 3}, "are written by the run"),
        (0, {"loss": 1}, "step 0 comes after step 1; steps never fall"),
        (2.0, {"loss": 1}, "step must be an int, got 2.0"),
        (torch.tensor(2), {"loss": 1}, "step must be an int"),
    ],
)
def test_a_wrong_row_is_refused_and_not_written(tmp_path: Path, step: Any, values: dict[str, Any], said: str) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.log(1, loss=1.0)
        with pytest.raises(ValueError) as caught:
            run.log(step, **values)
        assert said in str(caught.value)
        run.log(3, loss=1.0)
    assert [row["step"] for row in folder.rows(tmp_path / "r")] == [1, 3]


def test_rows_reach_the_file_before_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FLUSH_SECONDS", -1.0)
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.log(1, loss=1.0)
        assert [row["step"] for row in folder.rows(tmp_path / "r")] == [1]


# -- finite --------------------------------------------------------------------------------------------------------------------------------------


def test_finite_names_value_iteration_and_last_good_checkpoint(tmp_path: Path, every: None) -> None:
    config = idea.Config(steps=6, break_at=4)
    with pytest.raises(NonFinite, match=r"loss is nan in iteration 4: the weights were not changed by it; the last good checkpoint is .*00000003"):
        train(tmp_path / "r", config=config)
    step, *_ = outcome(tmp_path / "r")
    assert step == 3
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "loss is nan in iteration 4" in record["why"]
    train(tmp_path / "three", config=idea.Config(steps=3))
    good, broken = (checkpoint.newest(tmp_path / n / "checkpoints")[0].model for n in ("three", "r"))
    assert all(torch.equal(good[k], broken[k]) for k in good)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), torch.tensor([1.0, math.inf])])
def test_what_is_not_finite(tmp_path: Path, value: Any) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.finite(a=1, b=0.0, c=torch.tensor(2.0), d=torch.ones(3), e=torch.tensor(3))
        with pytest.raises(NonFinite, match=r"grad_norm is .* there is no checkpoint yet"):
            run.finite(loss=1.0, grad_norm=value)


@pytest.mark.parametrize("where", ["model", "note"])
def test_no_nan_reaches_a_checkpoint(tmp_path: Path, every: None, where: str) -> None:
    with pytest.raises(NonFinite, match=r"holds NaN after iteration 2: nothing was saved; the last good checkpoint is .*00000001"):  # noqa: PT012
        with Run(tmp_path / "r", idea.Config(), checkpoint_seconds=0.0, quiet=True) as run:
            state = run.restore(State(nn.Linear(2, 2), [0.0]))
            for state.iteration in run.steps(state.iteration, 3):
                if state.iteration == 2 and where == "model":
                    state.model.weight.data[0, 0] = math.nan
                elif state.iteration == 2:
                    state.note[0] = math.nan
                run.checkpoint(state)
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [1]


# -- resume --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_killed_anywhere_a_run_ends_as_undisturbed(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", dies_after(step))
        with pytest.raises(Killed):
            train(tmp_path / "cut")
    torch.randn(3), random.random(), np.random.rand()
    train(tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_rows_after_the_checkpoint_are_cut_and_the_clock_goes_on(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", dies_after(4))
        with pytest.raises(Killed):
            train(tmp_path / "r")
    assert [row["step"] for row in folder.rows(tmp_path / "r")] == [1, 2, 3, 4]
    with open(tmp_path / "r" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "half a ro')
    train(tmp_path / "r", resume=True)
    rows = list(folder.rows(tmp_path / "r"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(a["seconds"] <= b["seconds"] and a["cpu_seconds"] <= b["cpu_seconds"] for a, b in itertools.pairwise(rows))


def test_before_the_first_checkpoint_it_says_so_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", dies_after(3))
        with pytest.raises(Killed):
            train(tmp_path / "r", seconds=1000.0)
    assert not (tmp_path / "r" / "checkpoints").exists()
    config = idea.Config(steps=6)
    with Run(tmp_path / "r", config, resume=True) as run:
        idea.train(config, run)
    assert "was stopped before its first checkpoint: it begins again" in capsys.readouterr().err
    assert outcome(tmp_path / "r") == outcome(tmp_path / "whole")


def killed_at_five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", dies_after(5))
        with pytest.raises(Killed):
            train(tmp_path / "r")
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [4, 3]
    return tmp_path / "r"


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_taken(
    tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole")
    where = killed_at_five(tmp_path, monkeypatch)
    os.truncate(where / "checkpoints" / "00000004" / "state.safetensors", 100)
    config = idea.Config(steps=6)
    with Run(where, config, resume=True, checkpoint_seconds=0.0) as run:
        idea.train(config, run)
    said = capsys.readouterr().err
    assert "00000004/state.safetensors is damaged: 100 bytes where the manifest says" in said
    assert "goes on from" in said
    assert "00000003" in said
    assert outcome(where) == outcome(tmp_path / "whole")


def test_all_damaged_is_an_error_and_never_a_start_from_zero(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch) -> None:
    where = killed_at_five(tmp_path, monkeypatch)
    for name in ("00000003", "00000004"):
        (where / "checkpoints" / name / "model.safetensors").unlink()
    before = {k: v for k, v in tree(where).items() if k not in ("run.json", "run.lock")}
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are unusable"):
        train(where, resume=True)
    assert {k: v for k, v in tree(where).items() if k not in ("run.json", "run.lock")} == before


def test_a_changed_config_is_named_with_the_field(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch) -> None:
    where = killed_at_five(tmp_path, monkeypatch)
    path = where / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"config": whole["config"] | {"lr": 0.5}}))
    with pytest.raises(CheckpointError, match=r"config\.json changed since the checkpoint \(lr was 0\.05, is 0\.5\): put it back, or begin a new run"):
        train(where, resume=True, config=idea.Config(steps=6, lr=0.5))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), "rows are lost"),
        (lambda p: os.truncate(p, 5), "rows are lost"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b'"step": 2', b'"step": 3', 1)), "are not those the checkpoint knows"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str) -> None:
    where = killed_at_five(tmp_path, monkeypatch)
    damage(where / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=said):
        train(where, resume=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", b"", "run.json is damaged"),
        ("run.json", b'{"format": 1}', "run.json is damaged (recipe is missing"),
        ("run.json", b'{"format": 0}', "run.json has format 0, this onetorch reads format 1; use the version of onetorch that wrote it"),
        ("config.json", b"{", "config.json is damaged"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str) -> None:
    where = killed_at_five(tmp_path, monkeypatch)
    (where / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        train(where, resume=True)
    assert said in str(caught.value)
    assert (where / name).read_bytes() == content


# -- disks ---------------------------------------------------------------------------------------------------------------------------------------


class Disk:
    """Lets so many operations through, then refuses each with `error`; a refused write leaves half of what was to be written."""

    def __init__(self, patch: pytest.MonkeyPatch, allowed: int, error: int) -> None:
        self.left, self.error = allowed, error
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "truncate")):
            patch.setattr(owner, name, self.guarded(getattr(owner, name)))
        patch.setattr(sealed, "write", self.half(sealed.write))

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.error, os.strerror(self.error))
            return function(*args, **keywords)

        return call

    def half(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, pieces: list[Any]) -> None:
            self.left -= 1
            if self.left < 0:
                path.write_bytes(bytes(pieces[0])[: len(pieces[0]) // 2])
                raise OSError(self.error, os.strerror(self.error))
            write(path, pieces)

        return call


@pytest.mark.parametrize(("error", "said", "stride"), [(errno.ENOSPC, "the disk is full", 1), (errno.EROFS, "the file system is read-only", 9)])
def test_a_disk_that_refuses_at_any_moment_loses_nothing(tmp_path: Path, every: None, error: int, said: str, stride: int) -> None:
    config = idea.Config(steps=3)
    train(tmp_path / "whole", config=config)
    refused = 0
    for allowed in range(0, 200, stride):
        where = tmp_path / str(allowed)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, allowed, error)
            problem = None
            try:
                train(where, config=config)
            except RunError as caught:
                problem = str(caught)
        if problem is None:
            break
        refused += 1
        assert said in problem
        assert "\n" not in problem
        if folder.holds_run(where):
            newest = max(checkpoint.steps(where / "checkpoints"), default=0)
            for step in checkpoint.steps(where / "checkpoints"):
                checkpoint.load(where / "checkpoints" / checkpoint.folder_name(step))
            assert newest <= 3
            train(where, resume=True, config=config)
        else:
            train(where, config=config)
        assert outcome(where) == outcome(tmp_path / "whole")
        shutil.rmtree(where)
    assert refused * stride > 40


def test_a_file_size_limit_is_named(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git", lambda source: (None, ""))  # the diff of a tree being worked on is of any size
    config = idea.Config(steps=3, hidden=(400,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(RunError, match=r"no checkpoint at step 1: .*the file size limit is reached: raise it \(ulimit -f\)"):
            train(tmp_path / "r", config=config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
    train(tmp_path / "r", resume=True, config=config)


def test_a_real_full_disk(tmp_path: Path, every: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git", lambda source: (None, ""))
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        config = idea.Config(steps=6, hidden=(2000,))  # a checkpoint of 110 kB: two and an unfinished third do not fit beside the padding
        (disk / "padding").write_bytes(bytes(120_000))
        with pytest.raises(RunError, match=r"no checkpoint at step 3: .*the disk is full: free some space; earlier ones stand"):
            train(disk / "r", config=config)
        assert checkpoint.steps(disk / "r" / "checkpoints") == [2, 1]
        (disk / "padding").unlink()
        train(disk / "r", resume=True, config=config)
        train(tmp_path / "whole", config=config)
        assert outcome(disk / "r") == outcome(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- stopping ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    train(tmp_path / "whole")
    original = Run.log

    def log(self: Run, step: int, **values: Any) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
        original(self, step, **values)

    handlers = [signal.getsignal(s) for s in runs.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(Stopped) as caught:
            train(tmp_path / "r", seconds=1000.0)
    assert caught.value.code == caught.value.exit_code == code
    assert [signal.getsignal(s) for s in runs.SIGNALS] == handlers
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [3]
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["status"], record["why"]) == ("stopped", f"{signal.Signals(number).name} came")
    train(tmp_path / "r", resume=True)
    assert outcome(tmp_path / "r") == outcome(tmp_path / "whole")


def test_signals_outside_the_loop_stop_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as before, Run(tmp_path / "before", idea.Config(), quiet=True):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        pytest.fail("the signal did not stop it")
    assert before.value.exit_code == 143
    with pytest.raises(Stopped), Run(tmp_path / "after", idea.Config(steps=3), quiet=True) as run:  # noqa: PT012
        idea.train(run.config, run)
        run.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        pytest.fail("the signal did not stop it")
    assert checkpoint.steps(tmp_path / "after" / "checkpoints") == [3]


def test_a_signal_between_a_loop_left_early_and_the_end_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped), Run(tmp_path / "r", idea.Config(), quiet=True) as run:  # noqa: PT012
        state = run.restore(State(nn.Linear(2, 2)))
        for state.iteration in run.steps(state.iteration, 10):
            if state.iteration == 4:
                break
        os.kill(os.getpid(), signal.SIGTERM)
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [4]


def test_a_closed_standard_error_does_not_stop_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, text: bytes) -> int:
        raise BrokenPipeError

    with pytest.raises(Stopped), Run(tmp_path / "r", idea.Config(), quiet=True) as run:  # noqa: PT012
        state = run.restore(State(nn.Linear(2, 2)))
        for state.iteration in run.steps(state.iteration, 10):
            if state.iteration == 2:
                monkeypatch.setattr(os, "write", gone)
                os.kill(os.getpid(), signal.SIGTERM)
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [2]


def test_the_time_limit_stops_and_saves(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="the time limit is reached") as caught:  # noqa: PT012
        with Run(tmp_path / "r", idea.Config(), time_limit=0.05, quiet=True) as run:
            state = run.restore(State(nn.Linear(2, 2)))
            for state.iteration in run.steps(state.iteration, 1000):
                time.sleep(0.02)
    assert caught.value.exit_code == 0
    assert 1 <= checkpoint.steps(tmp_path / "r" / "checkpoints")[0] < 50


def test_checkpoints_are_saved_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "rare", config=idea.Config(steps=20), seconds=1000.0)
    assert checkpoint.steps(tmp_path / "rare" / "checkpoints") == [20]
    monkeypatch.setattr(runs, "CHECKPOINT_SHARE", 1e-9)
    train(tmp_path / "dear", config=idea.Config(steps=20), seconds=0.0)  # a share of 1e-9 is not reached: the first, and the last
    assert checkpoint.steps(tmp_path / "dear" / "checkpoints") == [20, 1]


# -- fresh processes -------------------------------------------------------------------------------------------------------------------------------


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "onetorch", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def looping(where: Path) -> bool:
    """Whether the run has come to its loop, from which on its record knows how far there is to go."""
    return (where / "config.json").exists() and folder.read_json(where / "run.json")["progress"]["total"] is not None


def saved(where: Path) -> bool:
    """Whether the run has a checkpoint."""
    return bool(checkpoint.steps(where / "checkpoints"))


def test_signals_kills_and_continuation_in_fresh_processes(tmp_path: Path) -> None:
    """One test for many processes, since each takes seconds to import torch: they run at the same time."""
    steady = ["--steps", "150", "--pause", "0.02", "--seed", "3"]
    names = ("whole", "term", "kill", "early")
    processes = {name: start("train", str(IDEA), *steady, "--checkpoint_seconds", "0.2", "--dir", str(tmp_path / name)) for name in names[:-1]}
    processes["early"] = start("train", str(IDEA), *steady, "--checkpoint_seconds", "9999", "--dir", str(tmp_path / "early"))
    slow = start("train", str(IDEA), "--steps", "3", "--pause", "60", "--dir", str(tmp_path / "slow"))
    # Each is told to end as soon as it has come so far, not after some time: a busy machine starts them seconds apart.
    waiting = {"early": (looping, signal.SIGKILL), "kill": (saved, signal.SIGKILL), "term": (saved, signal.SIGTERM)}
    second, end = None, time.monotonic() + 120
    while waiting or second is None:
        assert time.monotonic() < end
        for name, (ready, number) in list(waiting.items()):
            assert processes[name].poll() is None, processes[name].communicate()
            if ready(tmp_path / name):
                processes[name].send_signal(number)
                del waiting[name]
        if second is None and looping(tmp_path / "whole"):
            second = start("resume", str(tmp_path / "whole"))
        time.sleep(0.01)
    out = {name: (*processes[name].communicate(timeout=60), processes[name].returncode) for name in names}
    while not looping(tmp_path / "slow"):
        time.sleep(0.05)
    time.sleep(0.3)
    slow.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    begin = time.monotonic()
    slow.send_signal(signal.SIGTERM)
    _, said = slow.communicate(timeout=10)
    assert time.monotonic() - begin < 5
    assert slow.returncode == 143
    assert "SIGTERM: finishes this step, saves and stops (once more: at once)" in said
    assert "left at once; there is no checkpoint yet" in said

    assert {name: out[name][2] for name in out} == {"whole": 0, "term": 143, "kill": -9, "early": -9}
    _, refused = second.communicate(timeout=60)
    assert second.returncode in (0, 2)  # it may come after the end of the first
    if second.returncode == 2:
        assert f"is in use by process {processes['whole'].pid} on" in refused
        assert refused.count("\n") == 1
    assert "SIGTERM: finishes this step, saves and stops" in out["term"][1]
    assert f"onetorch resume {tmp_path / 'term'} goes on" in out["term"][1]
    listed = capture("runs", str(tmp_path))
    assert {line.split()[1] for line in listed.splitlines()[1:]} <= {"done", "stopped", "killed", "running"}

    resumed = {name: start("resume", str(tmp_path / name)) for name in ("term", "kill", "early")}
    said_again = {name: process.communicate(timeout=120) for name, process in resumed.items()}
    assert {process.returncode for process in resumed.values()} == {0}, said_again
    assert "was stopped before its first checkpoint: it begins again" in said_again["early"][1]
    assert "goes on from" in said_again["kill"][1]
    expected = outcome(tmp_path / "whole")
    for name in resumed:
        assert outcome(tmp_path / name) == expected, name
    assert "error" in out["whole"][0]
    assert f"again: onetorch train {IDEA} --steps 150 --pause 0.02 --seed 3" in out["whole"][0]


def capture(*words: str) -> str:
    stream, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert cli.main(list(words)) == 0
        return sys.stdout.getvalue()
    finally:
        sys.stdout = stream


def test_time_belongs_to_the_phase_that_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with Run(tmp_path / "run", idea.Config(), quiet=True) as run:
        now += 50  # before the loop: nobody's
        run.phase("plan")
        for i in run.steps(0, 3):
            now += 1.0
            run.phase("action")
            now += 2.0
            run.phase("update")
            now += 0.5
            run.phase("action")
            now += 0.25 * i  # unnamed: 0.25 + 0.5 + 0.75
        now += 50  # after it
        assert run.phases() == {"action": 4.5, "update": 6.0, "rest": 1.5}
    assert folder.read_json(tmp_path / "run" / "run.json")["phases"] == {"action": 4.5, "update": 6.0, "rest": 1.5}


def test_a_run_without_phases_has_none(tmp_path: Path) -> None:
    train(tmp_path / "run")
    assert folder.read_json(tmp_path / "run" / "run.json")["phases"] == {}


def test_config_typed_at_a_prompt_stands_in_no_file(tmp_path: Path) -> None:
    code = f"""
import dataclasses, onetorch
@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
with onetorch.Run({str(tmp_path / "run")!r}, Config(), quiet=True) as run:
    assert run.record["git"] is None
"""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60, env=paths)
    assert done.returncode == 0, done.stderr

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onetorch.runs import algorithm, cache, folder, plan
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.run import Run

idea = algorithm.read(Path(__file__).with_name("idea.py")).load()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sleeper(costs: dict[Any, float], calls: list[Any] | None = None) -> plan.Measure:
    """Work that takes so many seconds under each choice of `way`."""

    def measure(choice: dict[str, Any]) -> Any:
        if calls is not None:
            calls.append(dict(choice))
        torch.randn(3), random.random(), np.random.rand()
        return lambda: time.sleep(costs[choice["way"]])

    return measure


def test_the_clearly_fastest_is_chosen_and_near_ties_stay_with_the_default() -> None:
    choice, seconds = plan.choose(sleeper({"slow": 0.02, "fast": 0.002, "fair": 0.01}), {"way": ("slow", "fast", "fair")})
    assert choice == {"way": "fast"}
    assert 0 < seconds < 2.5
    assert plan.choose(sleeper({"a": 0.0100, "b": 0.0099}), {"way": ("a", "b")}, 0.5)[0] == {"way": "a"}


def test_the_budget_holds() -> None:
    begin = time.perf_counter()
    plan.choose(sleeper(dict.fromkeys(range(50), 0.01)), {"way": tuple(range(50))}, 0.3)
    assert time.perf_counter() - begin < 1.5


def test_no_work_begins_that_does_not_fit_the_budget() -> None:
    """Units of 0.3 s: the first pair takes the budget of 0.5, and the second candidate is not even prepared. A slow one is asked once, not again and again."""
    calls: list[Any] = []
    begin = time.perf_counter()
    assert plan.choose(sleeper({"a": 0.3, "b": 0.2, "c": 0.01}, calls), {"way": ("a", "b", "c")}, 0.5)[0] == {"way": "b"}
    assert time.perf_counter() - begin < 1.0
    assert [call["way"] for call in calls] == ["a", "b"]
    begin = time.perf_counter()
    assert plan.choose(sleeper({"a": 0.01, "b": 0.4}), {"way": ("a", "b")}, 0.5)[0] == {"way": "a"}
    assert time.perf_counter() - begin < 0.8


def test_nothing_to_choose_costs_nothing() -> None:
    assert plan.choose(sleeper({}), {"way": ("only",)}) == ({"way": "only"}, 0.0)
    assert plan.choose(None, {"way": ("a", "b")}) == ({"way": "a"}, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threads", "expected name=value"),
        ("=3", "expected name=value"),
        ("thread=1", "no choice 'thread' (did you mean 'threads'?)"),
        ("dtype=bfloat61", "dtype is one of float32, bfloat16, got 'bfloat61' (did you mean 'bfloat16'?)"),
        ("threads=0", "threads is one of 1, 2"),
        ("threads=-1", "threads is one of 1, 2"),
    ],
)
def test_a_wrong_plan_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan.fix({"threads": (1, 2), "dtype": ("float32", "bfloat16")}, plan.parse(text))
    assert said in str(caught.value)


def test_a_fixed_plan_narrows_and_takes_any_number_of_threads() -> None:
    dimensions = {"threads": (1, 2), "dtype": ("float32", "bfloat16")}
    assert plan.fix(dimensions, plan.parse("threads=7, dtype=bfloat16")) == {"threads": (7,), "dtype": ("bfloat16",)}
    assert plan.fix(dimensions, {}) == dimensions


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"x": 3}'])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, content: bytes) -> None:
    path = cache.path(plan.CACHE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert plan.cached("x", {"way": ("a", "b")}) is None
    assert plan.keep("x", {"way": "b"}) is None
    assert plan.cached("x", {"way": ("a", "b")}) == {"way": "b"}
    assert plan.cached("x", {"way": ("a",)}) is None


def test_a_cache_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert plan.keep("x", {"way": "b"})


def test_a_run_measures_once_leaves_the_generators_alone_and_keeps_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []
    measure = sleeper({"slow": 0.01, "fast": 0.001}, calls)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = (torch.randn(1).item(), random.random(), np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with Run(tmp_path / "a", idea.Config()) as run:
        assert run.plan(measure, key="k", threads=(1,), way=("slow", "fast")) == {"device": "cpu", "threads": 1, "way": "fast"}
    assert (torch.randn(1).item(), random.random(), np.random.rand()) == expected
    assert torch.get_num_threads() == 1
    said = capsys.readouterr().err
    assert "plan: device=cpu,threads=1,way=fast (measured in" in said
    assert "; --plan fixes it)" in said
    assert folder.read_json(tmp_path / "a" / "run.json")["plan"] == {"device": "cpu", "threads": 1, "way": "fast"}
    count = len(calls)
    with Run(tmp_path / "b", idea.Config()) as run:
        assert run.plan(measure, key="k", threads=(1,), way=("slow", "fast"))["way"] == "fast"
    assert "measured earlier on this machine" in capsys.readouterr().err
    with Run(tmp_path / "c", idea.Config(), fixed={"way": "slow"}) as run:
        assert run.plan(measure, key="k", threads=(1,), way=("slow", "fast"))["way"] == "slow"
    for name, way in (("a", "fast"), ("c", "slow")):
        with Run(tmp_path / name, idea.Config(), resume=True) as run:
            assert run.plan(measure, key="k", threads=(1,), way=("slow", "fast"))["way"] == way
    assert "as recorded" in capsys.readouterr().err
    assert len(calls) == count


def test_the_device_is_measured_where_its_candidates_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """"cpu:0" stands for a GPU that is faster."""

    def measure(choice: dict[str, Any]) -> Any:
        return lambda: time.sleep({"cpu": 0.01, "cpu:0": 0.001}[choice["device"]])

    assert plan.devices()[0] == "cpu"
    monkeypatch.setattr(plan, "devices", lambda: ("cpu", "cpu:0"))
    with Run(tmp_path / "a", idea.Config()) as run:
        assert run.plan(measure, key="named", device=plan.devices()) == {"device": "cpu:0"}
    with Run(tmp_path / "b", idea.Config()) as run:
        assert run.plan(None, key="not named", threads=(1,)) == {"device": "cpu:0", "threads": 1}  # the last, as it stands


def test_a_plan_that_was_fixed_but_not_yet_made_is_kept_on_resume(tmp_path: Path) -> None:
    Run(tmp_path / "r", idea.Config(), fixed={"way": "slow"}, quiet=True).close("killed")
    with Run(tmp_path / "r", idea.Config(), resume=True, quiet=True) as run:
        assert run.plan(sleeper({"slow": 0.01, "fast": 0.001}), way=("slow", "fast"))["way"] == "slow"


def test_a_wrong_plan_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no choice 'wya'"), Run(tmp_path / "a", idea.Config(), fixed={"wya": "slow"}, quiet=True) as run:
        run.plan(None, way=("slow", "fast"))
    with pytest.raises(UsageError, match="idea has no speed plan"), Run(tmp_path / "b", idea.Config(), recipe="idea", fixed={"way": "slow"}, quiet=True) as run:
        idea.train(run.config, run)
    assert [p.name for p in tmp_path.iterdir() if p.name in "ab"] == []


def test_a_device_that_is_not_here_is_named(tmp_path: Path) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.plan()
    path = tmp_path / "r" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"plan": {"device": "tpu"}}))
    with pytest.raises(RunError, match="ran on tpu, which is not here"), Run(tmp_path / "r", idea.Config(), resume=True, quiet=True) as run:
        run.plan()


def test_candidates_that_must_be_asked_for() -> None:
    dimensions, asked = {"dtype": ("float32", "bfloat16")}, {"dtype": ("float16",)}
    assert plan.fix(dimensions, {}, asked) == dimensions
    assert plan.fix(dimensions, {"dtype": "float16"}, asked) == {"dtype": ("float16",)}
    with pytest.raises(UsageError, match="dtype is one of float32, bfloat16, float16, got 'float8'"):
        plan.fix(dimensions, {"dtype": "float8"}, asked)

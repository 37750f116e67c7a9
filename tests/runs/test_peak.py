import json
import time
from pathlib import Path

import pytest
import torch

from onetorch.runs import algorithm, cache, folder, peak
from onetorch.runs.run import Run

idea = algorithm.read(Path(__file__).with_name("idea.py")).load()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_no_matrix_product_is_much_faster_than_the_peak() -> None:
    found = peak.peak("float32", 1, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    rate = 0.0
    for _ in range(100):
        begin = time.process_time()
        a @ a
        rate = max(rate, 2 * 1024**3 / (time.process_time() - begin))
        if rate > 0.5 * found:  # sooner or later on any machine, however crowded
            break
    torch.set_num_threads(before)
    assert 0.2 * found < rate < 1.5 * found


def test_it_is_measured_once_and_leaves_threads_and_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = peak.peak("bfloat16", 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(peak, "_measure", lambda *_: pytest.fail("measured again"))
    assert peak.peak("bfloat16", 1) == first


@pytest.mark.parametrize(("wrong", "name"), [({"dtype": "float33"}, "dtype"), ({"dtype": "nn"}, "dtype"), ({"device": "tpu"}, "device")])
def test_wrong_arguments_are_named(wrong: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        peak.peak(**wrong)  # type: ignore[arg-type]


def test_the_column_is_the_share_of_the_peak_since_the_row_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_measure", lambda *_: 1e6)
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        for i in run.steps(0, 3):
            time.sleep(0.05)
            run.log(i, flops=2e4 if i != 2 else None, loss=1.0)
    rows = list(folder.rows(tmp_path / "r"))
    assert ["mfu" in r for r in rows] == [True, False, True]
    assert all(0.2 < r["mfu"] <= 0.4 for r in rows if "mfu" in r)  # 2e4 operations in 50 ms and a little more, of 1e6 a second
    assert list(rows[0]) == ["step", "seconds", "cpu_seconds", "loss", "mfu"]


def test_mfu_is_the_runs_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds, cpu_seconds, mfu are written by the run"), Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        run.log(1, mfu=0.5)


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1', "[" * 100_000])
def test_a_damaged_cache_holds_nothing_and_is_replaced(content: str) -> None:
    file = cache.path("numbers")
    assert cache.get("numbers", "x") is None
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert cache.get("numbers", "x") is None
    assert cache.put("numbers", "x", 2.5) is None
    assert cache.put("numbers", "y", [1]) is None
    assert json.loads(file.read_text()) == {"x": 2.5, "y": [1]}

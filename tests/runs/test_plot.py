"""Pictures of curves; looked at through matplotlib's own objects and the text that an SVG holds."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from written import curve, grid, write

from onetorch import cli
from onetorch.runs import compare, plot
from onetorch.runs.errors import UsageError

pytest.importorskip("matplotlib", reason="matplotlib (extra media) is not installed")


class Axes:
    """Takes down what is drawn."""

    def __init__(self) -> None:
        self.lines: list[tuple[np.ndarray, np.ndarray, dict]] = []
        self.bands: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def plot(self, x, y, **style):
        self.lines.append((np.asarray(x), np.asarray(y), style))

    def fill_between(self, x, low, high, **style):
        self.bands.append((np.asarray(x), np.asarray(low), np.asarray(high)))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def drawn(found: compare.Comparison, clock: str = "steps") -> tuple[Axes, list[str]]:
    axes = Axes()
    return axes, plot._panel(axes, found, "loss", clock)


def test_a_groups_mean_lies_within_its_band_and_over_no_more_than_all_runs_have(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"seed": 0}, curve([1.0, 2.0, 3.0, 4.0], every=10))
    b = write(tmp_path / "b", {"seed": 1}, curve([3.0, 5.0, 7.0], every=15))
    axes, remarks = drawn(compare.load([str(a), str(b)]))
    assert remarks == []
    single, mean = axes.lines[:2], axes.lines[2]
    assert [len(x) for x, _, _ in single] == [4, 3]
    x, y, style = mean
    assert style["label"] == "made (2 seeds)"
    assert (x[0], x[-1]) == (15, 40)  # the later begin and the earlier end: nothing is extrapolated
    # At 15: (1.5 + 3) / 2; at 40: (4 + 3 + 2 * 25 / 15) / 2 by hand.
    assert (y[0], y[-1]) == (pytest.approx(2.25), pytest.approx((4 + 3 + 50 / 15) / 2))
    _, low, high = axes.bands[0]
    assert (low <= y).all()
    assert (high >= y).all()


def test_one_seed_has_a_line_and_no_band(tmp_path: Path) -> None:
    axes, _ = drawn(compare.load([str(write(tmp_path / "a", {"seed": 0}, curve([1.0, 2.0])))]))
    assert len(axes.lines) == 1
    assert axes.lines[0][2]["label"] == "made (one seed)"
    assert axes.bands == []


def test_runs_that_share_no_stretch_have_no_mean(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"seed": 0}, [{"step": 1, "seconds": 1.0, "loss": 1.0}, {"step": 2, "seconds": 2.0, "loss": 1.0}])
    b = write(tmp_path / "b", {"seed": 1}, [{"step": 1, "seconds": 3.0, "loss": 1.0}, {"step": 2, "seconds": 4.0, "loss": 1.0}])
    axes, remarks = drawn(compare.load([str(a), str(b)]), "seconds")
    assert len(axes.lines) == 2
    assert "share no stretch of seconds" in remarks[0]


def test_the_command_draws_png_and_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = grid(tmp_path / "sweep")
    for name in ("p.png", "p.svg"):
        assert cli.main(["plot", str(home), "--x", "steps", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    assert "p.svg" in capsys.readouterr().out


def test_wrong_words_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(grid(tmp_path / "sweep", seeds=1))
    for words, message in (
        (["--out", "x.pdf"], "ends in .png or .svg"),
        (["--x", "hours"], "expected steps or seconds"),
        (["--y", "los"], "did you mean 'loss'"),
        (["--colour", "red"], "no option --colour"),
    ):
        assert cli.main(["plot", home, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare.load([str(grid(tmp_path / "sweep", seeds=1))])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"onetorch\[media\]"):
        plot.draw(found, tmp_path / "p.png")


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    for i, word in enumerate((r"$\notacommand{$", "$x")):
        write(tmp_path / f"r{i}", {"seed": 0, "env": word}, curve([1.0, 2.0], name=r"lo$s\frac$"))
    plot.draw(compare.load([str(tmp_path)]), tmp_path / "p.png")


def test_colours_are_valid_and_differ() -> None:
    for n in (1, 10, 11, 200):
        colors = plot.palette(n)
        assert len(set(colors)) == n
        assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colors)

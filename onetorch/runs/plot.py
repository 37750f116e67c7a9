"""Pictures of curves, PNG or SVG, with matplotlib (extra `media`): each run as a thin line, the mean over seeds as a thick one, its interval as a band."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onetorch.runs import folder, stats
from onetorch.runs.compare import Comparison, main_result, on_grid, quantities, thin
from onetorch.runs.errors import UsageError

CLOCKS = ("steps", "seconds")
PANELS = 6  # quantities drawn where none is named
POINTS = 1000  # of a curve: more than a picture has columns of pixels
GRID = 300  # of a mean
LEGEND = 20  # groups named in the legend
LINES = 100  # runs up to which each is drawn beside the mean


def draw(comparison: Comparison, out: Path, *, clocks: Sequence[str] = ("steps", "seconds"), ys: Sequence[str] = ()) -> list[str]:
    """Draw the quantities `ys` (else the first six) over `clocks` into `out` (.png or .svg); returns remarks for a person.

    Raises UsageError for another ending, an unknown quantity or clock, runs without a curve, or where matplotlib is missing.
    """
    if out.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--out: expected a name that ends in .png or .svg, got {out}")
    for clock in clocks:
        if clock not in CLOCKS:
            raise UsageError(f"--x: expected steps or seconds, got {clock!r}")
    for y in ys:
        main_result(comparison.entries, y)
    known = quantities(comparison.entries)
    chosen = [y for y in ys or known if y in known][: None if ys else PANELS]
    if not chosen:
        raise UsageError(f"{', '.join(ys)} has no curve, only a result" if ys else "no run has logged a number twice: there is no curve to draw")
    try:
        from matplotlib.figure import Figure  # not pyplot: that would open a window system
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UsageError("matplotlib is missing: pip install 'onetorch[media]'") from error

    # Over both clocks a line of two; over one, lines of three. Margins in inches: matplotlib's own search for them takes longer than all the drawing.
    groups = comparison.groups
    across = len(clocks) if len(clocks) > 1 else min(3, len(chosen))
    down = -(-len(chosen) * len(clocks) // across)
    named = [f"{g.name} ({seeds(len(g.entries))})" for g in groups[:LEGEND]] if len(groups) > 1 else []
    width = 5.0 if across < 3 else 4.2
    columns = max(1, min(len(named), int(width * across / (0.6 + 0.075 * max(map(len, named)))))) if named else 1
    top = 0.35 + 0.19 * -(-len(named) // columns)
    height = 2.8 * down + top + 0.2
    figure = Figure(figsize=(width * across, height))
    figure.subplots_adjust(0.65 / (width * across), 0.75 / height, 1 - 0.15 / (width * across), 1 - top / height, 0.6 / (width - 0.8), 0.75 / 2.05)
    remarks = list(comparison.notes)
    if len(known) > len(chosen) and not ys:
        remarks.append(f"drawn are {', '.join(chosen)}; there are also {', '.join(known[len(chosen) :])} (--y draws them)")
    for place, (y, clock) in enumerate(itertools.product(chosen, clocks), 1):
        remarks += [r for r in _panel(figure.add_subplot(down, across, place), comparison, y, clock) if r not in remarks]
    if named:
        handles = [Line2D([], [], color=color, linewidth=1.8) for color in palette(len(groups))[:LEGEND]]
        labels = [name.replace("$", r"\$") for name in named]
        figure.legend(handles, labels, loc="upper left", ncols=columns, fontsize=8, frameon=False, borderaxespad=0.2)
        if len(groups) > LEGEND:
            remarks.append(f"the legend names {LEGEND} of {len(groups)} groups; a report can switch all of them")
    if any(len(g.entries) > 1 for g in groups):
        note = "thick: mean over seeds, band: 95 % bootstrap interval of the mean" + (", thin: single runs" if len(comparison.entries) <= LINES else "")
        figure.text(0.5, 0.08 / height, note, fontsize=8, color="#666666", ha="center")
    elif len(groups) == 1:
        figure.text(0.5, 0.08 / height, "one seed: nothing is known of the spread", fontsize=8, color="#666666", ha="center")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    except OSError as error:
        raise UsageError(folder.explain(error, out)) from error
    return remarks


def _panel(axes: Any, comparison: Comparison, y: str, clock: str) -> list[str]:
    """One quantity over one clock."""
    remarks = []
    colors = palette(len(comparison.groups))
    for group, color in zip(comparison.groups, colors, strict=True):
        columns = [e.columns[y] for e in group.entries if y in e.columns and len(e.columns[y].values) > 1]
        label = f"{group.name} ({seeds(len(columns))})".replace("$", r"\$")  # a dollar would begin a formula
        if not columns:
            continue
        if len(columns) == 1 or len(comparison.entries) <= LINES:
            for column in columns:
                points = thin(column, POINTS)
                alone = len(columns) == 1
                faint = 0.35 if len(comparison.entries) <= 10 else 0.15
                width, alpha = (1.4, 1.0) if alone else (0.6, faint)
                axes.plot(points.x(clock), points.values, color=color, linewidth=width, alpha=alpha, label=label if alone else None)
        if len(columns) == 1:
            continue
        shared = on_grid(columns, clock, GRID)
        if shared is None:
            remarks.append(f"{group.name}: the runs share no stretch of {clock} in {y}, so there is no mean over them")
            continue
        x, curves = shared
        mean, low, high = stats.mean_curve(curves)
        axes.plot(x, mean, color=color, linewidth=1.8, label=label)
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel(clock, fontsize=9)
    axes.set_title(y.replace("$", r"\$"), fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    return remarks


def seeds(n: int) -> str:
    """How a number of runs is said, so that nobody takes one seed for a result."""
    return "one seed" if n == 1 else f"{n} seeds"


def palette(n: int) -> list[str]:
    """`n` colours as "#rrggbb": up to ten that differ for every common kind of colour blindness (Paul Tol's, Okabe and Ito's), beyond that a scale of hues."""
    few = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#332288", "#999933", "#882255", "#44aa99"]
    if n <= len(few):
        return few[:n]
    # A path through dark blue, green and yellow, as perceptual maps have it: neighbours are alike because neighbouring values are.
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [240, 205, 30]], dtype=np.float64)
    t = np.linspace(0, len(stops) - 1, n)
    return ["#" + "".join(f"{int(np.interp(v, range(len(stops)), stops[:, c])):02x}" for c in range(3)) for v in t]

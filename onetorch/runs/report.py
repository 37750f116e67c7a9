"""What a person looks at when runs are over: one HTML page that opens offline, with curves, statistics, media and provenance.

The curves are drawn by Bokeh (extra `media`), whose library goes into the page compressed; without it the page has a picture by matplotlib, or none. Whatever
stands in a run's folder is data from a stranger: text is escaped, data travel as compressed JSON and reach the page as text nodes, and the page's
content security policy names the hashes of its own two scripts, so that a browser runs no other and loads nothing from anywhere.
"""

import base64
import gzip
import hashlib
import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from onetorch.runs import plot, stats
from onetorch.runs.compare import (
    Comparison,
    Entry,
    Group,
    effects,
    group,
    load,
    main_result,
    on_grid,
    quantities,
    read,
    show,
    smaller_is_better,
    thin,
)
from onetorch.runs.errors import UsageError
from onetorch.runs.stats import FEW, Array, Estimate

EMBED_LIMIT = 16 << 20  # bytes of videos and pictures that go into a page
TEXT_LIMIT = 20_000  # characters of a sample or diff that go into a page
PANELS = 9  # at most so many quantities are drawn
POINTS = 400  # at most so many points of a run's curve …
RUN_POINTS = 60_000  # … and of all curves in a page
GROUP_POINTS = 20_000  # of all means
SIZE_LIMIT = 2_000_000  # bytes of a page without its media
ROWS = 200  # at most so many lines in a table of the page
MATRIX = 8  # groups held against each other


def write(path: Path, record: dict[str, Any]) -> Iterator[str]:
    """Write media/curves.png and report.html of the run in `path`, which has just ended; yields a line for a person about what could not be made."""
    entry = read(path)
    comparison = group([Entry(entry.path, entry.record | record, "done", entry.config, entry.columns)])
    if known := quantities(comparison.entries):
        try:
            plot.draw(comparison, path / "media" / "curves.png", clocks=("steps",), ys=known[: plot.PANELS])
        except UsageError as error:
            yield f"no picture of the curves: {error}"
    yield from save(comparison, path / "report.html")


def save(comparison: Comparison, out: Path, *, y: str | None = None, better: str | None = None) -> Iterator[str]:
    """Write the page about `comparison` to `out`; yields remarks for a person.

    `y` is the quantity by which runs are compared (else the first their evaluations gave), `better` "larger" or "smaller" (else by the name of `y`).
    Raises UsageError for another `y` or `better`.
    """
    if better not in (None, "larger", "smaller"):
        raise UsageError(f"--better: expected larger or smaller, got {better!r}")
    y = main_result(comparison.entries, y)
    yield from comparison.notes
    for share in (1.0, 0.5, 0.2, 0.05):
        body, media, remarks = _page(comparison, y, better, share)
        if len(body.encode()) - media <= SIZE_LIMIT:
            break
    else:
        remarks.append(f"{out} has {(len(body.encode()) - media) / 1e6:.1f} MB without media: fewer runs make a lighter page")
    yield from remarks
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(body, encoding="utf-8")
    os.replace(temporary, out)


def _page(comparison: Comparison, y: str | None, better: str | None, share: float) -> tuple[str, int, list[str]]:
    """(the page, bytes of it that are media, remarks); `share` scales the number of points drawn."""
    entries, groups = comparison.entries, comparison.groups
    sign = -1.0 if (better == "smaller" if better else y is not None and smaller_is_better(y)) else 1.0
    why = "as told" if better else "by its name"
    title = f"{entries[0].record.get('recipe', '?')} · {entries[0].name}" if len(entries) == 1 else f"{len(entries)} runs of {_names(entries)}"
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(entries) == 1:
        parts += _one(entries[0])
    else:
        sizes = sorted({len(g.entries) for g in groups})
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        parts.append(f"<p>{len(groups)} {'setting' if len(groups) == 1 else 'settings'}, {each} {'seed' if each == '1' else 'seeds'} each.")
        if y is not None:
            parts.append(f" Compared by <b>{_text(y)}</b>, of which {'less' if sign < 0 else 'more'} is better ({why}).</p>")
        left = Counter(e.status for e in entries if e.status != "done")
        if left:
            states = ", ".join(f"{n} {s}" for s, n in left.items())
            parts.append(f"<p class=warn>Not done, and so in the curves but in no statistics: {_text(states)}.</p>")
    parts += [f"<p class=warn>{_text(note)}</p>" for note in comparison.notes]
    curves, head, remarks = _curves(comparison, y, share, sign)
    parts += curves
    if y is not None and len(entries) > 1:
        parts += _results(groups, y, sign)
        parts += _mattered(comparison, y, sign) if comparison.varying else []
        parts += _against(groups, y, sign)
    media = _media(entries, y)
    parts += media
    parts += _config(comparison)
    parts += _provenance(entries)
    style = resources.files("onetorch.runs").joinpath("report.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; script-src {head[0]}; style-src 'unsafe-inline'; img-src data:; media-src data:; font-src data:"
    page = f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
    page += f"<meta name=viewport content='width=device-width'><title>{_text(title)}</title><style>{style}</style>"
    return page + "\n".join(parts) + head[1] + "</html>\n", sum(len(part) for part in media if "src='data:" in part), remarks


def _text(value: Any) -> str:
    return html.escape(str(value))


def _names(entries: Sequence[Entry]) -> str:
    names = list(dict.fromkeys(str(e.record.get("recipe", "?")) for e in entries))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _number(value: Any) -> str:
    """A number as a person reads it: integers whole, others with five digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else show(value, 60)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _facts(values: dict[str, Any]) -> str:
    """Names and values, two columns."""
    return "<table class=facts>" + "".join(f"<tr><td>{_text(name)}<td>{_text(value)}" for name, value in values.items()) + "</table>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """A table whose last `numbers` columns stand to the right; cells are escaped."""
    kinds = [" class=number" if i >= len(heads) - numbers else "" for i in range(len(heads))]
    top = "".join(f"<th{kind}>{_text(h)}" for h, kind in zip(heads, kinds, strict=True))
    lines = ["".join(f"<td{kind}>{_text(c)}" for c, kind in zip(row, kinds, strict=True)) for row in rows]
    more = f"<p class=note>and {len(lines) - ROWS} more</p>" if len(lines) > ROWS else ""
    return f"<div class=table><table><tr>{top}" + "".join(f"<tr>{line}" for line in lines[:ROWS]) + f"</table></div>{more}"


def _one(entry: Entry) -> list[str]:
    """The head of a page about one run."""
    cost = entry.record["cost"]
    spent = ", ".join(f"{cost[k]:.4g} {label}" for k, label in (("seconds", "s"), ("cpu_seconds", "CPU-s")) if isinstance(cost.get(k), int | float))
    facts = {k: _number(v) for k, v in entry.record["result"].items()} | {"state": entry.status, "cost": spent}
    seed = "" if entry.seed is None else f" ({_number(entry.seed)})"
    return [_facts(facts), f"<p class=note>One seed{_text(seed)}: nothing is known of the spread between seeds.</p>"]


# -- curves ------------------------------------------------------------------------------------------------------------------------------------


def _curves(comparison: Comparison, y: str | None, share: float, sign: float) -> tuple[list[str], tuple[str, str], list[str]]:
    """(HTML of the section, (script hashes, HTML of the scripts), remarks)."""
    nothing = ("'none'", "")
    known = quantities(comparison.entries)
    if not known:
        return ["<h2>Curves</h2><p>No run has logged a number twice.</p>"], nothing, []
    known.sort(key=lambda name: name != y)
    try:
        import bokeh  # noqa: F401 (whether it is there)
    except ImportError:
        return _picture(comparison, known)
    n, g = len(comparison.entries), len(comparison.groups)
    means = sum(len(x.entries) > 1 for x in comparison.groups)
    # Fewer quantities rather than curves of so few points that they mislead.
    of_runs, of_groups = int(share * RUN_POINTS), int(share * GROUP_POINTS)
    panels = max(1, min(PANELS, len(known), of_runs // (n * 48), of_groups // (means * 32) if means else PANELS))
    points = max(4, min(POINTS, of_runs // (n * panels)))
    grid = max(8, min(POINTS // 2, of_groups // (max(1, means) * panels)))
    chosen = known[:panels]
    data = {
        "figures": _figures(chosen),
        "metrics": [_metric(comparison, name, points, grid) for name in chosen],
        "groups": [{"name": x.name, "size": len(x.entries), "color": c} for x, c in zip(comparison.groups, _colors(comparison.groups, y, sign), strict=True)],
        "runs": [_line(e, i, y) for i, x in enumerate(comparison.groups) for e in x.entries],
        "outcome": y or "result",
    }
    notes = []
    if means:
        notes.append("Means are over all seeds of a setting, as far as every seed goes; bands are 95 % bootstrap intervals of the mean at each point.")
    if means > 30:
        notes.append("Bands are drawn where at most 30 settings are switched on.")
    if g > 10:
        notes.append("The colours follow the result: dark blue is worst, yellow best.")
    if any(len(e.columns[name].values) > points for e in comparison.entries for name in chosen if name in e.columns):
        notes.append(f"A curve is thinned to {points} points, keeping the highest and lowest of each stretch.")
    if len(known) > panels:
        notes.append(f"Drawn are {panels} of {len(known)} quantities; left out: {', '.join(known[panels:])}. `onetorch plot --y NAME` draws any of them.")
    parts = ["<h2>Curves</h2><div id=controls></div><div id=curves></div>", f"<p class=note>{_text(' '.join(notes))}</p><div id=runs></div>"]
    parts.append("<noscript><p class=warn>The curves need JavaScript; everything else is below.</p></noscript>")
    library = resources.files("bokeh").joinpath("server/static/js/bokeh.min.js").read_text(encoding="utf-8")
    script = resources.files("onetorch.runs").joinpath("report.js").read_text(encoding="utf-8")
    store = "".join(f"<script type='text/plain' id={name}>{_packed(text)}</script>" for name, text in (("library", library), ("data", _json(data))))
    return parts, (f"{_hash(library)} {_hash(script)}", f"{store}<script>{script}</script>"), []


def _picture(comparison: Comparison, known: list[str]) -> tuple[list[str], tuple[str, str], list[str]]:
    """The section without Bokeh: a picture, where matplotlib is there."""
    missing = "the report's curves do not answer to the mouse: bokeh is missing (pip install 'onetorch[media]')"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "curves.png"
        try:
            plot.draw(comparison, target, clocks=("steps",), ys=known[: plot.PANELS])
        except UsageError as error:
            return [f"<h2>Curves</h2><p>No curves: {_text(error)}.</p>"], ("'none'", ""), [f"{missing}; there are none: {error}"]
        image = base64.b64encode(target.read_bytes()).decode()
    return [f"<h2>Curves</h2><img alt=curves src='data:image/png;base64,{image}'>", f"<p class=note>{_text(missing)}</p>"], ("'none'", ""), [missing]


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _figures(names: Sequence[str]) -> dict[str, Any]:
    """Bokeh's figures, still without data; report.js finds their sources by name."""
    from bokeh.core.json_encoder import serialize_json
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.layouts import gridplot
    from bokeh.models import BasicTickFormatter, ColumnDataSource, DataRange1d, HoverTool, NumeralTickFormatter
    from bokeh.models.glyphs import MultiLine, Patches
    from bokeh.plotting import figure

    made: list[Any] = []
    over = DataRange1d(range_padding=0.01)  # shared: moving through one curve moves through all
    for i, name in enumerate(names):
        height, tools = 290 if len(names) < 5 else 240, "pan,box_zoom,wheel_zoom,reset,save"
        p = figure(height=height, sizing_mode="stretch_width", x_range=over, tools=tools, title=_plain(name))
        # add_glyph, not p.multi_line: that would make three more of each for states that these never have.
        bands = ColumnDataSource({"xs": [], "ys": [], "color": []}, name=f"bands{i}")
        p.add_glyph(bands, Patches(xs="xs", ys="ys", fill_color="color", fill_alpha=0.18, line_width=0))
        lines = ColumnDataSource({"xs": [], "ys": [], "color": [], "alpha": [], "width": [], "name": []}, name=f"runs{i}")
        runs = p.add_glyph(lines, MultiLine(xs="xs", ys="ys", line_color="color", line_alpha="alpha", line_width="width"))
        centers = ColumnDataSource({"xs": [], "ys": [], "color": [], "name": []}, name=f"means{i}")
        means = p.add_glyph(centers, MultiLine(xs="xs", ys="ys", line_color="color", line_width=2.2))
        numbers: Any = {"$snap_y": "printf", "$snap_x": "printf"}
        tips = [("", "@name"), ("at", "$snap_x{%.7g}"), ("value", "$snap_y{%.5g}")]
        p.add_tools(HoverTool(renderers=[runs, means], tooltips=tips, formatters=numbers, line_policy="nearest", point_policy="snap_to_data"))
        p.xaxis[0].name = f"x{i}"
        p.xaxis[0].formatter = NumeralTickFormatter(format="0,0.[0000]")
        p.yaxis[0].formatter = BasicTickFormatter(power_limit_low=-4)
        p.toolbar.logo = None
        made.append(p)
    across = min(len(made), 2 if len(made) < 5 else 3)
    grid = gridplot(made, ncols=across, sizing_mode="stretch_width", toolbar_location="right", toolbar_options={"logo": None})
    return dict(json.loads(serialize_json(json_item(grid, ID("curves")))))


def _plain(text: str) -> str:
    """Bokeh takes a text between such marks for a formula and would fetch a typesetter."""
    for mark in ("$$", "\\(", "\\["):
        text = text.replace(mark, f"{mark[0]} {mark[1]}")
    return text


def _colors(groups: Sequence[Group], y: str | None, sign: float) -> list[str]:
    """Few groups differ in hue; of many the colour says the rank of the result."""
    if len(groups) <= 10 or y is None:
        return plot.palette(len(groups))
    scores = [sign * float(o.mean()) if (o := g.outcomes(y)).size else -np.inf for g in groups]
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    shades = plot.palette(len(groups))
    return [shades[r] for r in ranks]


def _metric(comparison: Comparison, name: str, points: int, grid: int) -> dict[str, Any]:
    digits = 5 if len(comparison.entries) <= 100 else 4
    runs: list[Any] = []
    means: list[Any] = []
    place = 0
    for index, members in enumerate(comparison.groups):
        columns = []
        for entry in members.entries:
            column = entry.columns.get(name)
            if column is not None and column.values.size:
                columns.append(column)
                few = thin(column, points)
                runs.append([place, *(_rounded(part, digits) for part in (few.steps, few.seconds, few.values))])
            place += 1
        if len(columns) > 1:
            curves: dict[str, Any] = {}
            for clock in ("steps", "seconds"):
                shared = on_grid(columns, clock, grid)
                if shared is not None:
                    curves[clock] = [_rounded(part, digits) for part in (shared[0], *stats.mean_curve(shared[1], samples=500))]
            means.append([index, curves])
    return {"name": name, "runs": runs, "means": means}


def _rounded(values: Array, digits: int) -> list[float | int]:
    """Numbers with so many significant digits, more where they lie close together; whole numbers stay whole."""
    size = float(np.abs(values).max(initial=0.0))
    spread = float(np.ptp(values)) if values.size else 0.0
    digits += (int(np.clip(np.log10(size / spread), 0, 10)) if spread else 0)
    short = [float(f"{v:.{digits}g}") for v in values.tolist()]
    return [int(v) if v.is_integer() and abs(v) < 2**53 else v for v in short]


def _line(entry: Entry, index: int, y: str | None) -> dict[str, Any]:
    """What the table of runs says of one; all text."""
    outcome = None if y is None else entry.outcome(y)
    last = max((float(c.steps[-1]) for c in entry.columns.values()), default=None)
    seconds = entry.record["cost"].get("seconds")
    return {
        "name": entry.name,
        "group": index,
        "seed": _number(entry.seed),
        "outcome": "" if outcome is None else f"{outcome:.5g}",
        "status": entry.status,
        "steps": "" if last is None else f"{last:,.0f}",
        "seconds": f"{seconds:,.1f}" if isinstance(seconds, int | float) else "",
    }


# -- statistics --------------------------------------------------------------------------------------------------------------------------------


def _interval(e: Estimate) -> str:
    return "one seed: none" if e.low is None or e.high is None else f"[{e.low:.4g}, {e.high:.4g}]"


def _results(groups: Sequence[Group], y: str, sign: float) -> list[str]:
    """Each setting's result, the best first."""
    found = [(g, o, stats.estimate(o)) for g in groups if (o := g.outcomes(y)).size]
    if not found:
        return [f"<h2>Results</h2><p>No run is done that has {_text(y)}: there is no statistic to give.</p>"]
    found.sort(key=lambda item: -sign * item[2].value)
    rows = []
    for g, o, e in found:
        cost = [float(s) for x in g.entries if isinstance(s := x.record["cost"].get("seconds"), int | float)]
        seconds = f"{np.median(cost):,.4g}" if cost else ""
        rows.append((g.name, str(o.size), f"{e.value:.4g}", _interval(e), f"{o.mean():.4g}", f"{o.min():.4g} … {o.max():.4g}", seconds))
    heads = ("setting", "seeds", "interquartile mean", "95 % interval", "mean", "lowest … highest", "median seconds")
    note = "Intervals are percentile bootstrap intervals of the interquartile mean over seeds (Agarwal et al. 2021, arXiv:2108.13264)."
    few = sorted({o.size for _, o, _ in found if o.size < FEW})
    parts = [f"<h2>Results: {_text(y)}</h2>", _table(heads, rows, 6), f"<p class=note>{note}</p>"]
    if 1 in few:
        parts.append("<p class=warn>Settings with a single seed: nothing is known of their spread, and an order among them may be luck.</p>")
    if few and few != [1]:
        parts.append("<p class=warn>With 2, 3 or 4 seeds such an interval is too narrow: it holds the truth in about 50, 74 or 85 % of cases, not in 95.</p>")
    return parts


def _mattered(comparison: Comparison, y: str, sign: float) -> list[str]:
    """The effect of each field that differs."""
    found, untold = effects(comparison, y)
    rows = []
    for e in found:
        verdict = "better" if e.change.value * sign > 0 else "worse"
        if e.matters is None:
            verdict = "no interval: more seeds would tell"
        elif not e.matters:
            verdict = "cannot be told from chance"
        if e.blocks:
            rows.append((e.name, f"{show(e.before)} → {show(e.after)}", verdict, f"{e.change.value:+.4g}", _interval(e.change), f"{e.blocks}"))
        else:
            verdict = "a trend" if e.matters else "no interval" if e.matters is None else "no trend up or down can be told"
            rows.append((e.name, f"{show(e.before)} … {show(e.after)}", verdict, f"rank correlation {e.change.value:+.2f}", _interval(e.change), "–"))
    if not rows and not untold:
        return []
    parts = ["<h2>Which difference mattered</h2>"]
    if rows:
        parts.append(_table(("field", "change", "verdict", f"change in {y}", "95 % interval", "settings compared"), rows, 3))
        parts.append(
            "<p class=note>Two values of a field are compared where all other fields are alike, and averaged over those settings. "
            "Of many such lines about one in twenty leaves out zero by chance alone.</p>"
        )
    if untold:
        parts.append(f"<p class=warn>Cannot be told apart from these runs, because other fields change along with them: {_text(', '.join(untold))}.</p>")
    return parts


def _against(groups: Sequence[Group], y: str, sign: float) -> list[str]:
    """Probability of improvement between the best settings, and how many of their runs reach what."""
    scored = sorted(((g, sign * o) for g in groups if (o := g.outcomes(y)).size > 1), key=lambda item: -float(stats.iqm(item[1])))
    if len(scored) < 2:
        return []
    best = scored[:MATRIX]
    rows = []
    for g, a in best:
        beats = [stats.probability_of_improvement(a, b) for _, b in best]
        cells = ["–" if h is g else f"{p.value:.2f} [{p.low:.2f}, {p.high:.2f}]" for (h, _), p in zip(best, beats, strict=True)]
        rows.append((g.name, *cells))
    some = f" (the {MATRIX} best of {len(scored)} settings)" if len(scored) > MATRIX else ""
    parts = [f"<h2>Probability of improvement{some}</h2>", _table(("a run of", *(f"beats {g.name}" for g, _ in best)), rows, len(best))]
    parts.append("<p class=note>How often a run of the line ends better than one of the column, ties half; 0.5 is a coin (95 % bootstrap interval).</p>")
    pooled = np.concatenate([s for _, s in best])
    if pooled.max() > pooled.min():
        thresholds = np.quantile(pooled, [0.1, 0.25, 0.5, 0.75, 0.9])
        word = "at most" if sign < 0 else "above"
        lines = []
        for g, s in best:
            share, low, high = stats.performance_profile(s, thresholds)
            lines.append((g.name, *(f"{100 * v:.0f} % [{100 * a:.0f}, {100 * b:.0f}]" for v, a, b in zip(share, low, high, strict=True))))
        parts.append("<h3>Performance profile</h3>" + _table(("share of runs", *(f"{word} {sign * t:.4g}" for t in thresholds)), lines, len(thresholds)))
    return parts


# -- media, config, provenance -----------------------------------------------------------------------------------------------------------------


def _media(entries: Sequence[Entry], y: str | None) -> list[str]:
    """The videos, pictures and samples of the run; of several those of the one with the highest, the median and the lowest result."""
    chosen = [("", entries[0])]
    if len(entries) > 1:
        scored = sorted((v, i) for i, e in enumerate(entries) if y is not None and (v := e.outcome(y)) is not None)
        if not scored:
            return []
        places = {"highest": -1, "median": len(scored) // 2, "lowest": 0}
        chosen = [(f"{word} {y}, {scored[p][0]:.4g}: {entries[scored[p][1]].name}", entries[scored[p][1]]) for word, p in places.items()][: len(scored)]
    parts: list[str] = []
    left = EMBED_LIMIT
    for title, entry in chosen:
        folder = entry.path / "media"
        made = []
        for file in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []:
            if file.name != "curves.png" and file.is_file() and not file.is_symlink():
                text, size = _medium(file, left)
                left -= size
                made.append(text)
        if any(made):
            parts.append("<div>" + (f"<h3>{_text(title)}</h3>" if title else ""))
            parts += [*made, "</div>"]
    return ["<h2>What came out</h2><div class=media>", *parts, "</div>"] if parts else []


def _medium(file: Path, room: int) -> tuple[str, int]:
    """(HTML, bytes it takes of the room for media)."""
    kinds = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".jpg": "image/jpeg", ".mp4": "video/mp4", ".webm": "video/webm"}
    name, size = _text(file.name), file.stat().st_size
    if file.suffix == ".txt":
        with open(file, encoding="utf-8", errors="replace") as stream:
            text = stream.read(TEXT_LIMIT + 1)
        cut = " (its beginning)" if len(text) > TEXT_LIMIT else ""
        return f"<p class=note>{name}{cut}</p><pre>{_text(text[:TEXT_LIMIT])}</pre>", 0
    if file.suffix not in kinds:
        return "", 0
    if size > room:
        return f"<p>{name}: {size / 1e6:.1f} MB, too large for this page; it is in the run's folder media.</p>", 0
    data = f"data:{kinds[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
    shown = f"<video controls loop muted src='{data}'></video>" if kinds[file.suffix].startswith("video") else f"<img alt='{name}' src='{data}'>"
    return f"<p class=note>{name}</p>{shown}", size


def _config(comparison: Comparison) -> list[str]:
    """What differed between the settings, and what was the same in all."""
    parts = ["<h2>Config</h2>"]
    if comparison.varying:
        rows = [[g.name, *(show(g.values[n]) if n in g.values else "" for n in comparison.varying)] for g in comparison.groups]
        different = {n: len({json.dumps(g.values.get(n)) for g in comparison.groups}) for n in comparison.varying}
        said = ", ".join(f"{n} ({k} values)" for n, k in different.items())
        table = _table(("setting", *comparison.varying), rows, 0)
        parts.append(f"<p>What differs: {_text(said)}.</p><details><summary>every setting's values</summary>{table}</details>")
    first = comparison.groups[0].entries[0].config
    seeds = {n for n in first if n.rpartition(".")[2] == "seed"} if len(comparison.entries) > 1 else set()
    heads = [g.entries[0].config for g in comparison.groups]
    same = {n: show(v, 400) for n, v in first.items() if n not in seeds and all(n in head and head[n] == v for head in heads)}
    if len(comparison.entries) == 1:
        return [*parts, _facts(same)]
    return [*parts, f"<details><summary>the {len(same)} fields that are the same in all</summary>{_facts(same)}</details>"]


def _provenance(entries: Sequence[Entry]) -> list[str]:
    """Where the runs came from: each fact once, with how many runs share it where they do not all."""

    def commit(e: Entry) -> str:
        git = e.record["git"]
        if not isinstance(git, dict):
            return "none (a file that no repository tracks)"
        return f"{git.get('commit')}{' and a diff (below)' if git.get('dirty') else ''}"

    def machine(e: Entry) -> str:
        h = e.record["hardware"]
        return ", ".join(str(part) for part in (h.get("processor"), f"{h.get('cores')} cores", *h.get("gpus", []), h.get("system")) if part)

    sources: dict[str, Callable[[Entry], str]] = {
        "command": lambda e: str(e.record.get("command", "")),
        "commit": commit,
        "plan": lambda e: ", ".join(f"{k} {v}" for k, v in e.record["plan"].items()),
        "versions": lambda e: ", ".join(f"{k} {v}" for k, v in e.record["versions"].items()),
        "machine": machine,
        "begun": lambda e: str(e.record.get("created", "")),
        "resumed": lambda e: ", ".join(map(str, e.record.get("resumed", []))),
    }
    facts: dict[str, str] = {}
    for name, of in sources.items():
        found = Counter(of(e) for e in entries)
        if name == "begun" and len(entries) > 1:
            facts[name] = f"{min(found)} to {max(found)}"
        elif len(found) == 1:
            facts[name] = next(iter(found))
        elif name == "command":
            facts[name] = f"{len(found)} commands, below"
        else:
            some = "; ".join(f"{value or 'none'} ({n} runs)" for value, n in found.most_common(4))
            facts[name] = some + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    for key, label in (("seconds", "seconds, all runs"), ("cpu_seconds", "CPU seconds, all runs")):
        spent = [float(c) for e in entries if isinstance(c := e.record["cost"].get(key), int | float)]
        facts[label if len(entries) > 1 else label.partition(",")[0]] = f"{sum(spent):,.1f}"
    parts = ["<h2>Where it came from</h2>", _facts({k: v for k, v in facts.items() if v})]
    commands = list(dict.fromkeys(str(e.record.get("command", "")) for e in entries))
    if len(commands) > 1:
        more = f"\nand {len(commands) - ROWS} more" if len(commands) > ROWS else ""
        listed = "\n".join(c[:300] for c in commands[:ROWS]) + more
        parts.append(f"<details><summary>the {len(commands)} commands</summary><pre>{_text(listed)}</pre></details>")
    diffs = Counter(text for e in entries if (text := _diff(e.path)))
    for text, n in diffs.most_common(3):
        cut = f" (its first {TEXT_LIMIT} characters; all of it is in git.diff)" if len(text) > TEXT_LIMIT else ""
        whose = f" of {n} runs" if len(entries) > 1 else ""
        parts.append(f"<details><summary>the diff against the commit{whose}{cut}</summary><pre>{_text(text[:TEXT_LIMIT])}</pre></details>")
    if len(diffs) > 3:
        parts.append(f"<p class=warn>{len(diffs)} different diffs: the code was changed between the runs.</p>")
    return parts


def _diff(path: Path) -> str:
    file = path / "git.diff"
    if not file.is_file() or file.is_symlink():  # a link in a stranger's folder could show anything of this machine
        return ""
    with open(file, encoding="utf-8", errors="replace") as stream:
        return stream.read(TEXT_LIMIT + 1)


def of_words(words: Sequence[str], out: Path | None, *, y: str | None = None, better: str | None = None) -> tuple[Path, list[str]]:
    """The report about the runs that `words` mean; (where it stands, remarks). Without `out`: in the run's or sweep's folder, or here for several."""
    comparison = load(words)
    target = out or (Path(words[0]) if len(words) == 1 else Path()) / "report.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out: expected a name that ends in .html, got {target}")
    return target, list(save(comparison, target, y=y, better=better))

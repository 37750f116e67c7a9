"""What a person looks at when a run is over: a picture of the curves, and one HTML page that opens offline."""

import base64
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onetorch.runs import folder

CURVES = 9  # at most so many quantities are drawn
POINTS = 1000  # at most so many points a curve
EMBED_LIMIT = 16 << 20  # bytes of a video or picture that goes into the page
TEXT_LIMIT = 20_000  # characters of a text that goes into the page

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td{padding:.1em 1.2em .1em 0;vertical-align:top;overflow-wrap:anywhere}td:first-child{color:#666;white-space:nowrap}
img,video{max-width:100%}pre{background:#f4f4f4;padding:1em;white-space:pre-wrap;overflow-wrap:anywhere}h2{margin-top:2em}"""


def write(path: Path, record: dict[str, Any]) -> Iterator[str]:
    """Write media/curves.png and report.html of the run in `path`; yields a line for a person about what could not be made."""
    series = _series(path)
    if series:
        try:
            _draw(series, path / "media" / "curves.png")
        except ImportError:
            yield "no picture of the curves: matplotlib is missing (pip install 'onetorch[media]')"
    (path / "report.html").write_text(_page(path, record), encoding="utf-8")


def _series(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Every logged number as (steps, values), those with the most rows first, thinned to a picture's resolution."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in folder.rows(path):
        for name, value in row.items():
            if name not in ("step", "seconds", "cpu_seconds") and type(value) in (int, float):
                xs, ys = found.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(value)
    chosen = [(n, xy) for n, xy in found.items() if len(xy[0]) > 1][:CURVES]
    return {n: (xs[:: 1 + len(xs) // POINTS], ys[:: 1 + len(ys) // POINTS]) for n, (xs, ys) in chosen}


def _draw(series: dict[str, tuple[list[int], list[float]]], target: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: that would open a window system

    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    for place, (name, (xs, ys)) in enumerate(series.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.plot(xs, ys, linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=120)


def _page(path: Path, record: dict[str, Any]) -> str:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["config"]
    title = html.escape(f"{record['recipe']} · {path.resolve().name}")
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    parts.append(_rows(record["result"] | {"seconds": record["cost"]["seconds"], "CPU seconds": record["cost"]["cpu_seconds"]}))
    media = path / "media"
    for file in sorted(media.iterdir(), key=lambda f: (f.name != "curves.png", f.name)) if media.is_dir() else []:
        parts.append(_medium(file))
    parts.append("<h2>Config</h2>" + _rows(config))
    hardware = record["hardware"]
    origin = {
        "command": record["command"],
        "plan": ", ".join(f"{k} {v}" for k, v in record["plan"].items()),
        "commit": "none" if record["git"] is None else record["git"]["commit"] + (" and a diff, kept in git.diff" if record["git"]["dirty"] else ""),
        "versions": ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
        "machine": ", ".join([hardware["processor"], f"{hardware['cores']} cores", *hardware["gpus"], hardware["system"]]),
        "begun": record["created"],
        "seeds": f"one ({record['seed']}): a single run says nothing about the spread",
    }
    parts.append("<h2>Where it came from</h2>" + _rows(origin) + "</html>\n")
    return "\n".join(parts)


def _rows(values: dict[str, Any]) -> str:
    cells = [
        f"<tr><td>{html.escape(str(name))}<td>{html.escape(f'{value:.6g}' if isinstance(value, float) else str(value))}" for name, value in values.items()
    ]
    return "<table>" + "".join(cells) + "</table>"


def _medium(file: Path) -> str:
    kinds = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".mp4": "video/mp4"}
    name = html.escape(file.name)
    if file.suffix == ".txt":
        return f"<h2>{name}</h2><pre>{html.escape(file.read_text(encoding='utf-8', errors='replace')[:TEXT_LIMIT])}</pre>"
    if file.suffix not in kinds:
        return ""
    if file.stat().st_size > EMBED_LIMIT:
        return f"<h2>{name}</h2><p>in media/, too large for this page</p>"
    data = f"data:{kinds[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
    shown = f"<video controls loop src='{data}'></video>" if file.suffix == ".mp4" else f"<img alt='{name}' src='{data}'>"
    return f"<h2>{name}</h2>{shown}"

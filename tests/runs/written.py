"""Run folders as a run writes them, without training: for tests of what reads several of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onetorch.runs import folder


def write(path: Path, config: dict[str, Any], rows: Sequence[dict[str, Any]] = (), result: dict[str, Any] | None = None, **record: Any) -> Path:
    """A finished run in `path`; rows get their `seconds` from their step where they have none."""
    path.mkdir(parents=True)
    entry = {"format": folder.FORMAT, "recipe": "made", "algorithm": "onetorch.rl.made", "config": config}
    whole: dict[str, Any] = {"format": folder.FORMAT, "status": "done", "recipe": "made", "command": f"onetorch train made --dir {path.name}"}
    whole |= {"created": "2026-01-01T00:00:00+0000", "seed": config.get("seed"), "git": None, "versions": {"python": "3.11.0"}, "plan": {}}
    whole |= {"hardware": {"processor": "abacus", "cores": 1, "gpus": [], "system": "s"}, "cost": {"seconds": 2.0, "cpu_seconds": 1.5}}
    whole |= {"progress": {"done": len(rows), "total": len(rows)}, "result": result or {}}
    lines = [json.dumps({"step": row["step"], "seconds": row.get("seconds", row["step"] / 100), "cpu_seconds": 0.0, **row}) for row in rows]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (path / "run.json").write_text(json.dumps(whole | record), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(entry), encoding="utf-8")
    return path


def curve(values: Sequence[float], every: int = 1, name: str = "loss") -> list[dict[str, Any]]:
    """Rows of one quantity at every `every` steps."""
    return [{"step": every * (i + 1), name: v} for i, v in enumerate(values)]


def grid(home: Path, seeds: int = 3, result: str = "loss") -> Path:
    """A sweep of lr 0.1 and 0.2 and width 4 and 8: result = 10 lr + width + a hundredth of the seed, so that both effects are known."""
    for lr in (0.1, 0.2):
        for width in (4, 8):
            for seed in range(seeds):
                end = 10 * lr + width + seed / 100
                rows = curve([end * (2 - i / 20) for i in range(21)])
                write(home / f"made-{lr}-{width}-{seed}", {"seed": seed, "lr": lr, "width": width, "env": "pole"}, rows, {result: end})
    return home

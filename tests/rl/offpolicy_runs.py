"""What the tests of SAC, TD3 and DDPG share: a small config, an update's turn, and a run with its metrics."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from onetorch.rl import td3
from onetorch.runs.run import Run


def small(kind: Any, **fields: Any) -> Any:
    return kind(**({"total_steps": 400, "random_steps": 100, "update_after": 50, "batch_size": 32, "hidden": (32,), "replay": 1000, "log_every": 20} | fields))


def which(algorithm: ModuleType, config: Any, state: Any) -> list[bool]:
    """What an update has to be told: of TD3, whether it is the policy's turn."""
    return [td3.turn(config, state)] if algorithm is td3 else []


def train(algorithm: ModuleType, folder: Path, config: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    fixed = {"threads": "1", "dtype": "float32"} | options.pop("fixed", {})
    with Run(folder, config, quiet=True, fixed=fixed, **options) as run:
        model = algorithm.train(config, run)
    return model, timeless(folder)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the columns that depend on time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]

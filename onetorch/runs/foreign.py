"""Logs of others, read as if they were runs of ours, so that `plot` and `report` draw them beside: found by what lies in a folder. Imports no torch.

| in the folder                | written by                                      | read with                  |
|------------------------------|-------------------------------------------------|----------------------------|
| progress.txt                 | Spinning Up's logger                            | columns parted by tabs     |
| progress.csv                 | stable-baselines3's logger                      | columns parted by commas   |
| monitor.csv, *.monitor.csv   | stable-baselines3's and Gymnasium's monitor     | one row an episode         |
| events.out.tfevents.*        | TensorBoard (CleanRL, stable-baselines3, …)     | the extra `board`          |

Quantities that ours log too get our names (`NAMES`), all others keep their own. Such a log does not say how its run ended: it counts as done.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onetorch.runs.compare import CLOCKS, Column, Entry
from onetorch.runs.errors import RunError, UsageError

NAMES = {
    # Spinning Up
    "AverageEpRet": "return",
    "AverageTestEpRet": "test_return",
    "EpLen": "episode_length",
    "LossPi": "policy_loss",
    "LossV": "value_loss",
    "LossQ": "q_loss",
    "Entropy": "entropy",
    "KL": "kl",
    "ClipFrac": "clipped",
    # stable-baselines3
    "rollout/ep_rew_mean": "return",
    "rollout/ep_len_mean": "episode_length",
    "rollout/exploration_rate": "epsilon",
    "eval/mean_reward": "test_return",
    "train/loss": "loss",
    "train/policy_gradient_loss": "policy_loss",
    "train/actor_loss": "policy_loss",
    "train/value_loss": "value_loss",
    "train/critic_loss": "q_loss",
    "train/approx_kl": "kl",
    "train/clip_fraction": "clipped",
    "train/explained_variance": "explained_variance",
    "train/learning_rate": "lr",
    # CleanRL
    "charts/episodic_return": "return",
    "charts/episodic_length": "episode_length",
    "charts/learning_rate": "lr",
    "losses/td_loss": "loss",
    "losses/policy_loss": "policy_loss",
    "losses/actor_loss": "policy_loss",
    "losses/value_loss": "value_loss",
    "losses/qf_loss": "q_loss",
    "losses/q_values": "q",
    "losses/entropy": "entropy",
    "losses/approx_kl": "kl",
    "losses/clipfrac": "clipped",
    "losses/explained_variance": "explained_variance",
}
STEP = ("TotalEnvInteracts", "time/total_timesteps")
SECONDS = ("Time", "time/time_elapsed")
WINDOW = 100  # episodes over which the returns of a monitor are averaged, as ours are


def files(path: Path) -> list[Path]:
    """The logs of others that lie in the folder `path`, of the first kind that is there; none in a run of ours or a model folder."""
    if (path / "run.json").exists() or (path / "manifest.json").exists():
        return []
    for pattern in ("progress.txt", "progress.csv", "*monitor.csv", "events.out.tfevents.*"):
        found = sorted(p for p in path.glob(pattern) if p.is_file())
        if found:
            return found
    return []


def read(path: Path) -> Entry:
    """The log in the folder `path` as a run. RunError where it is damaged, UsageError where what reads it is missing."""
    logs = files(path)
    first = logs[0].name
    if first.startswith("events."):
        maker, columns = "TensorBoard", _events(path)
    elif first.endswith("monitor.csv"):
        maker, columns = "monitor", _monitors(logs)
    else:
        maker = "Spinning Up" if first == "progress.txt" else "stable-baselines3"
        columns = _table(logs[0], "\t" if first == "progress.txt" else ",")
    if not columns:
        raise RunError(f"{logs[0]} holds no number at any step")
    config = _config(path) if maker == "Spinning Up" else {}
    name, seed = _name(path.resolve().name)
    config = {"algorithm": config.pop("exp_name", name)} | config
    if "seed" not in config and seed is not None:
        config["seed"] = seed
    seconds = max(float(c.seconds[-1]) for c in columns.values())
    record: dict[str, Any] = {part: {} for part in ("result", "progress", "versions", "hardware", "plan")}
    record |= {"git": None, "recipe": maker, "cost": {"seconds": seconds}}
    return Entry(path.resolve(), record, "done", config, columns)


def _name(name: str) -> tuple[str, int | None]:
    """A folder's name as the name of a setting, and the seed in it, if any.

    >>> _name("cartpole_s3"), _name("PPO_12"), _name("CartPole-v1__dqn__1__1700000000"), _name("lr0.1")
    (('cartpole', 3), ('PPO', 12), ('CartPole-v1 dqn', 1), ('lr0.1', None))
    """
    if match := re.fullmatch(r"(.+)__(.+)__(\d+)__\d+", name):  # CleanRL: environment, experiment, seed, time
        return f"{match[1]} {match[2]}", int(match[3])
    if match := re.fullmatch(r"(.+?)[_-]s?(?:eed)?(\d+)", name):
        return match[1], int(match[2])
    return name, None


def _config(path: Path) -> dict[str, Any]:
    """Spinning Up's config.json without what it says of places and objects of its own process."""
    file = path / "config.json"
    try:
        whole = json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged (not JSON: {error}); without it the log is read by the folder's name alone") from error
    config: dict[str, Any] = {}
    stack = [("", whole)] if isinstance(whole, dict) else []
    while stack:
        prefix, values = stack.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{name}.", value))
            elif not (isinstance(value, str) and " at 0x" in value):
                config[prefix + name] = value
    return {name: value for name, value in config.items() if name.partition(".")[0] not in ("logger", "logger_kwargs")}


def _table(path: Path, separator: str) -> dict[str, Column]:
    """A logger's table: a line of names, then a row of numbers for each time it wrote; empty where a quantity had none."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number, row in _rows(path, separator):
        step = next((row[name] for name in STEP if name in row), None)
        if step is None:
            raise RunError(f"{path}:{number} names no number of steps (expected {' or '.join(STEP)})")
        seconds = next((row[name] for name in SECONDS if name in row), 0.0)
        for name, value in row.items():
            if name not in STEP + SECONDS:
                found.setdefault(NAMES.get(name, name), []).append((step, seconds, value))
    return _columns(found)


def _rows(path: Path, separator: str) -> Iterator[tuple[int, dict[str, float]]]:
    """(line, names to numbers) of each row. A last line that was cut off while it was written is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and lines[0].startswith("#"):
        lines[0] = "\n"  # a monitor's remark about itself
    table = [(i, cells) for i, cells in enumerate(csv.reader(io.StringIO("".join(lines)), delimiter=separator), 1) if cells]
    if not table:
        return
    names = table[0][1]
    for number, cells in table[1:]:
        if number == len(lines) and (len(cells) != len(names) or not lines[-1].endswith("\n")):
            return
        if len(cells) > len(names):
            raise RunError(f"{path}:{number} has {len(cells)} cells under {len(names)} names")
        row = {}
        for name, cell in zip(names, cells, strict=False):
            try:
                value = float(cell)
            except ValueError:
                continue  # empty where nothing was logged, or a text
            if math.isfinite(value):
                row[name] = value
        yield number, row


def _monitors(paths: list[Path]) -> dict[str, Column]:
    """Episodes of all environments in the order of their ends: return and length as means of the last 100, over the steps of all together."""
    episodes = []
    for path in paths:
        for number, row in _rows(path, ","):
            if not {"r", "l", "t"} <= row.keys():
                raise RunError(f"{path}:{number} is no row of a monitor (expected r, l and t)")
            episodes.append((row["t"], row["l"], row["r"]))
    if not episodes:
        return {}
    seconds, length, reward = np.array(sorted(episodes)).T

    def mean(values: Any) -> Any:
        total = np.concatenate(([0.0], np.cumsum(values)))
        end = np.arange(1, len(total))
        return (total[end] - total[np.maximum(end - WINDOW, 0)]) / np.minimum(end, WINDOW)

    steps = np.cumsum(length)
    return {"return": Column(steps, seconds, mean(reward)), "episode_length": Column(steps, seconds, mean(length))}


def _events(path: Path) -> dict[str, Column]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise UsageError(f"{path} holds TensorBoard's event files, and tensorboard is missing ({error}): pip install 'onetorch[board]'") from error
    log = EventAccumulator(str(path), size_guidance={"scalars": 0})
    log.Reload()
    found: dict[str, list[tuple[float, float, float]]] = {}
    begun = log.FirstEventTimestamp() if log.Tags()["scalars"] else 0.0
    for tag in log.Tags()["scalars"]:
        points = [(float(e.step), e.wall_time - begun, float(e.value)) for e in log.Scalars(tag)]
        found.setdefault(NAMES.get(tag, tag), []).extend(p for p in points if math.isfinite(p[2]))
    return _columns(found)


def _columns(found: dict[str, list[tuple[float, float, float]]]) -> dict[str, Column]:
    columns = {}
    for name, points in found.items():
        if points and name not in CLOCKS:
            x = np.array(points, dtype=np.float64).T
            columns[name] = Column(*x[:, np.argsort(x[0], kind="stable")])
    return columns

"""TensorBoard's event files from a run's metrics, for who looks at runs there (extra `board`). The run's own record stays metrics.jsonl."""

import calendar
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from onetorch.runs import compare, folder, foreign
from onetorch.runs.compare import CLOCKS
from onetorch.runs.errors import UsageError


def convert(words: Sequence[str], out: Path) -> list[Path]:
    """Write the scalars of the runs that `words` mean, and their configs as text, into one folder a run below `out`; returns these, each written anew.

    A row's wall time is the beginning of the run and the seconds it had trained. Raises UsageError where tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UsageError(f"tensorboard is missing ({error}): pip install 'onetorch[board]'") from error
    made = []
    for path in compare.find(words):
        if foreign.files(path):
            raise UsageError(f"{path} holds a log that is not onetorch's; only runs of onetorch become event files")
        entry = compare.read(path)
        target = out / entry.name
        if target in made:
            raise UsageError(f"two runs are called {entry.name}; convert them into two folders (--out)")
        if target.exists():
            strange = [p.name for p in target.iterdir() if not p.name.startswith("events.out.tfevents.")]
            if strange:
                raise UsageError(f"{target} is there and holds {strange[0]}, which is none of TensorBoard's files; choose another --out")
            shutil.rmtree(target)
        begun = _time(str(entry.record.get("created", "")))
        writer = SummaryWriter(str(target))
        rows = "".join(f"| {name} | {compare.show(value, 200)} |\n" for name, value in entry.config.items())
        writer.add_text("config", f"| field | value |\n|---|---|\n{rows}", walltime=begun)
        for row in folder.rows(path):
            for name, value in row.items():
                if name not in CLOCKS and type(value) in (int, float):
                    writer.add_scalar(name, value, row["step"], walltime=begun + row.get("seconds", 0.0))
        writer.close()
        made.append(target)
    return made


def _time(created: str) -> float:
    """Seconds since 1970 of `2026-01-31T12:00:00+0100`.

    >>> _time("1970-01-01T01:00:10+0100")
    10.0
    """
    try:
        parsed = time.strptime(created, "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return 0.0
    return float(calendar.timegm(parsed) - (parsed.tm_gmtoff or 0))

"""A run as the processes beside the first see it: they compute along and touch nothing in its folder."""

from pathlib import Path
from typing import Any

from onetorch.runs import checkpoint, distributed, plan, state
from onetorch.runs.errors import Stopped
from onetorch.runs.run import Run, S


class Follower(Run):
    """The run that process 0 holds in the same folder; what it decides is what happens here."""

    def _open(self, *_: Any) -> None:
        self.quiet = True
        self.record = distributed.agree(None)  # once process 0 has the folder

    @property
    def media(self) -> Path:
        return self.folder / "media"

    def plan(
        self, measure: plan.Measure | None = None, *, key: str = "", asked: dict[str, tuple[Any, ...]] | None = None, **dimensions: tuple[Any, ...]
    ) -> dict[str, Any]:
        choice = distributed.agree(None)
        plan.set_threads(choice)
        self.record["plan"] = choice
        return dict(choice)

    def restore(self, live: S) -> S:
        self._state = live
        step = distributed.agree(None)
        self._initialize(live)
        if step is not None:
            found = checkpoint.load(self.folder / "checkpoints" / checkpoint.folder_name(step))
            state.restore_state(live, found.record["state"], found.model, found.state)
            self._saved = self.iteration = found.step
            self._last_step = found.record["last_step"]
        return live

    def _leave_if_told(self) -> None:
        if distributed.agree_to(False):
            if self._state is not None and self.iteration > 0:
                self._save(self._state)
            raise Stopped("process 0 stops", 0)

    def _start_signals(self) -> None:
        """Process 0 is told, and tells."""

    def _flush(self, sync: bool = False) -> None:
        self._rows.clear()

    def _save(self, live: Any) -> None:
        if distributed.sharding and self._saved != self.iteration:
            state.pack_state(live)  # our shares of it
            self._saved = self.iteration

    def _write_record(self) -> None: ...

    def _peak_flops(self) -> float:
        return float("inf")  # rows are not kept here

    def close(self, status: str = "done", why: str = "") -> None: ...

    def _forget(self) -> None: ...

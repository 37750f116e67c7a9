"""What a person sees while a run works: a bar on a terminal, plain lines elsewhere. Everything goes to standard error."""

import sys
import time

BAR_SECONDS, LINE_SECONDS = 0.1, 10.0  # between two updates of the bar, between two plain lines


def clock(seconds: float) -> str:
    """
    >>> clock(4.2), clock(75), clock(7325)
    ('4 s', '1 min 15 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Shows how far a run is, its rate, the time left and two or three numbers. `update` is cheap enough for every step."""

    def __init__(self, done: int, total: int, unit: str, scale: int, quiet: bool = False) -> None:
        self.first, self.total, self.unit, self.scale, self.quiet = done, total, unit, scale, quiet
        self.start = self.shown = time.perf_counter()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
            self.task = self.bar.add_task("", total=total * scale, completed=done * scale)
            self.bar.start()

    def update(self, done: int, values: dict[str, float], last: bool = False) -> None:
        """Show `done` of `total` iterations, if it is time to."""
        now = time.perf_counter()
        if self.quiet or (not last and now - self.shown < (BAR_SECONDS if self.bar else LINE_SECONDS)):
            return
        self.shown = now
        text = self._text(done, now - self.start, values)
        if self.bar:
            self.bar.update(self.task, completed=done * self.scale, description=text, refresh=True)
        else:
            percent = 100 * done / max(self.total, 1)
            try:
                sys.stderr.write(f"{done * self.scale:,}/{self.total * self.scale:,} {self.unit} ({percent:.0f} %) {text}\n")
                sys.stderr.flush()
            except BrokenPipeError:
                self.quiet = True  # whoever read it has gone (`2>&1 | head`); the training goes on

    def _text(self, done: int, elapsed: float, values: dict[str, float]) -> str:
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        if not rate:
            return numbers
        return f"{rate * self.scale:,.0f} {self.unit}/s, {clock((self.total - done) / rate)} left  {numbers}"

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self.bar:
            self.bar.stop()
            self.bar = None

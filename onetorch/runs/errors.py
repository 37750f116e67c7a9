"""The exceptions that reach a user: one line each, with the exit code of the command line."""


class OneTorchError(Exception):
    """Base of every error that onetorch raises on purpose; `exit_code` is what the command line leaves with."""

    exit_code = 3


class UsageError(OneTorchError, ValueError):
    """The command, a name or a value is wrong; nothing was done. Also a ValueError, as library code expects of a wrong argument."""

    exit_code = 2


class RunError(OneTorchError):
    """The run cannot go on; what was saved before stands."""


class CheckpointError(RunError):
    """A checkpoint cannot be trusted or does not fit: damaged, incomplete, of another run, config or format."""


class NonFinite(RunError):  # noqa: N818 (what it is, not that it is one)
    """A loss, gradient or weight is NaN or infinite; raised before it can reach the weights or a checkpoint."""


class Stopped(SystemExit):
    """A stop signal or the time limit, after the state was saved. Not an `Exception`, so that no algorithm swallows it; a script that lets it through leaves
    with `exit_code`, as after any other exit."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(exit_code)
        self.reason, self.exit_code = reason, exit_code

    def __str__(self) -> str:
        return self.reason

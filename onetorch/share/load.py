"""A trained module from a folder."""

import os
from pathlib import Path

from torch import nn

from onetorch.runs import algorithm, checkpoint, folder
from onetorch.runs.config import to_json
from onetorch.runs.errors import CheckpointError, RunError, UsageError
from onetorch.runs.run import open_config


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The module of the run in the folder `path`, with the weights of its newest valid checkpoint, in eval mode on the CPU.

    Raises UsageError if `path` holds no run, RunError if the run has no checkpoint yet, CheckpointError if none can be trusted or the weights do not fit.
    """
    where = Path(path)
    source = algorithm_of(where)
    found, _ = checkpoint.newest(where / "checkpoints", only_model=True)
    if found is None:
        raise RunError(f"{where} has no checkpoint yet; `onetorch resume {where}` begins it again")
    module = source.load()
    config = open_config(where, module.Config)
    if found.record.get("config") != to_json(config):
        raise CheckpointError(f"{where / 'config.json'} changed since {found.folder}: put it back")
    model: nn.Module = module.build(config)
    try:
        model.load_state_dict(found.model)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {found.folder} do not fit the module: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def algorithm_of(where: Path) -> algorithm.Algorithm:
    """The algorithm that the run in `where` was made with: one of onetorch's own, or the copy of a user's file that stands in the folder."""
    if not folder.holds_run(where):
        raise UsageError(f"{where} holds no run (no config.json)" + ("" if where.exists() else "; there is no such folder"))
    name = folder.read_json(where / "config.json").get("algorithm")
    if name == "source.py":
        return algorithm.read(where / "source.py")
    # Only the name of a file of ours is taken from the folder, never a module to import.
    known = {f"onetorch.{p.parent.name}.{p.stem}": n for n, p in algorithm.builtin().items()}
    if name not in known:
        raise UsageError(f"{where / 'config.json'} names the algorithm {name!r}, which this onetorch does not have")
    return algorithm.read(known[name])

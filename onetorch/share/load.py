"""A trained module from a folder."""

import os
from pathlib import Path

from torch import nn

from onetorch.runs import algorithm, checkpoint, folder, state
from onetorch.runs.config import to_json
from onetorch.runs.errors import CheckpointError, RunError


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The module of the run in the folder `path`, with the weights of its newest valid checkpoint, in eval mode on the CPU.

    Raises UsageError if `path` holds no run, RunError if the run has no checkpoint yet, CheckpointError if none can be trusted or the weights do not fit.
    """
    where = Path(path)
    source = algorithm.of_run(where)
    found, _ = checkpoint.newest(where / "checkpoints", only_model=True)
    if found is None:
        raise RunError(f"{where} has no checkpoint yet; `onetorch resume {where}` begins it again")
    module = source.load()
    config = folder.config(where, module.Config)
    if found.record.get("config") != to_json(config):
        raise CheckpointError(f"{where / 'config.json'} changed since {found.folder}: put it back")
    model: nn.Module = module.build(config)
    try:
        model.load_state_dict(state.unpack(found.record["state"]["fields"]["model"], found.model))
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the weights in {found.folder} do not fit the module: {' '.join(str(error).split())[:300]}") from error
    return model.eval()

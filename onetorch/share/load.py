"""A trained module from a folder: a run's, or a model folder that came from anywhere."""

import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from onetorch.runs import algorithm, checkpoint, folder, state, trust
from onetorch.runs.algorithm import Algorithm
from onetorch.runs.checkpoint import Checkpoint
from onetorch.runs.config import from_json, to_json
from onetorch.runs.errors import CheckpointError, OneTorchError, RunError, UsageError
from onetorch.share import folder as folders
from onetorch.share import places
from onetorch.share.folder import CONFIG, MODEL, PROVENANCE, SOURCE, Contents
from onetorch.share.rebuild import rebuild


@dataclass(frozen=True)
class Loaded:
    """A module and all that is known of it."""

    model: nn.Module
    source: Algorithm
    module: types.ModuleType  # the algorithm, imported
    config: Any
    weights: dict[str, Tensor]
    saved: Checkpoint | None = None  # where it is a run's


def load(where: str | os.PathLike[str], *, trust_code: bool = False) -> nn.Module:
    """The trained module of a run's folder (its newest valid checkpoint) or of a model folder at a path or URL, in eval mode on the CPU.

    Code that is not onetorch's (the folder's `source.py`) runs with `trust_code` only; without it, UsageError. A run that you trained is your own code.

    Raises UsageError if there is no such folder, RunError if a run has no checkpoint yet, CheckpointError if what stands there cannot be trusted or the weights
    do not fit.
    """
    if not places.is_url(where) and not folders.is_model(Path(where)):
        return load_run(Path(where), trust.anybody if trust_code else trust.own_only).model
    return load_model(folders.read(places.place(where)), trust.anybody if trust_code else trust.nobody).model


def load_run(where: Path, gate: trust.Gate = trust.own_only) -> Loaded:
    """The run in the folder `where` with the weights of its newest valid checkpoint. Raises as `load` does."""
    source = algorithm.of_run(where, gate)
    found, _ = checkpoint.newest(where / "checkpoints", only_model=True)
    if found is None:
        raise RunError(f"{where} has no checkpoint yet; `onetorch resume {where}` begins it again")
    module = source.load()
    config = folder.config(where, module.Config)
    if found.record.get("config") != to_json(config):
        raise CheckpointError(f"{where / 'config.json'} changed since {found.folder}: put it back")
    return Loaded(_of_checkpoint(module, config, found), source, module, config, found.model, found)


def _of_checkpoint(module: types.ModuleType, config: Any, found: Checkpoint) -> nn.Module:
    saved = state.unpack(found.record["state"]["fields"]["model"], found.model)
    if saved.keys() == found.model.keys():
        return rebuild(module.build, config, found.model, str(found.folder), watched=False)
    model: nn.Module = module.build(config)  # its state holds more than tensors, and goes in as it came out
    try:
        model.load_state_dict(saved)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the weights in {found.folder} do not fit the module: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def foreign(contents: Contents) -> bool:
    """Whether the model folder is of code that is not part of onetorch."""
    return bool(contents.json(CONFIG).get("algorithm") == SOURCE)


def load_model(contents: Contents, gate: trust.Gate = trust.nobody) -> Loaded:
    """The module of a model folder whose files are checked. Raises as `load` does; `gate` is asked before anything of the folder is executed."""
    what, entry = contents.name(CONFIG), contents.json(CONFIG)
    if entry.keys() != {"format", "recipe", "algorithm", "config"} or not isinstance(entry["recipe"], str):
        raise CheckpointError(f"{what} is damaged: expected format, recipe, algorithm and config")
    if foreign(contents):
        code, path = bytes(contents.files[SOURCE]), Path(contents.name(SOURCE))
        gate(code, path)
        source = algorithm.of_code(path, code)
    else:
        source = algorithm.named(entry, Path(what), gate)
    contents.json(PROVENANCE)
    weights = contents.tensors(MODEL)
    module = source.load()
    try:
        config = from_json(entry["config"], module.Config)
    except OneTorchError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except Exception as error:  # the Config's own checks, of values that nobody foresaw
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
    return Loaded(rebuild(module.build, config, weights, what, watched=True), source, module, config, weights)


def weights_of(where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights to begin a run from, and where they came from: of a run, a model folder (path or URL), a .safetensors file, or a .pt file.

    No code of the folder is executed. Raises UsageError, RunError and CheckpointError.
    """
    origin: dict[str, Any] = {"path": where}
    path = Path(where)
    if places.is_url(where) or folders.is_model(path):
        contents = folders.read(places.place(where))
        return contents.tensors(MODEL), origin | {"recipe": contents.json(CONFIG).get("recipe")}
    if path.is_file():
        from onetorch.share.port import tensors_of

        return tensors_of(path), origin
    if not folder.holds_run(path):
        raise UsageError(f"{where}: there is no run, model folder, .safetensors or .pt file")
    found, _ = checkpoint.newest(path / "checkpoints", only_model=True)
    if found is None:
        raise UsageError(f"{where} has no checkpoint yet")
    return found.model, origin | {"recipe": folder.read_json(path / "config.json").get("recipe"), "step": found.step}

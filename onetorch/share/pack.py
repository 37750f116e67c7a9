"""From a run to a model folder: weights, config, source, golden outputs, provenance and card, checked for what nobody means to share."""

import json
import math
import shlex
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onetorch.runs import folder, sealed, trust
from onetorch.runs.config import to_json
from onetorch.runs.errors import UsageError
from onetorch.share import card, places, private
from onetorch.share import folder as folders
from onetorch.share.folder import CARD, CONFIG, GOLDEN, MODEL, PROVENANCE, SOURCE
from onetorch.share.load import Loaded, load_run
from onetorch.share.rebuild import difference, outputs, size, slack


@dataclass(frozen=True)
class Package:
    """A model folder that is ready to be written."""

    files: dict[str, list[sealed.Piece]]
    known: dict[str, str]  # SHA-256 of the files that were hashed before
    private: list[tuple[str, str]]  # (file:line, what stands there) that was not allowed
    notes: list[str]  # what a person should know about it


def pack(run: Path, where: str, *, licence: str | None = None, allow: tuple[str, ...] = (), gate: trust.Gate = trust.own_only) -> Package:
    """The model folder of the newest checkpoint of `run`, to stand at `where` (path or URL, which its card names).

    `allow` names findings that may be shared: a file, or a file:line.

    Raises as `load_run` does.
    """
    if folders.is_model(run):
        raise UsageError(f"{run} is a model folder already; copy it as it is, or share a run")
    loaded = load_run(run, gate)
    saved = loaded.saved
    assert saved is not None
    if loaded.weights.keys() != loaded.model.state_dict().keys():
        extra = sorted(loaded.model.state_dict().keys() - loaded.weights.keys())
        raise UsageError(f"{extra[0]} of the module's state is no tensor, and a model folder's weights are tensors: make it a buffer or a part of Config")
    record = folder.read_json(run / "run.json")
    notes: list[str] = []
    golden = _golden(loaded, notes)
    provenance = _provenance(run, record, loaded, saved.step, licence, golden is not None)
    if provenance["results"] is None:
        notes.append("no results: nothing was measured at this checkpoint, and the card says so; `onetorch eval` measures")
    if licence is None:
        notes.append("no licence: the card says that nobody may use it without asking; --license gives one")
    entry = folder.read_json(run / "config.json")
    config = {key: entry.get(key) for key in ("format", "recipe", "algorithm")} | {"config": to_json(loaded.config)}
    texts = {
        CONFIG: json.dumps(config, indent=1, allow_nan=False) + "\n",
        SOURCE: loaded.source.code.decode("utf-8"),
        PROVENANCE: json.dumps(provenance, indent=1, allow_nan=False) + "\n",
        CARD: card.write(provenance, config, loaded.source.doc, where if places.is_url(where) else Path(where).absolute().name),
    }
    found = [(place, what) for place, what in private.findings(texts) if place not in allow and place.partition(":")[0] not in allow]
    files: dict[str, list[sealed.Piece]] = {MODEL: [saved.file], **{name: [text.encode()] for name, text in texts.items()}}
    if golden is not None:
        files[GOLDEN] = sealed.dump(golden)
    for name, limit in folders.LIMITS.items():
        if name in files and sealed.length(files[name]) > limit:
            raise UsageError(f"{name} would have {sealed.length(files[name])} bytes; a model folder takes at most {limit}")
    return Package(files, {MODEL: saved.sha256}, found, notes)


def examples(module: types.ModuleType, config: Any) -> list[Tensor] | None:
    """What the algorithm's `example(config)` gives, a tensor or a tuple of tensors to call the module with; None where the file has no such function."""
    function = getattr(module, "example", None)
    if function is None:
        return None
    generators = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        found = function(config)
    finally:
        torch.set_rng_state(generators)
    found = (found,) if isinstance(found, Tensor) else found
    if not isinstance(found, tuple | list) or not all(isinstance(x, Tensor) for x in found):
        raise UsageError(f"example(config) gives a tensor or a tuple of tensors, got {type(found).__name__}")
    return [x.detach() for x in found]


def _golden(loaded: Loaded, notes: list[str]) -> dict[str, Tensor] | None:
    inputs = examples(loaded.module, loaded.config)
    if inputs is None:
        notes.append(f"no golden outputs: {loaded.source.path.name} has no `example(config)`; whoever gets the model cannot check what it answers")
        return None
    what, limit = "example(config)", slack(loaded.weights)
    found = outputs(loaded.model, inputs, limit, what)
    problem, _ = difference(found, outputs(loaded.model, inputs, math.inf, what))
    if problem:
        raise UsageError(f"the module does not answer the same twice ({problem}): a module in eval mode has to, for golden outputs to mean something")
    return {f"input.{i}": x for i, x in enumerate(inputs)} | found


def _provenance(run: Path, record: dict[str, Any], loaded: Loaded, step: int, licence: str | None, golden: bool) -> dict[str, Any]:
    hardware = {k: v for k, v in record.get("hardware", {}).items() if k != "host"}
    origin = record.get("from")
    return {
        "format": folder.FORMAT,
        "recipe": record.get("recipe"),
        "algorithm": loaded.source.module or SOURCE,
        "command": _command(record.get("command", "")),
        "created": record.get("created"),
        "seed": record.get("seed"),
        "git": record.get("git"),
        "versions": record.get("versions", {}),
        "hardware": hardware,
        "plan": record.get("plan", {}),
        "progress": record.get("progress", {}) | {"done": step},
        "cost": record.get("cost", {}),
        "begun_from": None if origin is None else {k: origin[k] for k in ("recipe", "step", "sha256") if k in origin},
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "bytes": size(loaded.weights),
        "results": _results(run, record, step),
        "golden": golden,
        "licence": licence,
    }


def _command(command: str) -> str:
    """The command without the place of the user's file, which is source.py in the folder."""
    return shlex.join(SOURCE if word.endswith(".py") else word for word in shlex.split(command))


def _results(run: Path, record: dict[str, Any], step: int) -> dict[str, Any] | None:
    """What was measured of exactly these weights: by `onetorch eval`, or else at the end of the run."""
    measured = folder.read_json(run / "eval.json") if (run / "eval.json").exists() else {}
    if measured.get("step") == step:
        found = {"by": "onetorch eval", "options": measured.get("options", {}), "values": measured.get("results", {})}
    elif record.get("status") == "done" and record.get("progress", {}).get("done") == step:
        found = {"by": "the run, at its end", "options": {}, "values": record.get("result", {})}
    else:
        return None
    # Numbers alone: a text is a remark or the name of a file that stays in the run.
    numbers = {name: value for name, value in found["values"].items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return found | {"values": numbers} if numbers else None


def publish(package: Package, where: str, public: bool = False) -> str:
    """Write the folder to a path, a URL or `hf://owner/name`; returns where it stands. UsageError if something private is in it, or something stands there."""
    if package.private:
        raise UsageError(f"{len(package.private)} private things are in it, the first at {package.private[0][0]} ({package.private[0][1]})")
    if not places.is_url(where):
        folders.write(Path(where), package.files, package.known)
        return where
    if where.startswith("hf://"):
        repository = places.hub_repository(where)
        with tempfile.TemporaryDirectory(prefix="onetorch-share-") as scratch:
            folders.write(Path(scratch) / "model", package.files, package.known)
            return places.push_to_hub(repository, Path(scratch) / "model", public)
    remote = places.Remote(where)
    if remote.exists(folders.MANIFEST):
        raise UsageError(f"{where} holds a model folder already; choose another name")
    for name, pieces in package.files.items():
        remote.write(name, pieces)
    remote.write(folders.MANIFEST, [folders.manifest(package.files, package.known)])  # last: without it nothing that stands there is believed
    return where


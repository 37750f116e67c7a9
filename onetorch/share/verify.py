"""Does the model do here what its sender saw? Golden outputs within a tolerance, and on demand the evaluation once more."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onetorch.runs import trust
from onetorch.runs.config import from_json, to_json
from onetorch.runs.errors import CheckpointError, OneTorchError
from onetorch.share.folder import GOLDEN, PROVENANCE, SOURCE, Contents
from onetorch.share.load import Loaded, load_model
from onetorch.share.rebuild import difference, outputs, size, slack

PLAIN = 0.01  # a value without an interval agrees within this share of itself, where no value of the card has one


def verify(contents: Contents, gate: trust.Gate = trust.nobody) -> tuple[Loaded, list[str]]:
    """Rebuild the module of a checked model folder and compare its golden outputs: the module, and what was found, in lines for a person.

    Raises as `load_model` does, and CheckpointError when an output differs by more than `rebuild.TOLERANCE`.
    """
    loaded = load_model(contents, gate)
    lines = [f"{len(contents.files)} files have the size and SHA-256 of the manifest"]
    lines.append(f"{loaded.source.name} rebuilt: {sum(p.numel() for p in loaded.model.parameters()):,} parameters, {size(loaded.weights):,} bytes of weights")
    if loaded.source.module and loaded.source.code != contents.files[SOURCE]:
        lines.append(f"note: {loaded.source.module} is not the version that the sender had; yours ran, and the golden outputs tell whether that matters")
    if GOLDEN not in contents.files:
        lines.append("not checked: the folder holds no golden outputs")
        return loaded, lines
    what = contents.name(GOLDEN)
    tensors = contents.tensors(GOLDEN)
    inputs, expected = _split(tensors, what)
    problem, off = difference(expected, outputs(loaded.model, inputs, slack(loaded.weights), what))
    if problem:
        raise CheckpointError(f"{what}: on this machine the module answers otherwise: {problem}")
    lines.append(f"golden outputs agree: largest difference {off:.2g} of an output's largest value")
    return loaded, lines


def _split(tensors: dict[str, Tensor], what: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    inputs: list[Tensor] = []
    while f"input.{len(inputs)}" in tensors:
        inputs.append(tensors[f"input.{len(inputs)}"])
    expected = {name: tensor for name, tensor in tensors.items() if not name.startswith("input.")}
    if len(inputs) + len(expected) != len(tensors) or not inputs or not expected:
        raise CheckpointError(f"{what} is damaged: expected input.0, input.1, … and outputs")
    return inputs, expected


@dataclass(frozen=True)
class Judgement:
    """One value of the card held against the same value measured here."""

    name: str
    card: float | int | str
    here: float | int | str
    agrees: bool | None  # None: not judged, because it has no interval and others have
    why: str


def results(contents: Contents, loaded: Loaded, config: Any = None) -> Iterator[Judgement]:
    """Evaluate again with the card's options and judge each of its values. CheckpointError when the card has none, or they do not fit the algorithm.

    `config`: in place of the folder's own, where its paths lead elsewhere here.

    A value with a 95 % interval (`x` and `x_ci95`, half its width) agrees when the two means differ by at most the root of the sum of squares of the half
    widths: two measurements of the same thing do so in 95 of 100 cases.
    """
    measured = contents.json(PROVENANCE).get("results")
    what = contents.name(PROVENANCE)
    if measured is None:
        raise CheckpointError(f"{what} has no results: nothing was measured of these weights, so there is nothing to compare")
    match measured:
        case {"values": dict(values), "options": dict(options)}:
            pass
        case _:
            raise CheckpointError(f"{what} is damaged: results need values and options")
    kinds = loaded.source.options
    for name in options:
        if name not in kinds:
            raise CheckpointError(f"{what}: the evaluation has no option {name!r}")
    try:
        given = {name: from_json(value, kinds[name][0], name) for name, value in options.items()}
    except OneTorchError as error:
        raise CheckpointError(f"{what}: {error}") from error
    here = loaded.module.evaluate(loaded.model, config or loaded.config, media=None, **given)
    intervals = any(name.endswith("_ci95") for name in values)
    for name, card in values.items():
        if name.endswith("_ci95"):
            continue
        if name not in here:
            yield Judgement(name, card, "-", False, "not measured here")
        else:
            yield _judge(name, card, to_json(here[name]), values.get(f"{name}_ci95"), here.get(f"{name}_ci95"), intervals)


def _judge(name: str, card: Any, here: Any, card_ci: Any, here_ci: Any, intervals: bool) -> Judgement:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (card, here))
    if not numbers or (isinstance(card, int) and isinstance(here, int) and card_ci is None):
        same = card == here
        return Judgement(name, card, here, None if intervals and not same else same, "the same" if same else "not the same")
    if isinstance(card_ci, int | float):
        width = math.hypot(card_ci, here_ci if isinstance(here_ci, int | float) else 0.0)
        off = abs(card - here)
        return Judgement(name, card, here, off <= max(width, 1e-6 * abs(card)), f"differs by {off:.4g}, the intervals allow {width:.4g}")
    off = abs(card - here) / abs(card) if card else abs(here)
    if intervals:
        return Judgement(name, card, here, None, "no interval")
    return Judgement(name, card, here, off <= PLAIN, f"differs by {off:.2g} of it; without an interval {PLAIN:g} is allowed")

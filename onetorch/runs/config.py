"""Typed configs: read from the command line, written to JSON and back without loss. Imports no torch.

A config is a frozen dataclass. Its fields may be int, float, str, bool, `pathlib.Path`, an `Enum`, `Literal[...]`, `X | None`, `tuple[X, ...]`,
`tuple[X, Y]` or another such dataclass; the trailing comment on a field's line is its documentation.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from onetorch.runs.errors import UsageError

RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")  # several values of a whole number: 0..4 is 0 1 2 3 4
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def nearest(word: str, words: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the most similar of `words`, or the empty string.

    >>> nearest("total_stps", ["seed", "total_steps"])
    " (did you mean 'total_steps'?)"
    """
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def type_name(annotation: Any) -> str:
    """How a type is called in help and errors.

    >>> type_name(tuple[int, ...]), type_name(Literal["a", "b"]), type_name(int | None)
    ('[int, ...]', 'a|b', 'int|none')
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(type_name(a) for a in args)
    if annotation in (type(None), None):
        return "none"
    if origin is Literal:
        return "|".join(str(a) for a in args)
    if origin is tuple:
        return "[" + ", ".join("..." if a is Ellipsis else type_name(a) for a in args) + "]"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(annotation.__members__)
    return getattr(annotation, "__name__", str(annotation)).lower()


def parse(text: str, annotation: Any) -> Any:
    """The value of type `annotation` written as `text`; ValueError says what was expected.

    >>> parse("[64,64]", tuple[int, ...]), parse("none", int | None), parse("1e-3", float), parse("100_000", int)
    ((64, 64), None, 0.001, 100000)
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        for option in args:
            if option is not type(None):
                try:
                    return parse(text, option)
                except ValueError:
                    continue
    elif origin is Literal:
        for option in args:
            if text == str(option):
                return option
        raise ValueError(f"expected {type_name(annotation)}, got {text!r}{nearest(text, map(str, args))}")
    elif origin is tuple:
        inner = text.strip().removeprefix("[").removeprefix("(").removesuffix("]").removesuffix(")").strip()
        parts = [p.strip().strip("'\"") for p in inner.split(",") if p.strip()]
        kinds = [args[0]] * len(parts) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(parts) == len(kinds):
            return tuple(parse(p, k) for p, k in zip(parts, kinds, strict=True))
    elif annotation is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
    elif annotation is int:
        try:
            return int(text)
        except ValueError:
            # 1e6 is how people write a number of steps; anything that is not a whole number stays an error.
            number = _float(text)
            if number is not None and number.is_integer():
                return int(number)
    elif annotation is float:
        number = _float(text)
        if number is not None:
            return number
    elif annotation is str:
        return text
    elif annotation is Path:
        if text:
            return Path(text)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if text in annotation.__members__:
            return annotation[text]
        raise ValueError(f"expected {type_name(annotation)}, got {text!r}{nearest(text, annotation.__members__)}")
    else:
        raise ValueError(f"a value of type {type_name(annotation)} cannot be given on the command line")
    raise ValueError(f"expected {type_name(annotation)}, got {text!r}")


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def hints(cls: type) -> dict[str, Any]:
    """Field name to resolved annotation, in order."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls)}


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every field, nested dataclasses opened.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Inner:
    ...     lr: float = 0.1
    >>> @dataclasses.dataclass(frozen=True)
    ... class Outer:
    ...     seed: int = 0
    ...     optim: Inner = Inner()
    >>> [name for name, _ in leaves(Outer)]
    ['seed', 'optim.lr']
    """
    for name, annotation in hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from leaves(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


def get(config: Any, dotted: str) -> Any:
    """The value at a dotted name."""
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def replace(config: Any, values: dict[str, Any]) -> Any:
    """A copy of `config` with the dotted names in `values` set; a ValueError of the config's own checks becomes a UsageError."""
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for dotted, value in values.items():
        head, _, rest = dotted.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    try:
        for head, inner in nested.items():
            flat[head] = replace(flat.get(head, getattr(config, head)), inner)
        return dataclasses.replace(config, **flat)
    except ValueError as error:
        raise UsageError(str(error)) from error


def to_json(value: Any) -> Any:
    """Plain JSON for a config or a value of one; infinities become strings, tuples lists, enums their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"a config cannot hold a {type(value).__name__} ({value!r}); allowed: int, float, str, bool, Path, Enum, Literal, tuple, None, dataclass")


def text(value: Any) -> str:
    """A value as the command line takes it.

    >>> text((64, 64)), text(None), text(0.001), text(True)
    ('[64,64]', 'none', '0.001', 'true')
    """
    value = to_json(value)
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    return {None: "none", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def from_json(data: Any, annotation: Any, name: str = "config") -> Any:
    """The exact inverse of `to_json` for a value of type `annotation`; UsageError names the field that does not fit."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = UsageError(f"{name}: expected {type_name(annotation)}, got {data!r}")
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if not isinstance(data, dict):
            raise wrong
        known = hints(annotation)
        for key in data:
            if key not in known:
                raise UsageError(f"{name}: there is no field {key!r}{nearest(str(key), known)}")
        for key in known:
            if key not in data:
                raise UsageError(f"{name}: the field {key!r} is missing")
        try:
            return annotation(**{key: from_json(data[key], kind, f"{name}.{key}") for key, kind in known.items()})
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                try:
                    return from_json(data, option, name)
                except UsageError:
                    continue
        raise wrong
    if origin is Literal:
        for option in args:
            if data == option and type(data) is type(option):
                return option
        raise wrong
    if origin is tuple:
        if not isinstance(data, list):
            raise wrong
        kinds = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(data):
            raise wrong
        return tuple(from_json(d, k, f"{name}[{i}]") for i, (d, k) in enumerate(zip(data, kinds, strict=True)))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if not isinstance(data, str) or data not in annotation.__members__:
            raise wrong
        return annotation[data]
    if annotation is float:
        if data in ("inf", "-inf", "nan"):
            return float(data)
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise wrong
        return float(data)
    if annotation is Path:
        if not isinstance(data, str):
            raise wrong
        return Path(data)
    if annotation in (int, str, bool):
        if type(data) is not annotation:
            raise wrong
        return data
    raise UsageError(f"{name}: a config cannot hold a field of type {type_name(annotation)}")

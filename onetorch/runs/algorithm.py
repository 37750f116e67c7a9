"""An algorithm file: where it is, its `Config` read without importing torch, and the file as a module.

An algorithm is one Python file with `Config`, `build(config)`, `train(config, run)` and `evaluate(model, config, *, media=None, …)`. The command line has to
know its fields before it does any work, and importing torch takes a second, so the file is first only *read*: of its top-level statements those are
executed that `Config` and the signature of `evaluate` need, and no others.

A file that may be shared has one function more: `example(config)` gives a tensor, or a tuple of tensors, for the module to answer with tensors (or tuples and
dicts of them). `onetorch share` keeps inputs and answers in the model folder, and whoever gets it checks that the model answers the same there. A few rows do.
"""

import ast
import copy
import dataclasses
import enum
import importlib
import inspect
import io
import linecache
import math
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Any

from onetorch.runs import folder, trust
from onetorch.runs.config import hints, nearest
from onetorch.runs.errors import UsageError

PACKAGE = Path(__file__).parent.parent
PARTS = ("Config", "build", "train", "evaluate")


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm file as read: its path, its module name (None for a user's file) and what stands in it."""

    path: Path
    module: str | None
    code: bytes  # the file as it was read; what runs is this, whatever became of the file
    doc: str  # first line of the file's docstring
    Config: type
    docs: dict[str, str]  # field name of Config to its trailing comment
    options: dict[str, tuple[Any, Any]]  # keyword-only options of evaluate(), except `media`: name to (annotation, default)
    evaluates: str  # evaluate()'s docstring, which says what they mean

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def in_several_processes(self) -> bool:
        """Whether its `train` can share out a run among processes: it has to wrap its model for that."""
        return b"distributed.wrap(" in self.code

    def load(self) -> types.ModuleType:
        """Import the file (and so torch). UsageError names the file and line if it does not import."""
        if self.module:
            return importlib.import_module(self.module)
        # Not through the import system, which would believe a compiled file in a __pycache__ beside it before the source that was read and checked.
        module = types.ModuleType(f"onetorch_idea_{self.path.stem}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module
        text = self.code.decode("utf-8")
        linecache.cache[str(self.path)] = (len(self.code), None, text.splitlines(keepends=True), str(self.path))  # for tracebacks, torch.compile and Triton
        try:
            exec(compile(text, str(self.path), "exec", dont_inherit=True), module.__dict__)
        except Exception as error:
            line = next((f.lineno for f in reversed(inspect.trace()) if f.filename == str(self.path)), None)
            raise UsageError(f"{self.path}{f':{line}' if line else ''} does not import: {type(error).__name__}: {error}") from error
        return module


def builtin() -> dict[str, Path]:
    """Name to path of onetorch's own algorithm files, in alphabetical order within each part."""
    files = [p for part in ("rl", "generative") for p in sorted((PACKAGE / part).glob("*.py"))]
    texts = {p: p.read_text(encoding="utf-8") for p in files}
    return {p.stem: p for p, text in texts.items() if "\nclass Config" in text and "\ndef train(" in text}


def headline(path: Path) -> str:
    """The first line of the docstring of one of onetorch's own algorithm files, without parsing it."""
    return path.read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0].strip(' "')


def read(name_or_path: str | Path, gate: trust.Gate = trust.own_only) -> Algorithm:
    """Read an algorithm by the name of one of onetorch's files (`"ppo"`) or by the path of a user's file (ending in `.py`).

    The `source.py` of a run's or a model's folder is a stranger's: `gate` is asked before anything of it is executed.
    """
    if isinstance(name_or_path, str) and not name_or_path.endswith(".py"):
        files = builtin()
        if name_or_path not in files:
            raise UsageError(f"there is no algorithm {name_or_path!r}{nearest(name_or_path, files)}; known: {', '.join(files)}")
        path = files[name_or_path]
        return of_code(path, _content(path), f"onetorch.{path.parent.name}.{path.stem}")
    path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}{nearest(path.name, (p.name for p in path.parent.glob('*.py')))}")
    code = _content(path)
    # Before links are followed and after: neither what lies in a received folder nor what it points to is run unasked.
    if any(p.name == "source.py" and (p.parent / "config.json").exists() for p in (path, path.resolve())):
        gate(code, path)
    return of_code(path.resolve(), code)


def of_run(where: Path, gate: trust.Gate = trust.own_only) -> Algorithm:
    """The algorithm that the run in the folder `where` was made with: one of onetorch's own, or the copy of a user's file that stands there.

    Reading a Config executes a part of the file, so `gate` is asked first.
    """
    if (where / "manifest.json").exists():
        raise UsageError(f"{where} is a model folder, not a run: onetorch eval {where} evaluates it, onetorch train RECIPE --from {where} goes on")
    if not folder.holds_run(where):
        near = nearest(where.name, (p.name for p in where.parent.iterdir() if folder.holds_run(p))) if where.parent.is_dir() else ""
        raise UsageError((f"{where} holds no run (no config.json)" if where.exists() else f"there is no folder {where}") + near)
    entry = folder.read_json(where / "config.json")
    if entry.get("algorithm") is None:
        raise UsageError(f"{where} was made by code that stood in no file, so its model cannot be built again; its weights are in checkpoints/")
    return read(where / "source.py", gate) if entry["algorithm"] == "source.py" else named(entry, where / "config.json", gate)


def named(entry: dict[str, Any], where: Path, gate: trust.Gate) -> Algorithm:
    """The algorithm of ours that a config.json (`entry`, found at `where`) names; a name is all that is taken from there. `gate` is asked about imports."""
    name = entry.get("algorithm")
    known = {f"onetorch.{p.parent.name}.{p.stem}": n for n, p in builtin().items()}
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"{where} names the algorithm {name!r}, which this onetorch does not have")
    for code in trust.imports(entry.get("config")):
        gate(code, where)
    return read(known[name])


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def of_code(path: Path, code: bytes, module: str | None = None) -> Algorithm:
    """The algorithm whose file has these bytes; `path` is what messages call it. Executes what `Config` needs: whoever calls has to trust the code."""
    try:
        text = code.decode("utf-8")
        tree = ast.parse(text, filename=str(path))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        where = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError(f"{path}{where} is not valid Python: {getattr(error, 'msg', error)}") from error
    bound = {name: node for node in tree.body for name in _binds(node)}
    missing = [part for part in PARTS if part not in bound]
    if missing:
        raise UsageError(f"{path} is no algorithm: it lacks {', '.join(missing)} (an algorithm defines {', '.join(PARTS)}; `onetorch new` writes one)")
    space = _execute(tree, bound, path)
    Config, evaluate = space["Config"], space["evaluate"]
    if not (isinstance(Config, type) and dataclasses.is_dataclass(Config)):
        raise UsageError(f"{path}: Config must be a dataclass (@dataclass(frozen=True))")
    try:
        kinds = typing.get_type_hints(evaluate)
        hints(Config)
    except Exception as error:
        raise UsageError(f"{path}: an annotation of Config or evaluate cannot be read without importing the file: {error}") from error
    options = {
        p.name: (kinds.get(p.name, str), p.default) for p in inspect.signature(evaluate).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "media"
    }
    doc = (ast.get_docstring(tree) or "").strip().split("\n")[0]
    return Algorithm(path, module, code, doc, Config, _field_comments(text, bound["Config"]), options, inspect.getdoc(evaluate) or "")


def _binds(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [a.asname or a.name.split(".")[0] for a in node.names]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _execute(tree: ast.Module, bound: dict[str, ast.stmt], path: Path) -> dict[str, Any]:
    """Execute the statements that `Config` and the signature of `evaluate` need, in the order of the file."""
    evaluate = bound["evaluate"]
    if isinstance(evaluate, ast.FunctionDef):
        # Only the docstring and the keyword-only options count here: their defaults and annotations are kept, the rest is not.
        said, evaluate = ast.get_docstring(evaluate) or "", copy.copy(evaluate)
        evaluate.body, evaluate.decorator_list, evaluate.returns, evaluate.args = [ast.Expr(ast.Constant(said))], [], None, copy.deepcopy(evaluate.args)
        evaluate.args.defaults = []
        for argument in evaluate.args.posonlyargs + evaluate.args.args + [a for a in evaluate.args.kwonlyargs if a.arg == "media"]:
            argument.annotation = None
        ast.fix_missing_locations(evaluate)
    statements = {**bound, "evaluate": evaluate}
    needed, queue = set[str](), ["Config", "evaluate"]
    while queue:
        name = queue.pop()
        if name in statements and name not in needed:
            needed.add(name)
            # Names that are read: a field called `data` is no use of a module of that name.
            if not isinstance(statements[name], ast.Import | ast.ImportFrom):
                queue += [n.id for n in ast.walk(statements[name]) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    body: list[ast.stmt] = []
    for node in tree.body:
        names = set(_binds(node))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            body.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            kept = [a for a in node.names if (a.asname or a.name.split(".")[0]) in needed]
            if kept:
                alone = ast.ImportFrom(node.module, kept, node.level) if isinstance(node, ast.ImportFrom) else ast.Import(kept)
                body.append(ast.copy_location(alone, node))
        elif names & needed:
            body.append(evaluate if names == {"evaluate"} else node)
    # dataclasses and typing look a class's module up by name to resolve annotations.
    module = types.ModuleType(f"onetorch_read_{path.stem}")
    sys.modules[module.__name__] = module
    module.__file__ = str(path)
    try:
        exec(compile(ast.Module(body, []), str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        line = next((f.lineno for f in reversed(inspect.trace()) if f.filename == str(path)), None)
        raise UsageError(f"{path}{f':{line}' if line else ''}: Config cannot be read: {type(error).__name__}: {error}") from error
    return module.__dict__


def _field_comments(text: str, config: ast.stmt) -> dict[str, str]:
    fields = [n for n in config.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)] if isinstance(config, ast.ClassDef) else []
    if not fields:
        return {}
    first, last = fields[0].lineno, fields[-1].end_lineno or fields[-1].lineno
    # In parentheses the indented lines are one expression, which ends where they end.
    lines = io.StringIO("(\n" + "".join(text.splitlines(keepends=True)[first - 1 : last]) + "\n)")
    tokens = tokenize.generate_tokens(lines.readline)
    comments = {t.start[0] + first - 2: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
    return {n.target.id: comments.get(n.end_lineno or n.lineno, "") for n in fields if isinstance(n.target, ast.Name)}


def with_defaults(algorithm: Algorithm, config: Any, changed: list[str]) -> str:
    """The text of the algorithm's file with the defaults of the fields of `Config` named in `changed` replaced by their values in `config`."""
    text = algorithm.code.decode("utf-8")
    lines = text.splitlines(keepends=True)
    body = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    fields = {n.target.id: n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for name in changed:
        node = fields[name].value
        if node is None or node.lineno != node.end_lineno:
            raise UsageError(f"{algorithm.path}: the default of {name} must stand on one line to be replaced")
        # Column offsets count UTF-8 bytes.
        raw = lines[node.lineno - 1].encode()
        lines[node.lineno - 1] = (raw[: node.col_offset] + _source(getattr(config, name)).encode() + raw[node.end_col_offset :]).decode()
    return "".join(lines)


def _source(value: Any) -> str:
    """A value of a config as Python source."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}({', '.join(f'{f.name}={_source(getattr(value, f.name))}' for f in dataclasses.fields(value))})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Path):
        return f"Path({str(value)!r})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))}{',' * (len(value) == 1)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)

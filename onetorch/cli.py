"""The command line. The only file that knows all parts; it imports torch only when there is work to do."""

import dataclasses
import importlib.util
import keyword
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onetorch import __version__, recipes
from onetorch.runs import algorithm, folder
from onetorch.runs import config as configs
from onetorch.runs.config import nearest
from onetorch.runs.errors import OneTorchError, RunError, Stopped, UsageError

HELP = """\
onetorch: create, run and share optimized PyTorch models

  onetorch list                              the recipes and what each reaches
  onetorch show RECIPE [--field value …]     a recipe's config, with the origin of each value
  onetorch train RECIPE [--field value …]    train; leaves a folder runs/RECIPE-xxxxxx
  onetorch resume DIR                        go on with a run, bit for bit
  onetorch runs [DIR …]                      the runs that are there: state, progress, result, cost
  onetorch eval RUN [--option value …]       evaluate a run from its folder alone
  onetorch plot RUN… [--x seconds] [--y …]   draw curves, mean and interval over seeds, to PNG or SVG
  onetorch report RUN… [--y NAME]            one HTML page: curves, statistics, media, where it came from
  onetorch diff A B                          what differs between two runs: config, metrics, weights
  onetorch board RUN… [--out DIR]            the runs' metrics as TensorBoard's event files
  onetorch new NAME --from RECIPE            a recipe as a file of yours, to change at will
  onetorch doctor                            what this machine has, and what is missing

RECIPE is a name from the list or the path of a file of yours (my_idea.py). `onetorch COMMAND --help` tells more.
Exit codes: 0 done, 2 wrong usage, 3 a run failed, 130/138/143 stopped by SIGINT/SIGUSR1/SIGTERM after saving."""

RUN_FLAGS = {
    "dir": "the run's folder (else runs/RECIPE-xxxxxx)",
    "plan": "fix the speed plan or a part of it: name=value,name=value",
    "time_limit": "stop after so long and save: 90, 90s, 10m, 2h",
    "checkpoint_seconds": "least time between two checkpoints (else 10)",
}
RESUME_FLAGS = {name: RUN_FLAGS[name] for name in ("time_limit", "checkpoint_seconds")}

COMMAND_HELP = {
    "list": "onetorch list: the recipes, their algorithms and what each is expected to reach.",
    "show": "onetorch show RECIPE [--field value …]: the config that `train` would use, each value with its origin.",
    "train": "onetorch train RECIPE [--field value …] [run options]: train and leave a run's folder.",
    "resume": "onetorch resume DIR [run options]: go on with the run in DIR from its newest valid checkpoint, bit for bit.",
    "runs": "onetorch runs [DIR …]: the runs in DIR (else ./runs), newest first: state, progress, result, cost.",
    "eval": "onetorch eval RUN [--option value …]: evaluate the newest checkpoint; results to RUN/eval.json, video or samples to RUN/media.",
    "plot": (
        "onetorch plot RUN… | SWEEP [--x steps|seconds] [--y NAME …] [--out FILE.png|FILE.svg]: draw curves. A SWEEP is a folder with runs in it.\n"
        "Runs that differ only in seed are one group: its mean, with a 95 % bootstrap interval. Without --x over both, without --y the first six quantities,\n"
        "without --out to curves.png here."
    ),
    "report": (
        "onetorch report RUN… | SWEEP [--y NAME] [--better larger|smaller] [--out FILE.html]: one HTML page that opens offline.\n"
        "Curves that can be switched, what differed and which difference mattered, statistics over seeds, videos and samples, where it all came from.\n"
        "--y is the quantity by which runs are compared (else the first that their evaluations gave), --better says which way (else its name does).\n"
        "Without --out to report.html in the run's or sweep's folder, or here."
    ),
    "diff": "onetorch diff A B: what differs between two runs: config, origin, results, metrics from which step on, weights tensor by tensor.",
    "board": (
        "onetorch board RUN… | SWEEP [--out DIR]: write TensorBoard's event files, one folder a run, to DIR (else ./board).\n"
        "Run it again to bring them up to date. "
        "Look at them with: tensorboard --logdir DIR (pip install 'onetorch[board]')"
    ),
    "new": "onetorch new NAME --from RECIPE: write NAME.py, the recipe's algorithm with its values as defaults. It runs at once: onetorch train NAME.py",
    "doctor": "onetorch doctor: versions, processor, GPUs, compiler, optional packages and how to get them.",
}

Flags = dict[str, list[str]]


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if words is None else words
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except OneTorchError as error:
        _error(str(error), *getattr(error, "__notes__", ()))
        return error.exit_code
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        _error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`onetorch list | head`); Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import traceback

        traceback.print_exception(error)  # a fault of an algorithm or of ours: where it happened matters
        _error(f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()))
        return OneTorchError.exit_code


def _error(*lines: str) -> None:
    for line in lines:
        sys.stderr.write(f"onetorch: {' '.join(line.split())}\n")


def _print(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def _dispatch(words: list[str]) -> int:
    commands = {"list": _list, "show": _show, "train": _train, "resume": _resume, "runs": _runs, "eval": _eval, "new": _new, "doctor": _doctor}
    commands |= {"plot": _plot, "report": _report, "diff": _diff, "board": _board}
    if not words or words[0] in ("--help", "-h", "help"):
        _print(HELP)
        return 0
    if words[0] in ("--version", "-V"):
        _print(f"onetorch {__version__}")
        return 0
    command, *rest = words
    if command not in commands:
        raise UsageError(f"there is no command {command!r}{nearest(command, commands)}; `onetorch --help` shows them")
    if any(w in ("--help", "-h") for w in rest):
        _command_help(command, [w for w in rest if w not in ("--help", "-h")])
        return 0
    return commands[command](*_split(rest))


def _split(words: list[str]) -> tuple[list[str], Flags]:
    """Positional words, and each `--name value …` or `--name=value`; hyphens in names are underscores."""
    positional: list[str] = []
    flags: Flags = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                raise UsageError(f"--{name} is given twice")
            current = flags[name] = [value] if equals else []
        elif word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != ".":
            raise UsageError(f"{word!r}: options begin with two hyphens")
        elif current is None:
            positional.append(word)
        else:
            current.append(word)
    return positional, flags


def _one(flags: Flags, name: str) -> str | None:
    """The single value of a run option, taken out of `flags`."""
    if name not in flags:
        return None
    values = flags.pop(name)
    if len(values) != 1:
        raise UsageError(f"--{name} takes one value, got {len(values)}: {' '.join(values)}")
    return values[0]


def _only(positional: list[str], what: str, command: str) -> str:
    if len(positional) != 1:
        raise UsageError(f"{command} takes one {what}, got {' '.join(positional) or 'none'}; `onetorch {command} --help`")
    return positional[0]


def _none(positional: list[str], command: str) -> None:
    if positional:
        raise UsageError(f"{command} takes no word beside it, got {' '.join(positional)}; `onetorch {command} --help`")


def _nothing_left(flags: Flags, known: Any, command: str) -> None:
    for name in flags:
        raise UsageError(f"{command} has no option --{name}{nearest(name, known)}")


# -- configs -----------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe or file with the values of the command line put in; `Config` is the one read without torch."""

    name: str
    source: algorithm.Algorithm
    config: Any
    origin: dict[str, str]
    given: list[str]  # the words of the command line that are needed to say it again


def _resolve(target: str, flags: Flags) -> Resolved:
    if target.endswith(".py") or os.sep in target:
        source = algorithm.read(Path(target))
        name = source.name
        base = _checked(source.Config, source)
    else:
        recipe = recipes.find(target)
        source, name = algorithm.read(recipe.algorithm), recipe.name
        base = recipe(source.Config)
    plain = _checked(source.Config, source)
    kinds = dict(configs.leaves(source.Config))
    for taken in RUN_FLAGS.keys() & kinds.keys():
        raise UsageError(f"{source.path}: the field {taken} has the name of a run option; call it otherwise")
    origin = {n: "default" if configs.get(base, n) == configs.get(plain, n) else f"recipe {name}" for n in kinds}
    values: dict[str, Any] = {}
    given: list[str] = []
    for flag, texts in flags.items():
        field, text = _field(flag, texts, kinds, name)
        try:
            values[field] = configs.parse(text, kinds[field])
        except ValueError as error:
            raise UsageError(f"--{field}: {error}") from error
        if isinstance(values[field], Path):
            values[field] = values[field].absolute()  # the run may be resumed and evaluated from elsewhere
        origin[field] = "command line"
        given += [f"--{field}", text]
    return Resolved(name, source, configs.replace(base, values), origin, given)


def _checked(Config: type, source: algorithm.Algorithm) -> Any:
    try:
        return Config()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source.path}: Config() cannot be made from its defaults: {error}") from error


def _field(flag: str, texts: list[str], kinds: dict[str, Any], name: str) -> tuple[str, str]:
    """The field and the text of its value that a flag means; `--no-x` and a bare `--x` are for bools."""
    if flag in kinds:
        if not texts and kinds[flag] is bool:
            return flag, "true"
        if len(texts) == 1:
            return flag, texts[0]
        if not texts:
            raise UsageError(f"--{flag}: expected {configs.type_name(kinds[flag])}, got nothing")
        raise UsageError(f"--{flag} takes one value, got {len(texts)}: {' '.join(texts)} (a list is written [a,b])")
    if flag.startswith("no_") and kinds.get(flag[3:]) is bool and not texts:
        return flag[3:], "false"
    raise UsageError(f"{name} has no field {flag!r}{nearest(flag, [*kinds, *RUN_FLAGS])}; `onetorch show {name}` lists them")


def _text(value: Any) -> str:
    value = configs.to_json(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return {None: "none", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _fields(resolved: Resolved) -> Iterator[tuple[str, ...]]:
    for name, kind in configs.leaves(resolved.source.Config):
        doc = resolved.source.docs.get(name.partition(".")[0], "")
        yield name, _text(configs.get(resolved.config, name)), resolved.origin[name], configs.type_name(kind), doc


def _table(rows: Sequence[tuple[str, ...]], widest: int = 44) -> None:
    """Columns of text; the last one is cut at the width of the terminal, where there is one."""
    if not rows:
        return
    widths = [min(max(len(row[i]) for row in rows), widest) for i in range(len(rows[0]) - 1)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for row in rows:
        line = "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]).rstrip()
        _print(line if len(line) <= room else line[: room - 1] + "…")


def _command_help(command: str, rest: list[str]) -> None:
    _print(COMMAND_HELP[command])
    targets = [w for w in rest if not w.startswith("-")][:1]
    if command in ("train", "resume"):
        _print("\nrun options:")
        _table([(f"  --{n}", text) for n, text in (RUN_FLAGS if command == "train" else RESUME_FLAGS).items()])
    if command in ("train", "show") and targets:
        resolved = _resolve(targets[0], {})
        _print(f"\nfields of {resolved.name}:")
        _table([(f"  --{name}", kind, value, doc) for name, value, _, kind, doc in _fields(resolved)])
    elif command in ("train", "show"):
        _print(f"\n`onetorch {command} RECIPE --help` lists the recipe's fields.")
    if command == "eval" and targets and folder.holds_run(Path(targets[0])):
        _print("\noptions:")
        options = algorithm.of_run(Path(targets[0])).options
        _table([(f"  --{name}", configs.type_name(kind), _text(default)) for name, (kind, default) in options.items()])


# -- commands that need no torch -----------------------------------------------------------------------------------------------------------------


def _list(positional: list[str], flags: Flags) -> int:
    _none(positional, "list")
    _nothing_left(flags, (), "list")
    rows = [("RECIPE", "ALGORITHM", "REACHES", "WHAT IT IS")]
    rows += [(r.name, r.algorithm, r.reaches or "-", r.doc) for r in recipes.known().values()]
    _table(rows, widest=80)
    return 0


def _show(positional: list[str], flags: Flags) -> int:
    resolved = _resolve(_only(positional, "recipe", "show"), flags)
    _print(f"{resolved.name}: {resolved.source.doc}")
    _print(f"from {resolved.source.path}\n")
    _table([("FIELD", "VALUE", "ORIGIN", "TYPE", "MEANING"), *_fields(resolved)])
    return 0


def _new(positional: list[str], flags: Flags) -> int:
    name = _only(positional, "name", "new")
    target = _one(flags, "from")
    _nothing_left(flags, ("from",), "new")
    if target is None:
        raise UsageError("new needs --from RECIPE; `onetorch list` shows the recipes")
    path = Path(name if name.endswith(".py") else f"{name}.py")
    if not path.stem.isidentifier():
        raise UsageError(f"{path.stem!r} cannot name a Python file; use letters, digits and underscores")
    if path.exists():
        raise UsageError(f"{path} exists already; choose another name")
    if path.stem in sys.stdlib_module_names or keyword.iskeyword(path.stem) or importlib.util.find_spec(path.stem):
        raise UsageError(f"{path.stem!r} is the name of a Python module, which {path} would hide; choose another name")
    resolved = _resolve(target, {})
    changed = list(dict.fromkeys(n.partition(".")[0] for n, origin in resolved.origin.items() if origin != "default"))
    origin = resolved.source.module or resolved.source.path.name
    head = f"# Begun as a copy of {origin} (recipe {resolved.name}, onetorch {__version__}). Change what you like; it keeps the whole run.\n"
    try:
        path.write_text(head + algorithm.with_defaults(resolved.source, resolved.config, changed), encoding="utf-8")
    except OSError as error:
        raise UsageError(folder.explain(error, path)) from error
    _print(f"{path} is yours. Train it: onetorch train {path}")
    return 0


def _runs(positional: list[str], flags: Flags) -> int:
    _nothing_left(flags, (), "runs")
    found: list[tuple[float, Path]] = []
    for place in map(Path, positional or ["runs"]):
        if not place.is_dir():
            if positional:
                raise UsageError(f"there is no folder {place}")
            continue
        for path in [place, *sorted(place.iterdir())]:
            if folder.holds_run(path):
                found.append(((path / "config.json").stat().st_mtime, path))
    if not found:
        _print("no runs here; `onetorch train RECIPE` makes one")
        return 0
    rows = [("RUN", "STATE", "PROGRESS", "RESULT", "COST")]
    for _, path in sorted(found, reverse=True):
        try:
            record = folder.read_json(path / "run.json")
            rows.append((str(path), folder.status(path, record), _progress(record), _result(record), _cost(record)))
        except (OneTorchError, AttributeError, KeyError, TypeError, ValueError) as error:
            rows.append((str(path), "damaged", "", "", str(error)))
    _table(rows)
    return 0


def _progress(record: dict[str, Any]) -> str:
    progress = record["progress"]
    done, total, scale = progress["done"], progress["total"], progress.get("scale", 1)
    if not total:
        return "not begun"
    return f"{done * scale:,} of {total * scale:,} {progress['unit']} ({100 * done // total} %)"


def _result(record: dict[str, Any]) -> str:
    shown = [f"{k} {v:.4g}" for k, v in record["result"].items() if isinstance(v, int | float)]
    return " ".join(shown[:2]) or str(record.get("why", ""))[:40]


def _cost(record: dict[str, Any]) -> str:
    return f"{record['cost']['seconds']:.1f} s, {record['cost']['cpu_seconds']:.1f} CPU-s"


def _plot(positional: list[str], flags: Flags) -> int:
    clocks = flags.pop("x", [])
    ys, out = flags.pop("y", []), Path(_one(flags, "out") or "curves.png")
    _nothing_left(flags, ("x", "y", "out"), "plot")
    from onetorch.runs import compare, plot

    return _drawn(out, plot.draw(compare.load(positional), out, clocks=clocks or plot.CLOCKS, ys=ys))


def _report(positional: list[str], flags: Flags) -> int:
    y, better, out = _one(flags, "y"), _one(flags, "better"), _one(flags, "out")
    _nothing_left(flags, ("y", "better", "out"), "report")
    from onetorch.runs import report

    try:
        return _drawn(*report.of_words(positional, Path(out) if out else None, y=y, better=better))
    except OSError as error:
        raise UsageError(folder.explain(error, Path(error.filename or "."))) from error


def _drawn(target: Path, remarks: Sequence[str]) -> int:
    for remark in remarks:
        sys.stderr.write(remark + "\n")
    _print(f"{target} ({target.stat().st_size / 1e6:.2f} MB)")
    return 0


def _diff(positional: list[str], flags: Flags) -> int:
    _nothing_left(flags, (), "diff")
    if len(positional) != 2:
        raise UsageError(f"diff takes two runs, got {' '.join(positional) or 'none'}; `onetorch diff --help`")
    from onetorch.runs import diff

    for title, rows in diff.compare_runs(*map(Path, positional)):
        if rows:
            _table(rows, widest=60)
            _print()
        else:
            _print(title)
    return 0


def _board(positional: list[str], flags: Flags) -> int:
    out = _one(flags, "out") or "board"
    _nothing_left(flags, ("out",), "board")
    from onetorch.runs import board

    made = board.convert(positional, Path(out))
    _print(f"{len(made)} {'run' if len(made) == 1 else 'runs'} in {out}; look at them with: tensorboard --logdir {shlex.quote(out)}")
    return 0


# -- commands that do ----------------------------------------------------------------------------------------------------------------------------


def _seconds(text: str | None, flag: str) -> float | None:
    """
    >>> _seconds("10m", "x"), _seconds("1.5h", "x"), _seconds("90", "x")
    (600.0, 5400.0, 90.0)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if not match:
        raise UsageError(f"--{flag}: expected a time such as 90, 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


def _pace(flags: Flags) -> dict[str, Any]:
    """The run options of `train` and `resume` that are times."""
    times = {name: _seconds(_one(flags, name), name) for name in RESUME_FLAGS}
    return {name: value for name, value in times.items() if value is not None}


def _train(positional: list[str], flags: Flags) -> int:
    target = _only(positional, "recipe", "train")
    where, fixed, pace = _one(flags, "dir"), _one(flags, "plan"), _pace(flags)
    if where == "":
        raise UsageError("--dir: expected a folder, got an empty name")
    resolved = _resolve(target, flags)
    path = Path(where) if where else _free_folder(resolved.name)
    if folder.holds_run(path):
        raise folder.refuse(path)

    module = resolved.source.load()
    from onetorch.runs import plan
    from onetorch.runs.run import Run

    words = ["onetorch", "train", target, *resolved.given]
    run = Run(
        path,
        configs.from_json(configs.to_json(resolved.config), module.Config),
        recipe=resolved.name,
        algorithm=resolved.source.module,
        source=resolved.source.path,
        command=words,
        fixed=plan.parse(fixed or ""),
        **pace,
    )
    return _work(module, run)


def _free_folder(name: str) -> Path:
    while True:
        path = Path("runs") / f"{name}-{secrets.token_hex(3)}"
        if not path.exists():
            return path


def _resume(positional: list[str], flags: Flags) -> int:
    path = Path(_only(positional, "folder", "resume"))
    pace = _pace(flags)
    _nothing_left(flags, RESUME_FLAGS, "resume")
    source = algorithm.of_run(path)
    folder.config(path, source.Config)
    record = folder.read_json(path / "run.json")
    if folder.status(path, record) == "done":
        _print(f"{path} is done: {_progress(record)}, {_result(record)}")
        return 0
    module = source.load()
    from onetorch.runs.run import Run

    return _work(module, Run(path, folder.config(path, module.Config), resume=True, **pace))


def _work(module: Any, run: Any) -> int:
    """Train, evaluate, draw; whatever happens, the run's record says so."""
    from onetorch.runs import plan, report

    run.say(f"run: {run.folder}")
    again = ""
    try:
        with run:
            model = module.train(run.config, run)
            run.finish()
            again = f"{run.record['command']} --plan {plan.show(run.record['plan'])}" if run.record["plan"] else run.record["command"]
            results = module.evaluate(model, run.config, media=run.media)
            run.result(**results)
            try:
                for line in report.write(run.folder, run.record):
                    run.say(line)
            except OSError as error:
                raise RunError(folder.explain(error, run.folder / "report.html")) from error
    except Stopped as stop:
        run.say(f"stopped ({stop}) after {_progress(run.record)}; onetorch resume {shlex.quote(str(run.folder))} goes on")
        raise
    except OneTorchError:
        raise
    except Exception as error:
        error.add_note(f"the run in {run.folder} failed")
        raise
    _print("  ".join(f"{k} {_number(v)}" for k, v in results.items()))
    _print(f"run: {run.folder}  ({_cost(run.record)})")
    _print(f"again: {again}")
    return 0


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _eval(positional: list[str], flags: Flags) -> int:
    path = Path(_only(positional, "run", "eval"))
    source = algorithm.of_run(path)
    kinds = {name: kind for name, (kind, _) in source.options.items()}
    options: dict[str, Any] = {}
    for flag, texts in flags.items():
        if flag not in kinds and not (flag.startswith("no_") and flag[3:] in kinds):
            raise UsageError(f"eval of {source.name} has no option --{flag}{nearest(flag, kinds)}; it has {', '.join(f'--{k}' for k in kinds)}")
        name, text = _field(flag, texts, kinds, source.name)
        try:
            options[name] = configs.parse(text, kinds[name])
        except ValueError as error:
            raise UsageError(f"--{name}: {error}") from error

    from onetorch.share.load import load

    model = load(path)
    module = source.load()
    media = path / "media"
    try:
        media.mkdir(exist_ok=True)
        results = module.evaluate(model, folder.config(path, module.Config), media=media, **options)
        entry = {"format": folder.FORMAT, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "options": {k: configs.to_json(v) for k, v in options.items()}}
        folder.write_json(path / "eval.json", entry | {"results": results})
    except OSError as error:
        raise UsageError(folder.explain(error, path)) from error
    _table([(name, _number(value)) for name, value in results.items()])
    _print(f"written to {path / 'eval.json'} and {media}")
    return 0


def _doctor(positional: list[str], flags: Flags) -> int:
    _none(positional, "doctor")
    _nothing_left(flags, (), "doctor")
    import platform

    from onetorch.runs import provenance

    rows = [("python", platform.python_version(), sys.executable), ("onetorch", __version__, str(algorithm.PACKAGE))]
    rows += [(name, version, "") for name, version in provenance.versions().items() if name not in ("python", "onetorch")]
    hardware = provenance.hardware()
    rows += [("processor", f"{hardware['cores']} cores", hardware["processor"])]
    import torch

    if hardware["gpus"]:
        rows += [("gpu", name, f"CUDA {torch.version.cuda}") for name in hardware["gpus"]]
    elif shutil.which("nvidia-smi"):
        rows += [("gpu", "not used", "nvidia-smi is here but torch sees no GPU: a CPU build or too old a driver; remove .venv and run ./go again")]
    else:
        rows += [("gpu", "none", "everything runs on the processor")]
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    rows += [("compiler", compiler or "none", "" if compiler else "torch.compile on the CPU needs g++ or clang++ from your system's packages")]
    for extra, packages in {"media": ("matplotlib", "bokeh", "pygame", "av"), "rl": ("mujoco",), "dev": ("pytest", "ruff", "mypy")}.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        rows.append((f"extra {extra}", f"lacks {', '.join(missing)}" if missing else "complete", f"pip install 'onetorch[{extra}]'" if missing else ""))
    free = shutil.disk_usage(".").free
    rows.append(("disk", f"{free / 2**30:.0f} GiB free", str(Path.cwd())))
    _table(rows, widest=60)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line. The only file that knows all parts; it imports torch only when there is work to do."""

import dataclasses
import importlib.util
import keyword
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onetorch import __version__, recipes
from onetorch.runs import algorithm, folder, trust
from onetorch.runs import config as configs
from onetorch.runs.config import nearest
from onetorch.runs.errors import OneTorchError, RunError, Stopped, UsageError

if TYPE_CHECKING:
    from onetorch.runs import sweep

HELP = """\
onetorch: create, run and share optimized PyTorch models

  onetorch list                              the recipes and what each reaches
  onetorch show RECIPE [--field value …]     a recipe's config, with the origin of each value
  onetorch train RECIPE [--field value …]    train; leaves a folder runs/RECIPE-xxxxxx
  onetorch sweep RECIPE [--field a b c …]    one run for each combination of the values
  onetorch resume DIR                        go on with a run, bit for bit, or with a sweep
  onetorch runs [DIR …]                      the runs that are there: state, progress, result, cost
  onetorch eval DIR [--option value …]       evaluate a run or a model from its folder alone
  onetorch plot RUN… [--x seconds] [--y …]   draw curves, mean and interval over seeds, to PNG or SVG
  onetorch report RUN… [--y NAME]            one HTML page: curves, statistics, media, where it came from
  onetorch diff A B                          what differs between two runs: config, metrics, weights
  onetorch board RUN… [--out DIR]            the runs' metrics as TensorBoard's event files
  onetorch share RUN DEST                    a model folder for others: a path, a URL, or hf://owner/name
  onetorch get SRC [DIR]                     copy a model folder, check every byte and what the model answers here
  onetorch verify DIR [--results]            the same in place; --results evaluates again and compares with the card
  onetorch port FILE.pt OUT.safetensors      tensors out of a pickle, without running it
  onetorch new NAME --from RECIPE            a recipe as a file of yours, to change at will
  onetorch data [PATH]                       what a text, a folder or an array is as training data
  onetorch doctor                            what this machine has, and what is missing

RECIPE is a name from the list or the path of a file of yours (my_idea.py). `onetorch COMMAND --help` tells more.
Exit codes: 0 done, 2 wrong usage, 3 a run failed, 130/138/143 stopped by SIGINT/SIGUSR1/SIGTERM after saving."""

# What Spinning Up's users type, and what it is called here; docs/spinningup.md tells the rest. A field's own name goes first.
ALIASES = {
    "env_name": "env",
    "hid": "hidden",
    "ac_kwargs:hidden_sizes": "hidden",
    "act": "activation",
    "ac_kwargs:activation": "activation",
    "clip_ratio": "clip",
    "pi_lr": "lr",
    "vf_lr": "value_lr",
    "replay_size": "replay",
    "start_steps": "random_steps",
    "damping_coeff": "damping",
    "cg_iters": "cg_steps",
    "backtrack_iters": "backtracks",
    "backtrack_coeff": "backtrack",
}
# … and what has no field of its own.
ELSEWHERE = {
    "steps_per_epoch": "--batch_size is an iteration's environment steps, --total_steps is all of them",
    "polyak": "--tau is 1 - polyak",
    "max_ep_len": "a time limit is the environment's: register one with max_episode_steps",
    "num_test_episodes": "onetorch eval RUN --episodes 100 comes after the training",
    "cpu": "the speed plan shares out the cores; --plan threads=4 fixes them",
    "num_cpu": "the speed plan shares out the cores; --plan threads=4 fixes them",
    "data_dir": "--dir takes the path of the folder",
    "save_freq": "--checkpoint_seconds says how often a run is saved",
    "train_pi_iters": "--epochs and --minibatches of each batch",
    "train_v_iters": "--value_epochs and --value_minibatches of each batch",
}
TRUST_HELP = "run code of the folder that is not onetorch's nor yours; shows it first"
RUN_FLAGS = {
    "dir": "the run's folder (else runs/RECIPE-xxxxxx)",
    "exp_name": "the run's folder is runs/EXP_NAME",
    "plan": "fix the speed plan or a part of it: name=value,name=value",
    "time_limit": "stop after so long and save: 90, 90s, 10m, 2h",
    "checkpoint_seconds": "least time between two checkpoints (else 10)",
    "nproc": "train in so many processes on this machine, each with a part of every batch (algorithms that can: gpt)",
    "shard": "with --nproc: each process keeps its share of every weight, gradient and average (FSDP2), not all of them",
    "explain": "at the end, where the time went, phase by phase, beside what this machine does at most",
    "from": "begin with the weights of a run, a model folder (path or URL), a .safetensors or a .pt file",
    "trust_code": TRUST_HELP,
}
SWEEP_FLAGS = {
    "dir": "the sweep's folder (else runs/sweep-RECIPE-xxxxxxxx, the same for the same trials)",
    "exp_name": "the sweep's folder is runs/EXP_NAME",
    "plan": RUN_FLAGS["plan"],
    "slots": "trials at a time (else one per GPU, without GPUs one per core); the cores are divided among them",
    "on": "ray or ray:ADDRESS: run the trials on a Ray cluster that sees the same folder",
    "time_limit": RUN_FLAGS["time_limit"],
    "checkpoint_seconds": RUN_FLAGS["checkpoint_seconds"],
}
RESUME_FLAGS = {name: RUN_FLAGS[name] for name in ("time_limit", "checkpoint_seconds", "nproc", "shard", "explain", "trust_code")}
SHARE_FLAGS = {
    "license": "the licence others get, as an SPDX identifier: MIT, Apache-2.0, CC-BY-4.0; without one nobody may use it unasked",
    "allow": "share these findings all the same: FILE or FILE:LINE, several",
    "public": "a repository that hf:// makes is public (else private)",
    "yes": "do not ask",
    "trust_code": TRUST_HELP,
}
GET_FLAGS = {"trust_code": TRUST_HELP, "yes": "do not ask"}
VERIFY_FLAGS = {"results": "evaluate again, with the card's options, and compare; --FIELD PATH says where a file or folder of the config is here"} | GET_FLAGS

COMMAND_HELP = {
    "list": "onetorch list: the recipes, their algorithms and what each is expected to reach.",
    "show": "onetorch show RECIPE [--field value …]: the config that `train` would use, each value with its origin.",
    "train": "onetorch train RECIPE [--field value …] [run options]: train and leave a run's folder. Several values for a field make it a sweep.",
    "sweep": """\
onetorch sweep RECIPE --field value value … [sweep options]: train one run for each combination of the values.
  onetorch sweep ppo --lr 1e-3 3e-4 --seed 0..4     ten runs; 0..4 is 0 1 2 3 4; lists are written [64,64] [256,256]
The same command once more skips what is done, goes on with what was stopped or killed, and tries once more what failed.
Each trial is a run in a folder of its own: `onetorch runs SWEEP` lists them. Exit code 3 when a trial is not done.""",
    "resume": "onetorch resume DIR [run options]: go on with the run in DIR from its newest valid checkpoint, bit for bit; or with the sweep in DIR.",
    "runs": "onetorch runs [DIR …]: the runs and sweeps in DIR (else ./runs), newest first: state, progress, result, cost. Of a sweep, its trials.",
    "eval": (
        "onetorch eval RUN [--option value …]: evaluate the newest checkpoint; results to RUN/eval.json, video or samples to RUN/media.\n"
        "onetorch eval MODEL [--option value …] [--FIELD PATH] [--trust-code]: a model folder (a path or a URL), which stays as it is; a path of its config,\n"
        "of its data say, is given anew where it leads elsewhere here. --out says where results go (else RUN, or ./eval-MODEL)."
    ),
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
    "share": "onetorch share RUN DEST [options]: write the newest checkpoint as a model folder. DEST: a path, a URL (s3://, …) or hf://owner/name.",
    "get": "onetorch get SRC [DIR] [options]: copy a model folder to DIR, checked; exit code 0 says that the model answers here as it did there.",
    "verify": "onetorch verify DIR|URL [options]: check sizes, hashes, weights and golden outputs in place.",
    "port": "onetorch port FILE.pt OUT.safetensors [--key NAME]: the tensors of a state dict (--key: a part of the file), read in a process with limits.",
    "new": "onetorch new NAME --from RECIPE: write NAME.py, the recipe's algorithm with its values as defaults. It runs at once: onetorch train NAME.py",
    "data": "onetorch data [PATH]: what generative models see in a text, a folder of texts, an array or a folder of images; without PATH the built-in text.",
    "doctor": "onetorch doctor: versions, processor, GPUs, compiler, optional packages and how to get them.",
}

Flags = dict[str, list[str]]


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit code, where this process has not worked with others."""
    code = _main(sys.argv[1:] if words is None else words)
    if distributed := sys.modules.get("onetorch.runs.distributed"):
        distributed.end(code)
    return code


def _main(words: list[str]) -> int:
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
    commands = {"list": _list, "show": _show, "train": _train, "sweep": _sweep, "resume": _resume, "runs": _runs, "eval": _eval, "new": _new, "doctor": _doctor}
    commands |= {"share": _share, "get": _get, "verify": _verify, "port": _port, "data": _data}
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
            name = re.sub(r"\[\w*\]$", "", name.replace("-", "_"))  # Spinning Up's --hid[h] gives the field a short name, which nothing here needs
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


def _switches(positional: list[str], flags: Flags, *names: str) -> list[bool]:
    """Whether each option that takes no value was given; words that stood behind it are positional."""
    given = [name in flags for name in names]
    for name in names:
        positional += flags.pop(name, [])
    return given


def _ask(question: str) -> bool:
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _gate(trusted: bool, yes: bool, otherwise: trust.Gate) -> trust.Gate:
    """What stands between a folder's code and its execution: `otherwise`, or with --trust-code a look at it."""

    def show(code: bytes, path: Path) -> None:
        if shown.get(path) == code or (otherwise is trust.own_only and trust.own(code)):
            return
        _print(f"--trust-code: this would run, from {trust.printable(str(path))}")
        for number, line in enumerate(trust.printable(code.decode("utf-8", errors="backslashreplace")).split("\n"), 1):
            _print(f"{number:5} | {line}")
        sys.stdout.flush()
        if sys.stdin.isatty() and not yes and not _ask("run it?"):
            raise UsageError("nothing was run")
        shown[path] = code

    shown: dict[Path, bytes] = {}
    return show if trusted else otherwise


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


def _resolve(target: str, flags: Flags, gate: trust.Gate = trust.own_only) -> Resolved:
    if target.endswith(".py") or os.sep in target:
        source = algorithm.read(Path(target), gate)
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
    for flag, texts in _aliased(flags, kinds).items():
        field, text = _field(flag, texts, kinds, name)
        try:
            values[field] = configs.parse(text, kinds[field])
        except ValueError as error:
            raise UsageError(f"--{field}: {error}") from error
        if isinstance(values[field], Path) and (":" not in text.partition("/")[0] or values[field].exists()):  # hf:NAME is no file
            values[field] = values[field].absolute()  # the run may be resumed and evaluated from elsewhere
        origin[field] = "command line"
        given += [f"--{field}", text]
    return Resolved(name, source, configs.replace(base, values), origin, given)


def _checked(Config: type, source: algorithm.Algorithm) -> Any:
    try:
        return Config()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source.path}: Config() cannot be made from its defaults: {error}") from error


def _aliased(flags: Flags, kinds: dict[str, Any]) -> Flags:
    """The flags under the names of the fields they mean; torch.nn.Tanh is tanh."""
    named: Flags = {}
    written: dict[str, str] = {}
    for flag, texts in flags.items():
        field = ALIASES[flag] if flag not in kinds and ALIASES.get(flag) in kinds else flag
        if field in named:
            raise UsageError(f"--{written[field]} and --{flag} are two names of one field; give one of them")
        written[field] = flag
        named[field] = [t.removeprefix("torch.").removeprefix("nn.").lower() if t.startswith(("torch.nn.", "nn.")) else t for t in texts]
    return named


def _field(flag: str, texts: list[str], kinds: dict[str, Any], name: str) -> tuple[str, str]:
    """The field and the text of its value that a flag means; `--no-x` and a bare `--x` are for bools."""
    if flag in kinds:
        if not texts and kinds[flag] is bool:
            return flag, "true"
        if len(texts) == 1:
            return flag, texts[0]
        if not texts:
            raise UsageError(f"--{flag}: expected {configs.type_name(kinds[flag])}, got nothing")
        raise UsageError(f"--{flag} takes one value, got {len(texts)}: {' '.join(texts)} (a list is written [a,b]; `onetorch sweep` takes several)")
    if flag.startswith("no_") and kinds.get(flag[3:]) is bool and not texts:
        return flag[3:], "false"
    if flag in ELSEWHERE:
        raise UsageError(f"{name} has no field {flag!r}: {ELSEWHERE[flag]}")
    raise UsageError(f"{name} has no field {flag!r}{nearest(flag, [*kinds, *RUN_FLAGS])}; `onetorch show {name}` lists them")


def _fields(resolved: Resolved) -> Iterator[tuple[str, ...]]:
    for name, kind in configs.leaves(resolved.source.Config):
        doc = resolved.source.docs.get(name.partition(".")[0], "")
        yield name, configs.text(configs.get(resolved.config, name)), resolved.origin[name], configs.type_name(kind), doc


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
    tables = {"train": RUN_FLAGS, "sweep": SWEEP_FLAGS, "resume": RESUME_FLAGS, "share": SHARE_FLAGS, "get": GET_FLAGS, "verify": VERIFY_FLAGS}
    if command in tables:
        _print("\nrun options:" if command in ("train", "resume") else "\noptions:")
        _table([(f"  --{n}", text) for n, text in tables[command].items()])
    if command in ("train", "sweep", "show") and targets:
        resolved = _resolve(targets[0], {})
        _print(f"\nfields of {resolved.name}:")
        _table([(f"  --{name}", kind, value, doc) for name, value, _, kind, doc in _fields(resolved)])
    elif command in ("train", "sweep", "show"):
        _print(f"\n`onetorch {command} RECIPE --help` lists the recipe's fields.")
    if command == "eval" and targets and folder.holds_run(Path(targets[0])):
        source = algorithm.of_run(Path(targets[0]))
        _print("\noptions:")
        _table([(f"  --{name}", configs.type_name(kind), configs.text(default)) for name, (kind, default) in source.options.items()])
        _print(f"\n{source.evaluates}")


# -- commands that need no torch -----------------------------------------------------------------------------------------------------------------


def _list(positional: list[str], flags: Flags) -> int:
    _none(positional, "list")
    _nothing_left(flags, (), "list")
    listed = recipes.known().values()
    indent = max(len(recipe.name) for recipe in listed) + 2
    columns = max(shutil.get_terminal_size((120, 0)).columns, indent + 40)
    for recipe in listed:
        for start, text in ((recipe.name, recipe.doc), ("", f"reaches: {recipe.reaches}" if recipe.reaches else "")):
            if text:
                _print(textwrap.fill(text, columns, initial_indent=start.ljust(indent), subsequent_indent=" " * indent))
    return 0


def _show(positional: list[str], flags: Flags) -> int:
    (trusted,) = _switches(positional, flags, "trust_code")
    resolved = _resolve(_only(positional, "recipe", "show"), flags, _gate(trusted, False, trust.own_only))
    _print(f"{resolved.name}: {resolved.source.doc}")
    _print(f"from {resolved.source.path}\n")
    _table([("FIELD", "VALUE", "ORIGIN", "TYPE", "MEANING"), *_fields(resolved)])
    return 0


def _new(positional: list[str], flags: Flags) -> int:
    (trusted,) = _switches(positional, flags, "trust_code")
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
    resolved = _resolve(target, {}, _gate(trusted, False, trust.own_only))
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
    from onetorch.runs import sweep

    _nothing_left(flags, (), "runs")
    found: list[tuple[float, Path]] = []
    names: dict[Path, str] = {}  # of a sweep's trials
    for place in map(Path, positional or ["runs"]):
        if not place.is_dir():
            if positional:
                raise UsageError(f"there is no folder {place}")
            continue
        for path in [place, *sorted(place.iterdir())]:
            if folder.holds_run(path):
                found.append(((path / "config.json").stat().st_mtime, path))
            elif path != place and sweep.is_sweep(path):
                found.append(((path / "sweep.json").stat().st_mtime, path))
        if sweep.is_sweep(place):
            names |= {t.folder: t.name for t in sweep.load(place).trials}
    if not found:
        _print("no runs here; `onetorch train RECIPE` makes one")
        return 0
    rows = [("RUN", "STATE", "PROGRESS", "RESULT", "COST")]
    for _, path in sorted(found, reverse=True):
        try:
            if sweep.is_sweep(path):
                rows.append(_sweep_row(path))
                continue
            record = folder.read_json(path / "run.json")
            rows.append((f"{path}  {names.get(path, '')}".rstrip(), folder.status(path, record), _progress(record), _result(record), _cost(record)))
        except (OneTorchError, AttributeError, KeyError, TypeError, ValueError) as error:
            rows.append((str(path), "damaged", "", "", str(error)))
    _table(rows, widest=80)
    return 0


def _sweep_row(path: Path) -> tuple[str, str, str, str, str]:
    """A sweep as one row of the listing: how many trials stand how."""
    from onetorch.runs import sweep

    made = sweep.load(path)
    states = [t.state for t in made.trials]
    done, cost = states.count("done"), sum(t.seconds for t in made.trials)
    rest = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states) if s != "done")
    state = "done" if done == len(states) else "running" if folder.owner(path) else "stopped"
    return str(path), state, f"{done} of {len(states)} trials", rest or f"sweep over {', '.join(made.grid)}", f"{cost:.1f} s"


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
    times = {name: _seconds(_one(flags, name), name) for name in ("time_limit", "checkpoint_seconds")}
    return {name: value for name, value in times.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Processes:
    """How many processes work on a run, as the command line has it."""

    count: int  # to be started here
    place: str | None  # of this one among others, for `distributed.join`
    shard: bool
    words: list[str]  # the flags for a process started here, but for --dir

    def check(self, source: algorithm.Algorithm, where: str | None) -> None:
        """UsageError where the algorithm works in one process only, or these processes cannot work together."""
        if self.count > 1 or self.place is not None:
            if not source.in_several_processes:
                raise UsageError(f"--nproc: {source.name} trains in one process; it does not share out its batches")
            if where is None:
                raise UsageError("under torchrun every process must be told the same folder: give --dir")
        elif self.shard:
            raise UsageError("--shard is for several processes: give --nproc too")

    def join(self) -> tuple[type, int]:
        """The class of this process's run, and how many processes work on it, once it has met the others."""
        from onetorch.runs import distributed
        from onetorch.runs.follower import Follower
        from onetorch.runs.run import Run

        if self.place is not None:
            distributed.join(self.place, self.shard)
        return Follower if distributed.rank() else Run, distributed.world()


def _processes(positional: list[str], flags: Flags) -> Processes:
    """What --nproc and --shard say, taken out of `flags`; torchrun tells its processes through the environment."""
    (shard,) = _switches(positional, flags, "shard")
    words = [word for name, texts in flags.items() if name not in ("nproc", "dir") for word in (f"--{name}", *texts)] + ["--shard"] * shard
    count, place = _one(flags, "nproc"), _one(flags, "worker")
    if count is not None and not (count.isdigit() and int(count) > 0):
        raise UsageError(f"--nproc: expected a number of processes, got {count!r}")
    if place is None and "TORCHELASTIC_RUN_ID" in os.environ:
        place = "torchrun"
        if count is not None:
            raise UsageError("--nproc: torchrun has started the processes already; its --nproc-per-node says how many")
    return Processes(int(count or 1), place, shard, words)


def _train(positional: list[str], flags: Flags) -> int:
    processes = _processes(positional, flags)
    trusted, explain = _switches(positional, flags, "trust_code", "explain")
    target, begin = _only(positional, "recipe", "train"), _one(flags, "from")
    where, fixed, pace = _where(flags), _one(flags, "plan"), _pace(flags)
    if _several(flags):
        made = _design(target, flags, fixed, where)
        if len(made.trials) > 1:
            if processes.count > 1 or processes.shard:
                raise UsageError("--nproc is for one run; the trials of a sweep have a process each (--slots says how many at a time)")
            if begin is not None:
                raise UsageError("--from begins one run; a sweep's trials begin with the algorithm's own weights")
            if explain:
                raise UsageError("--explain is of one run; give every field one value")
            return _run_sweep(made, **pace)
    resolved = _resolve(target, flags, _gate(trusted, False, trust.own_only))
    path = Path(where) if where else _free_folder(resolved.name)
    processes.check(resolved.source, str(path) if processes.place is None else where)
    if folder.holds_run(path) and processes.place in (None, "torchrun"):
        raise folder.refuse(path)
    if processes.count > 1:
        from onetorch.runs import launch

        return launch.launch(["train", target, *processes.words, "--dir", str(path)], processes.count)

    module = resolved.source.load()
    from onetorch.runs import plan, provenance

    Run, count = processes.join()

    weights, origin = None, None
    if begin is not None:
        from onetorch.share.load import weights_of

        weights, origin = weights_of(begin)
    words = ["onetorch", "train", target, *resolved.given, *(["--from", begin] if begin is not None else [])]
    words += ["--nproc", str(count), *["--shard"] * processes.shard] if count > 1 else []
    run = Run(
        path,
        configs.from_json(configs.to_json(resolved.config), module.Config),
        recipe=resolved.name,
        algorithm=resolved.source.module,
        source=resolved.source.path,
        command=words,
        weights=weights,
        origin=origin,
        fixed=plan.parse(fixed or ""),
        threads=max(provenance.cores() // count, 1) if count > 1 else None,
        explain=explain,
        **pace,
    )
    return _work(module, run, explain)


def _where(flags: Flags) -> str | None:
    """The folder that --dir or --exp_name asks for."""
    where, name = _one(flags, "dir"), _one(flags, "exp_name")
    if where == "":
        raise UsageError("--dir: expected a folder, got an empty name")
    if name is None:
        return where
    if where is not None:
        raise UsageError("--exp_name and --dir both name the folder; give one of them")
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise UsageError(f"--exp_name: expected a name of letters, digits, _, - and ., got {name!r}; --dir takes a path")
    return str(Path("runs") / name)


def _several(flags: Flags) -> Flags:
    """The flags with more than one value."""
    return {name: texts for name, texts in flags.items() if len(texts) > 1 or any(configs.RANGE.fullmatch(t) for t in texts)}


def _design(target: str, flags: Flags, fixed: str | None, where: str | None) -> "sweep.Sweep":
    from onetorch.runs import sweep

    several = _several(flags)
    resolved = _resolve(target, {name: texts for name, texts in flags.items() if name not in several})
    kinds = dict(configs.leaves(resolved.source.Config))
    for taken in SWEEP_FLAGS.keys() & kinds.keys():
        raise UsageError(f"{resolved.source.path}: the field {taken} has the name of a sweep option; call it otherwise")
    grid: dict[str, list[Any]] = {}
    for flag, texts in _aliased(several, kinds).items():
        if resolved.origin.get(flag) == "command line":
            raise UsageError(f"--{flag} is given twice")
        field, _ = _field(flag, texts[:1], kinds, resolved.name)
        try:
            grid[field] = sweep.values(texts, kinds[field])
        except ValueError as error:
            raise UsageError(f"--{field}: {error}") from error
    # The file is read, not imported: torch would make the forecast wait.
    return sweep.design(resolved.source, resolved.config, grid, recipe=resolved.name, target=target, plan=_fixed(fixed), dir=where)


def _fixed(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    from onetorch.runs import plan

    return plan.parse(text)


def _sweep(positional: list[str], flags: Flags) -> int:
    target = _only(positional, "recipe", "sweep")
    where, fixed, how = _where(flags), _one(flags, "plan"), {**_place(flags), **_pace(flags)}
    return _run_sweep(_design(target, flags, fixed, where), **how)


def _place(flags: Flags) -> dict[str, Any]:
    """The sweep options that say where the trials run."""
    slots, on = _one(flags, "slots"), _one(flags, "on")
    if slots is not None and not slots.isdigit():
        raise UsageError(f"--slots: expected a number of trials at a time, got {slots!r}")
    return {"slots": slots and int(slots), "on": on}


def _run_sweep(made: "sweep.Sweep", **how: Any) -> int:
    from onetorch.runs import sweep

    where = shlex.quote(str(made.folder))
    try:
        trials = sweep.execute(made, **how)
    except Stopped as stop:
        done = sum(t.state == "done" for t in made.trials)
        _error(f"stopped ({stop}) with {done} of {len(made.trials)} trials done; the same command goes on, and so does `onetorch resume {where}`")
        raise
    undone = [t for t in trials if t.state != "done"]
    for trial in undone:
        _error(f"trial {trial.id} ({trial.name}) {trial.state}: {trial.why}; its output is in {trial.folder / 'output.txt'}")
    _print(f"sweep: {made.folder}  ({len(trials) - len(undone)} of {len(trials)} done, {sum(t.seconds for t in trials):.1f} s of trials)")
    _print(f"trials: onetorch runs {where}")
    return RunError.exit_code if undone else 0


def _free_folder(name: str) -> Path:
    while True:
        path = Path("runs") / f"{name}-{os.urandom(3).hex()}"
        if not path.exists():
            return path


def _resume(positional: list[str], flags: Flags) -> int:
    from onetorch.runs import sweep

    processes = _processes(positional, flags)
    trusted, explain = _switches(positional, flags, "trust_code", "explain")
    path = Path(_only(positional, "folder", "resume"))
    pace = _pace(flags)
    if sweep.is_sweep(path):
        if explain:
            raise UsageError("--explain is of one run, not of a sweep")
        how = _place(flags)
        _nothing_left(flags, (*RESUME_FLAGS, "slots", "on"), "resume of a sweep")
        return _run_sweep(sweep.load(path), **how, **pace)
    _nothing_left(flags, RESUME_FLAGS, "resume")
    source = algorithm.of_run(path, _gate(trusted, False, trust.own_only))
    processes.check(source, str(path))
    folder.config(path, source.Config)
    record = folder.read_json(path / "run.json")
    if folder.status(path, record) == "done":
        _print(f"{path} is done: {_progress(record)}, {_result(record)}")
        return 0
    if processes.count > 1:
        from onetorch.runs import launch

        return launch.launch(["resume", str(path), *processes.words], processes.count)
    module = source.load()
    from onetorch.runs import provenance

    Run, count = processes.join()
    threads = max(provenance.cores() // count, 1) if count > 1 else None
    return _work(module, Run(path, folder.config(path, module.Config), resume=True, threads=threads, explain=explain, **pace), explain)


def _work(module: Any, run: Any, explain: bool = False) -> int:
    """Train, evaluate, draw; whatever happens, the run's record says so."""
    from onetorch.runs import distributed, plan, report

    run.say(f"run: {run.folder}  ({run.record['command']})")
    again = ""
    try:
        with run:
            model = module.train(run.config, run)
            run.finish()
            first = distributed.rank() == 0
            distributed.leave()
            if not first:
                return 0
            again = f"{run.record['command']} --plan {plan.show(run.record['plan'])}" if run.record["plan"] else run.record["command"]
            results = module.evaluate(model, run.config, media=run.media)
            run.result(**results)
            try:
                for line in report.write(run.folder, run.record):
                    run.say(line)
            except OSError as error:
                raise RunError(folder.explain(error, run.folder / "report.html")) from error
    except Stopped as stop:
        reached = f"after {_progress(run.record)}" if run.record["progress"]["total"] else "before the first step"  # while the speed plan was measured, say
        run.say(f"stopped ({stop}) {reached}; onetorch resume {shlex.quote(str(run.folder))} goes on")
        raise
    except OneTorchError:
        raise
    except Exception as error:
        error.add_note(f"the run in {run.folder} failed")
        raise
    if explain:
        _explain(run)
    _print("  ".join(f"{k} {_number(v)}" for k, v in results.items()))
    _print(f"run: {run.folder}  ({_cost(run.record)})")
    _print(f"again: {again}")
    return 0


def _explain(run: Any) -> None:
    """Where the time of this process's loop went, phase by phase, beside what this machine does at most."""
    phases, progress, plan = run.phases(), run.record["progress"], run.record["plan"]
    if not phases:
        _print("no phases: the algorithm has no run.phase(…) in its loop")
        return
    seconds, unit = sum(phases.values()), progress["unit"].removesuffix("s")
    count = (progress["done"] - run.first) * progress["scale"]
    ceilings: dict[str, str] = {}
    num_envs = plan.get("num_envs") or getattr(run.config, "num_envs", None)
    if "environment" in phases and num_envs and plan.get("backend"):
        from onetorch.rl import envs

        ceilings["environment"] = f"{envs.speed(run.config.env, num_envs, plan['backend']):,.0f} {unit}s/s, the environments alone"
    if products := run.ceiling():
        flops, peak = products
        limit = f"{peak * count / flops:,.0f} {unit}s/s, the FLOPs of its model at the {peak / 1e9:,.0f} GFLOP/s of matrix products"
        ceilings["gradient" if "gradient" in phases else "update"] = limit
    rows = [("PHASE", "SECONDS", "SHARE", f"us a {unit}", f"{unit}s/s", "THIS MACHINE AT MOST")]
    for name, spent in [*sorted(phases.items(), key=lambda item: -item[1]), ("all", seconds)]:
        rate = f"{count / spent:,.0f}" if spent > 0 else ""
        rows.append((name, f"{spent:.2f}", f"{100 * spent / seconds:.0f} %", f"{1e6 * spent / count:.2f}" if count else "", rate, ceilings.get(name, "")))
    _table(rows)


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _eval(positional: list[str], flags: Flags) -> int:
    (trusted,) = _switches(positional, flags, "trust_code")
    where = _only(positional, "run or model folder", "eval")
    path, out = Path(where), _one(flags, "out")
    if "://" in where or ((path / "manifest.json").exists() and not folder.holds_run(path)):
        return _eval_model(where, flags, trusted, out)
    gate = _gate(trusted, False, trust.own_only)
    source = algorithm.of_run(path, gate)
    options = _options(flags, source)

    from onetorch.share.load import load_run

    run = load_run(path, gate)
    return _evaluated(run, run.config, options, Path(out) if out else path, {"step": run.saved and run.saved.step})


def _eval_model(where: str, flags: Flags, trusted: bool, out: str | None) -> int:
    """Evaluate a model folder, in which nothing is written: its files are those of its manifest."""
    from onetorch.share import folder as folders
    from onetorch.share import places
    from onetorch.share.load import load_model

    loaded = load_model(folders.read(places.place(where)), _gate(trusted, False, trust.nobody))
    config = _with_paths(loaded.config, flags, where)
    return _evaluated(loaded, config, _options(flags, loaded.source), Path(out or f"eval-{_last_part(where)}"), {"of": where})


def _with_paths(config: Any, flags: Flags, where: str) -> Any:
    """The config of a model folder with those of its paths that `flags` give anew, which are taken out: the sender's are not ours."""
    kinds = {name: kind for name, kind in configs.leaves(type(config)) if kind in (Path, Path | None)}
    given = {name: flags.pop(name) for name in kinds.keys() & flags.keys()}
    return configs.replace(config, {name: configs.parse(_field(name, texts, kinds, where)[1], kinds[name]) for name, texts in given.items()})


def _options(flags: Flags, source: algorithm.Algorithm) -> dict[str, Any]:
    """The options of an algorithm's evaluation."""
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
    return options


def _evaluated(loaded: Any, config: Any, options: dict[str, Any], out: Path, origin: dict[str, Any]) -> int:
    media = out / "media"
    try:
        media.mkdir(parents=True, exist_ok=True)
        results = loaded.module.evaluate(loaded.model, config, media=media, **options)
        given = {name: configs.to_json(value) for name, value in options.items()}
        entry = {"format": folder.FORMAT, **origin, "options": given, "results": results}
        folder.write_json(out / "eval.json", entry | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    except OSError as error:
        raise UsageError(folder.explain(error, out)) from error
    _table([(name, _number(value)) for name, value in results.items()])
    _print(f"written to {out / 'eval.json'} and {media}")
    return 0


def _share(positional: list[str], flags: Flags) -> int:
    trusted, yes, public = _switches(positional, flags, "trust_code", "yes", "public")
    licence, allow = _one(flags, "license"), tuple(flags.pop("allow", []))
    _nothing_left(flags, SHARE_FLAGS, "share")
    if len(positional) != 2:
        raise UsageError(f"share takes a run and a destination, got {' '.join(positional) or 'none'}; `onetorch share --help`")
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise UsageError(f"--license: expected an SPDX identifier such as MIT or Apache-2.0, got {licence!r}")
    run, where = Path(positional[0]), positional[1]
    if "://" not in where:
        from onetorch.share.folder import free

        free(Path(where))
    from onetorch.runs import sealed
    from onetorch.share.pack import pack, publish

    package = pack(run, where, licence=licence, allow=allow, gate=_gate(trusted, yes, trust.own_only))
    for place, what in package.private:
        _error(f"{place}: {what}")
    if package.private:
        raise UsageError(f"nothing was shared: take these out, or share them on purpose with --allow {' '.join(place for place, _ in package.private)}")
    _print(f"{where} will hold")
    _table([(f"  {name}", f"{sealed.length(pieces):,} bytes") for name, pieces in package.files.items()] + [("  manifest.json", "size and SHA-256 of each")])
    for note in package.notes:
        _print(f"note: {note}")
    sys.stdout.flush()
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("share asks before it writes, and there is no terminal to ask at: --yes writes this")
        if not _ask("write it?"):
            raise UsageError("nothing was written")
    _print(f"shared: {publish(package, where, public)}")
    if "://" not in where:
        _print(f"check it as others will: onetorch verify {shlex.quote(where)}" + (" --trust-code" if not _of_ours(run) else ""))
    return 0


def _of_ours(run: Path) -> bool:
    return folder.read_json(run / "config.json").get("algorithm") != "source.py"


def _last_part(where: str) -> str:
    """The name of a folder or an address."""
    return (where if "://" in where else str(Path(where).absolute())).rstrip("/").rpartition("/")[2].partition("@")[0]


def _get(positional: list[str], flags: Flags) -> int:
    trusted, yes = _switches(positional, flags, "trust_code", "yes")
    _nothing_left(flags, GET_FLAGS, "get")
    if len(positional) not in (1, 2):
        raise UsageError(f"get takes a source and a folder, got {' '.join(positional) or 'none'}; `onetorch get --help`")
    where = positional[0]
    path = Path(positional[1] if len(positional) == 2 else _last_part(where))
    from onetorch.share import folder as folders
    from onetorch.share import places
    from onetorch.share.load import foreign
    from onetorch.share.verify import verify

    folders.free(path)
    contents = folders.fetch(places.place(where), path)
    _print(f"{path}: a whole copy of {where}, every size and SHA-256 as in its manifest")
    if foreign(contents) and not trusted:
        raise UsageError(
            f"{path / 'source.py'} is not part of onetorch, so it was not run and the model was not checked: "
            f"read it, then `onetorch verify {shlex.quote(str(path))} --trust-code`"
        )
    for line in verify(contents, _gate(trusted, yes, trust.nobody))[1]:
        _print(line)
    return 0


def _verify(positional: list[str], flags: Flags) -> int:
    trusted, yes, again = _switches(positional, flags, "trust_code", "yes", "results")
    if not again:
        _nothing_left(flags, VERIFY_FLAGS, "verify")
    where = _only(positional, "folder", "verify")
    from onetorch.share import folder as folders
    from onetorch.share import places
    from onetorch.share.verify import results, verify

    contents = folders.read(places.place(where))
    loaded, lines = verify(contents, _gate(trusted, yes, trust.nobody))
    for line in lines:
        _print(line)
    if not again:
        return 0
    config = _with_paths(loaded.config, flags, where)
    _nothing_left(flags, [*VERIFY_FLAGS, *(name for name, kind in configs.leaves(type(config)) if kind in (Path, Path | None))], "verify")
    judgements = list(results(contents, loaded, config))
    verdict = {True: "agrees", False: "DIFFERS", None: "not judged"}
    rows = [(j.name, _number(j.card), _number(j.here), verdict[j.agrees], j.why) for j in judgements]
    _table([("VALUE", "CARD", "HERE", "", ""), *(tuple(map(trust.printable, row)) for row in rows)])
    wrong = [j.name for j in judgements if j.agrees is False]
    if wrong or not any(j.agrees for j in judgements):
        from onetorch.runs.errors import RunError

        raise RunError(f"{where}: the card does not hold on this machine: {', '.join(map(trust.printable, wrong)) or 'no value could be judged'}")
    return 0


def _port(positional: list[str], flags: Flags) -> int:
    key = _one(flags, "key")
    _nothing_left(flags, ("key",), "port")
    if len(positional) != 2 or not positional[1].endswith(".safetensors"):
        raise UsageError("port takes a file and the name of a .safetensors file to write; `onetorch port --help`")
    source, target = map(Path, positional)
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already; choose another name")
    from onetorch.runs import sealed
    from onetorch.share.port import tensors_of

    tensors = tensors_of(source, key)
    try:
        sealed.write(target, sealed.dump(tensors))
    except OSError as error:
        raise UsageError(folder.explain(error, target)) from error
    _table([(trust.printable(name), str(tuple(t.shape)), str(t.dtype).removeprefix("torch.")) for name, t in sorted(tensors.items())])
    _print(f"{target}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()):,} bytes")
    return 0


def _data(positional: list[str], flags: Flags) -> int:
    _nothing_left(flags, (), "data")
    if len(positional) > 1:
        raise UsageError(f"data takes one path at most, got {' '.join(positional)}; `onetorch data --help`")
    from onetorch.generative.describe import describe

    _table(describe(Path(positional[0]) if positional else None))
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
    rows += [("compiler", compiler or "none", "" if compiler else "block-sparse kernels are slow and torch.compile fails without: install g++ or clang++")]
    for extra, missing in provenance.extras().items():
        rows.append((f"extra {extra}", f"lacks {', '.join(missing)}" if missing else "complete", f"pip install 'onetorch[{extra}]'" if missing else ""))
    free = shutil.disk_usage(".").free
    rows.append(("disk", f"{free / 2**30:.0f} GiB free", str(Path.cwd())))
    _table(rows, widest=60)
    return 0


if __name__ == "__main__":
    sys.exit(main())

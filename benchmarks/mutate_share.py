"""Model folders from strangers: 10,000 damaged ones, and 50 made to harm.

    python benchmarks/mutate_share.py [--mutants 10000] [--mb 100] [--seed 0]

Mutants: one random change of a sound folder (a bit, a byte, a cut, an insertion, a swap of two files, a removal, an addition, a link, a changed number or word
in a JSON file). Each has to be refused by a message that names a file of the folder, or to be read as a model with the same weights, config and answers. A
tenth more is changed and then given a manifest that fits: another folder, but a consistent one, to be refused by name or read as what its bytes say.

Malicious folders: pickles in six forms, names that lead out of the folder, links, pipes, sizes and shapes that ask for all memory, code in every place that
could be executed. Each is tried in a process of its own on a folder of at least `--mb` megabytes, by verify, by load, by get and by train --from, and where the
attack is not in the code, by one who trusts the code too. None may execute anything (a canary file would appear), write outside its target, or take more than
1.2 times its folder's size of memory (peak resident size, beyond that of the process with everything imported). Exit code 1 on any miss; results as JSON.
"""

import argparse
import gc
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onetorch.runs import sealed, trust
from onetorch.runs.errors import OneTorchError
from onetorch.share import folder, places
from onetorch.share.load import Loaded
from onetorch.share.pack import pack, publish
from onetorch.share.verify import verify

MEMORY = 1.2  # times the folder
ALGORITHM = Path(__file__).with_name("share_cost.py")


def sound(base: Path, width: int) -> Path:
    """A sound model folder of the benchmark's own algorithm."""
    sys.path.insert(0, str(ALGORITHM.parent))
    import share_cost

    share_cost.make_run(base / "run", width)
    publish(pack(base / "run", "model", licence="MIT", gate=trust.anybody), str(base / "model"))
    return base / "model"


def seal(path: Path) -> None:
    """Give the folder a manifest that fits what stands in it."""
    files = {}
    for file in sorted(path.iterdir()):
        if file.name != folder.MANIFEST and file.is_file() and not file.is_symlink():
            with open(file, "rb") as content:
                files[file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    (path / folder.MANIFEST).write_bytes(folder.written({"format": 1, "files": files}))


# -- mutants ----------------------------------------------------------------------------------------------------------------------------------------


def bytes_changed(rng: random.Random, path: Path) -> str:
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    at, kind = rng.randrange(len(content)), rng.choice(("bit", "byte", "cut", "insert", "double", "zeros", "drop"))
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[at] = rng.randrange(256)
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    elif kind == "double":
        content += content[at:]
    elif kind == "zeros":
        content[at : at + 64] = bytes(min(64, len(content) - at))
    else:
        del content[at : at + rng.choice((1, 8, 100))]
    file.write_bytes(content)
    return f"{kind} {file.name}"


def files_changed(rng: random.Random, path: Path) -> str:
    names = sorted(f.name for f in path.iterdir())
    one, other = rng.sample(names, 2)
    kind = rng.choice(("swap", "remove", "rename", "link", "add", "folder"))
    if kind == "swap":
        a, b = (path / one).read_bytes(), (path / other).read_bytes()
        (path / one).write_bytes(b)
        (path / other).write_bytes(a)
    elif kind == "remove":
        (path / one).unlink()
    elif kind == "rename":
        (path / one).rename(path / (one + rng.choice(("~", ".bak", " ", "1"))))
    elif kind == "link":
        (path / one).rename(path.parent / "elsewhere")
        (path / one).symlink_to(path.parent / "elsewhere")
    elif kind == "add":
        (path / rng.choice(("evil.py", "torch.py", "model.pt", "__init__.py", "sitecustomize.py"))).write_text("raise SystemExit(1)\n")
    else:
        (path / one).unlink()
        (path / one).mkdir()
    return f"{kind} {one}"


def json_changed(rng: random.Random, path: Path) -> str:
    name = rng.choice((folder.MANIFEST, folder.CONFIG, folder.PROVENANCE))
    data = json.loads((path / name).read_text())
    place, key = data, rng.choice(sorted(data))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.9:
        place = place[key]
        key = rng.choice(sorted(place))
    strange: list[Any] = [None, True, -1, 0, 2**63, 1e308, "", "../../etc/passwd", "os:system", [], {}]
    strange += [{"$callable": "os.system"}, ["a"] * 9, "\x00", "\u202e", 3.5]
    kind = rng.choice(("value", "delete", "rename", "number"))
    if kind == "delete":
        del place[key]
    elif kind == "rename":
        place[rng.choice(("../x", "/tmp/x", "a" * 300, "x.pt", key + " "))] = place.pop(key)
    elif kind == "number" and isinstance(place[key], int | float):
        place[key] = place[key] + rng.choice((1, -1, 10**12))
    else:
        place[key] = rng.choice(strange)
    (path / name).write_text(json.dumps(data, indent=1) + "\n")
    return f"json {name}"


def header_changed(rng: random.Random, path: Path) -> str:
    file = path / rng.choice((folder.MODEL, folder.GOLDEN))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    choice = rng.randrange(8)
    if choice == 0:
        entry["shape"] = [2**40, 2**40]
    elif choice == 1:
        entry["dtype"] = rng.choice(("F64", "I8", "OBJECT", "BF16", None, 3))
    elif choice == 2:
        entry["data_offsets"] = [entry["data_offsets"][0] + rng.choice((-8, 1, 8)), entry["data_offsets"][1]]
    elif choice == 3:
        header[name + "x"] = dict(entry)
    elif choice == 4:
        header["../" + name] = header.pop(name)
    elif choice == 5:
        entry["shape"] = [-1, *entry["shape"]]
    elif choice == 6:
        del entry[rng.choice(sorted(entry))]
    else:
        size = rng.choice((2**63 - 1, 2**64 - 1, len(content), 0, size + 8))
        file.write_bytes(size.to_bytes(8, "little") + content[8:])
        return f"header {file.name}"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])
    return f"header {file.name}"


def same(a: Loaded, b: Loaded) -> bool:
    return repr(a.config) == repr(b.config) and a.weights.keys() == b.weights.keys() and all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def mutants(count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Verify `count` mutants and a tenth more that were sealed again; what came of them."""
    model = sound(scratch / "small", 16)
    original = verify(folder.read(places.place(model)), trust.anybody)[0]
    files = {f.name: f.read_bytes() for f in model.iterdir()}
    outcomes: Counter[str] = Counter()
    misses: list[str] = []
    begin = time.perf_counter()
    for number in range(count + count // 10):
        resealed = number >= count
        rng = random.Random(f"{seed} {number}")
        path = scratch / "mutant"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        kinds = (json_changed, header_changed) if resealed else (bytes_changed, bytes_changed, bytes_changed, files_changed, json_changed, header_changed)
        what = rng.choice(kinds)(rng, path)
        if resealed:
            seal(path)
        # The algorithm's file is trusted here, so that what it is given is looked at; that it is not executed unasked is what the malicious folders are for.
        changed = not (path / folder.SOURCE).is_file() or (path / folder.SOURCE).read_bytes() != files[folder.SOURCE]
        try:
            found = verify(folder.read(places.place(path)), trust.nobody if changed else trust.anybody)[0]
        except OneTorchError as error:
            named = any(name in str(error) for name in (*files, *(f.name for f in path.iterdir())))
            outcomes["refused" if named else "refused without a name"] += 1
            if not named:
                misses.append(f"{number} {what}: {error}")
        except Exception as error:
            outcomes["crashed"] += 1
            misses.append(f"{number} {what}: {type(error).__name__}: {error}")
        else:
            if resealed:
                outcomes["sealed again, read as what it says"] += 1
            else:
                outcomes["identical" if same(original, found) else "accepted though changed"] += 1
                if not same(original, found):
                    misses.append(f"{number} {what}: accepted")
    return {"mutants": count, "sealed_again": count // 10, "outcomes": dict(outcomes), "misses": misses[:20], "seconds": round(time.perf_counter() - begin, 1)}


# -- malicious folders ------------------------------------------------------------------------------------------------------------------------------


class Bomb:
    """What a pickle executes on load."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def edit(path: Path, name: str, **changes: Any) -> None:
    data = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(data | changes))


def in_config(path: Path, **values: Any) -> None:
    data = json.loads((path / folder.CONFIG).read_text())
    data["config"] |= values
    (path / folder.CONFIG).write_text(json.dumps(data))


def ours(path: Path, **values: Any) -> None:
    """The config of an algorithm of onetorch's own, where a stranger has the most to gain: it runs without --trust-code."""
    data = {"format": 1, "recipe": "ppo", "algorithm": "onetorch.rl.ppo", "config": OURS | values}
    (path / folder.CONFIG).write_text(json.dumps(data))


def in_manifest(path: Path, name: str, **entry: Any) -> None:
    data = json.loads((path / folder.MANIFEST).read_text())
    data["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()} | data["files"].get(name, {}) | entry
    (path / folder.MANIFEST).write_bytes(folder.written(data))


def with_header(path: Path, header: bytes, claimed: int | None = None, data: bytes = b"", name: str = folder.MODEL) -> None:
    (path / name).unlink()
    (path / name).write_bytes((len(header) if claimed is None else claimed).to_bytes(8, "little") + header + data)


def replaced_by_link(path: Path, name: str, target: str | Path) -> None:
    (path / name).unlink()
    (path / name).symlink_to(target)


def source(path: Path, code: str) -> None:
    (path / folder.SOURCE).write_text(code + (path / folder.SOURCE).read_text())


def pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


def compiled(path: Path, canary: Path) -> None:
    """A compiled file that Python's import system would believe before the source."""
    import importlib._bootstrap_external as external

    (path / "__pycache__").mkdir()
    code = compile(f"import os; os.system('touch {canary}')", "source.py", "exec")
    content = external._code_to_hash_pyc(code, b"\0" * 8, False)  # type: ignore[attr-defined]
    (path / "__pycache__" / f"source.{sys.implementation.cache_tag}.pyc").write_bytes(content)


def sparse(path: Path, name: str, size: int) -> None:
    (path / name).unlink()
    with open(path / name, "wb") as file:
        file.truncate(size)


def tensor_file(path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    (path / name).unlink()
    sealed.write(path / name, sealed.dump(tensors))


OURS: dict[str, Any] = {}


def malicious(canary: Path, outside: Path) -> dict[str, Callable[[Path], Any]]:
    """Name to what is done to a sound folder. Each is sealed again afterwards, unless its name ends in '!'."""
    shell = f"import os; os.system('touch {canary}')\n"
    pickles: dict[str, Callable[[Path], Any]] = {
        "pickle, protocol 0, as the weights": lambda p: (p / folder.MODEL).write_bytes(pickle.dumps(Bomb(canary), 0)),
        "pickle, protocol 5, as the weights": lambda p: (p / folder.MODEL).write_bytes(pickle.dumps(Bomb(canary), 5)),
        "torch.save, zip, as the weights": lambda p: torch.save({"w": Bomb(canary)}, p / folder.MODEL),
        "torch.save, old form, as the weights": lambda p: torch.save({"w": Bomb(canary)}, p / folder.MODEL, _use_new_zipfile_serialization=False),
        "numpy object array as golden outputs": lambda p: (p / folder.GOLDEN).write_bytes(_object_array(canary)),
        "pickle as config.json": lambda p: (p / folder.CONFIG).write_bytes(pickle.dumps(Bomb(canary), 2)),
        "pickle as provenance.json": lambda p: (p / folder.PROVENANCE).write_bytes(pickle.dumps(Bomb(canary), 4)),
        "pickle beside the files": lambda p: (p / "model.pt").write_bytes(pickle.dumps(Bomb(canary))),
        "pickle as the manifest!": lambda p: (p / folder.MANIFEST).write_bytes(pickle.dumps(Bomb(canary))),
    }
    names: dict[str, Callable[[Path], Any]] = {
        f"the manifest names {name!r}!": lambda p, name=name: in_manifest(p, name)
        for name in ("../evil", f"{outside}/evil", "a/../../evil", "..\\evil", "model.safetensors\x00", "./model.safetensors", ".bashrc", "source.py/../evil")
    }
    links: dict[str, Callable[[Path], Any]] = {
        "weights are a link to a device!": lambda p: replaced_by_link(p, folder.MODEL, "/dev/zero"),
        "source.py is a link to a file outside!": lambda p: replaced_by_link(p, folder.SOURCE, "/etc/passwd"),
        "README.md is a link into nothing!": lambda p: replaced_by_link(p, folder.CARD, outside / "evil"),
        "the manifest is a link!": lambda p: ((p / folder.MANIFEST).rename(p.parent / "manifest"), (p / folder.MANIFEST).symlink_to(p.parent / "manifest")),
        "config.json is a pipe!": lambda p: pipe(p, folder.CONFIG),
        "the manifest is a pipe!": lambda p: pipe(p, folder.MANIFEST),
        "weights are a folder!": lambda p: ((p / folder.MODEL).unlink(), (p / folder.MODEL).mkdir()),
    }
    zeros = b'{"w":{"dtype":"F32","shape":[SHAPE],"data_offsets":[0,OFFSET]}}'
    many = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000)).encode()
    bombs: dict[str, Callable[[Path], Any]] = {
        "a header that claims 2^63 bytes": lambda p: with_header(p, b"{}", 2**63),
        "a tensor that claims terabytes": lambda p: with_header(p, zeros.replace(b"SHAPE", b"1099511627776").replace(b"OFFSET", b"4398046511104")),
        "a shape whose product overflows": lambda p: with_header(p, zeros.replace(b"SHAPE", b"4294967296,4294967296,4").replace(b"OFFSET", b"0")),
        "a million empty tensors in the header": lambda p: with_header(p, b"{" + many + b"}"),
        "a header nested 100,000 deep": lambda p: with_header(p, b'{"a":' * 100_000),
        "config.json nested 100,000 deep": lambda p: (p / folder.CONFIG).write_bytes(b"[" * 100_000),
        "config.json of 64 MB": lambda p: (p / folder.CONFIG).write_bytes(b'{"a": [' + b"[]," * 21_000_000 + b"1]}"),
        "the manifest claims a petabyte!": lambda p: in_manifest(p, folder.MODEL, bytes=10**15),
        "weights of 4 TB of holes": lambda p: (sparse(p, folder.MODEL, 2**42), in_manifest(p, folder.MODEL, bytes=2**42)),
        "the manifest is 200 MB!": lambda p: (p / folder.MANIFEST).write_bytes(b" " * 200_000_000),
        "a width of a billion": lambda p: ours(p, hidden=[10**9, 10**9]),
        "a million layers": lambda p: ours(p, hidden=[8] * 40_000),
        "a number of 5,000 digits": lambda p: (p / folder.CONFIG).write_text('{"format": 1' + "0" * 5000 + "}"),
        "golden inputs for terabytes of answers": lambda p: tensor_file(p, folder.GOLDEN, {"input.0": torch.zeros(200_000, 4), "output": torch.zeros(1)}),
    }
    code: dict[str, Callable[[Path], Any]] = {
        "source.py executes on import": lambda p: source(p, shell),
        "source.py executes when Config is read": lambda p: source(p, f"import os\nclass Config: os.system('touch {canary}')\n"),
        "source.py executes in a decorator": lambda p: source(p, f"import os\n@(lambda f: os.system('touch {canary}'))\ndef evaluate(): pass\n"),
        "source.py executes in a default": lambda p: source(p, f"import os\ndef evaluate(model, config, *, n=os.system('touch {canary}')): pass\n"),
        "a compiled file beside source.py": lambda p: compiled(p, canary),
        "sitecustomize.py beside the files": lambda p: (p / "sitecustomize.py").write_text(shell),
        "torch.py beside the files": lambda p: (p / "torch.py").write_text(shell),
        "the algorithm is os": lambda p: edit(p, folder.CONFIG, algorithm="os"),
        "the algorithm is onetorch.cli": lambda p: edit(p, folder.CONFIG, algorithm="onetorch.cli"),
        "the algorithm is a path": lambda p: edit(p, folder.CONFIG, algorithm="../../evil.py"),
        "the algorithm is a list": lambda p: edit(p, folder.CONFIG, algorithm=["os", "system"]),
        "a callable in the config": lambda p: ours(p, env={"$callable": "os.system", "args": [f"touch {canary}"]}),
        "a _target_ in the config": lambda p: ours(p, _target_="os.system", command=f"touch {canary}"),
        "an environment that names a module": lambda p: ((p.parent / "evil_module.py").write_text(shell), ours(p, env="evil_module:Evil-v0")),
        "an import in a config's text": lambda p: ours(p, activation=f"__import__('os').system('touch {canary}')"),
        "escape characters in a name!": lambda p: in_manifest(p, "\x1b]0;evil\x07\x1b[2J"),
    }
    return pickles | names | links | bombs | {f"code: {name}": harm for name, harm in code.items()}


def _object_array(canary: Path) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def attempt(path: str, target: str, trusting: str) -> int:
    """In a process of its own: verify, load, get and begin from the folder; prints what happened and the peak of memory."""
    import onetorch
    import onetorch.rl.ppo
    from onetorch.share.load import weights_of

    calls: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify(folder.read(places.place(path))),
        "load": lambda: onetorch.load(path),
        "get": lambda: verify(folder.fetch(places.place(path), Path(target))),
        "from": lambda: weights_of(path),
    }
    if trusting:
        calls["verify, trusting the code"] = lambda: verify(folder.read(places.place(path)), trust.anybody)
    said = []
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for what, call in calls.items():
        try:
            call()
            said.append(f"{what}: accepted")
        except OneTorchError as error:
            said.append(f"{what}: {error}")
        gc.collect()  # an exception and its frames refer to each other, and would keep the memory of one try beside the next's
    sys.stdout.write(json.dumps({"said": said, "taken": memory("VmHWM") - before}))
    return 0


def memory(what: str) -> int:
    """Bytes, of this process: VmRSS is what it has, VmHWM the most that it had."""
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1])


def in_process(path: Path, work: Path, trusting: bool) -> dict[str, Any]:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    words = [sys.executable, __file__, "--attempt", str(path), str(work / "got"), "trusting" if trusting else ""]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, cwd=path.parent)
    try:
        return json.loads(done.stdout) | {"rc": done.returncode}
    except ValueError:
        return {"said": [done.stderr[-500:]], "taken": 0, "rc": done.returncode}


def attacks(mb: int, scratch: Path) -> dict[str, Any]:
    """Try each malicious folder; what was executed, written and taken."""
    import onetorch.rl.ppo as ppo
    from onetorch.runs.config import to_json

    OURS.update(to_json(ppo.Config()))
    canary, outside = scratch / "canary", scratch / "outside"
    outside.mkdir()
    model = sound(scratch / "large", int((mb * 1e6 / 4 / 8) ** 0.5) + 1)
    honest = in_process(model, scratch / "work", True)["taken"] / sum(f.stat().st_size for f in model.iterdir())
    rows, misses = [], []
    for name, harm in malicious(canary, outside).items():
        inner = scratch / "inner"
        shutil.rmtree(inner, ignore_errors=True)
        inner.mkdir()
        shutil.copytree(model, inner / "model", copy_function=os.link)
        for file in (inner / "model").iterdir():
            if file.name != folder.MODEL:  # only the weights stay a hard link, and nothing below writes into them
                content = file.read_bytes()
                file.unlink()
                file.write_bytes(content)
        if "weights" in name and "!" not in name:
            (inner / "model" / folder.MODEL).unlink()
        if "weights of 4 TB" in name:
            (inner / "model" / folder.MODEL).write_bytes(b"")
        harm(inner / "model")
        # Any file that a folder may not hold stays unnamed by the manifest: naming it is refused sooner.
        if not name.endswith("!") and "holes" not in name:
            seal_known(inner / "model")
        before = {p: p.lstat().st_mtime_ns for p in inner.rglob("*")}
        size = max(sum(p.lstat().st_size for p in (inner / "model").rglob("*") if "holes" not in name), mb * 10**6)
        found = in_process(inner / "model", scratch / "work", trusting=not name.startswith("code: "))
        executed = canary.exists()
        canary.unlink(missing_ok=True)
        accepted = [s for s in found["said"] if s.endswith(": accepted") and not s.startswith("from")]
        written = [str(p) for p in outside.rglob("*")] + [str(p) for p in inner.rglob("*") if before.get(p) != p.lstat().st_mtime_ns]
        left = [str(p) for p in (scratch / "work").iterdir() if p.name != "got"]
        ratio = found["taken"] / size
        bad = executed or bool(written) or bool(left) or bool(accepted) or found["rc"] != 0 or ratio > MEMORY
        rows.append({"attack": name, "said": found["said"][0].replace(f"{inner}/", "")[:200], "executed": executed, "memory": round(ratio, 3), "ok": not bad})
        if bad:
            misses.append({"attack": name, "written": written, "left": left, **found, "ratio": ratio})
        sys.stdout.write(f"{'ok  ' if not bad else 'MISS'} {ratio:5.2f}  {name}: {found['said'][0][:110]!r}\n")
        sys.stdout.flush()
    return {
        "attacks": len(rows), "executed": sum(r["executed"] for r in rows), "written_outside": sum(bool(m["written"] or m["left"]) for m in misses),
        "most_memory": max(r["memory"] for r in rows), "honest_memory": round(honest, 3), "misses": misses, "rows": rows,
    }  # fmt: skip


def seal_known(path: Path) -> None:
    """A manifest for the files that a model folder may hold."""
    strangers = [p for p in path.iterdir() if p.name not in (*folder.REQUIRED, folder.GOLDEN, folder.MANIFEST)]
    aside = path.parent / "aside"
    aside.mkdir()
    for p in strangers:
        p.rename(aside / p.name)
    seal(path)
    for p in strangers:
        (aside / p.name).rename(p)
    aside.rmdir()


def main() -> int:
    if sys.argv[1:2] == ["--attempt"]:
        return attempt(*sys.argv[2:5])
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mutate_share.json")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = str(Path(scratch) / "state")  # what this trains is nobody's own code afterwards
        first = mutants(words.mutants, words.seed, Path(scratch)) if words.mutants else None
        if first:
            sys.stdout.write(f"{first['outcomes']} in {first['seconds']} s\n" + "".join(f"MISS {m}\n" for m in first["misses"]))
        second = attacks(words.mb, Path(scratch))
    sys.stdout.write(f"{second['attacks']} malicious folders: {second['executed']} executed, {second['written_outside']} wrote outside, at most ")
    sys.stdout.write(f"{second['most_memory']:.2f} times the folder of memory; a sound one takes {second['honest_memory']:.2f}\n")
    passed = not (first and first["misses"]) and not second["misses"]
    result = {"passed": passed, "mutants": first, "malicious": second, "limit_memory": MEMORY, "torch": torch.__version__, "python": sys.version.split()[0]}
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(result, indent=1).replace(scratch + "/", "") + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

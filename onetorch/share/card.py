"""The card of a model folder: Markdown with the Hub's front matter, every sentence of it from what was recorded. What was not measured is not there."""

import json
import shlex
from typing import Any

from onetorch import __version__
from onetorch.share.rebuild import TOLERANCE

# The Hub's own names of licences; any other is "other" with its name beside it.
HUB_LICENCES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
                "mpl-2.0", "unlicense", "isc", "openrail"}  # fmt: skip


def write(provenance: dict[str, Any], entry: dict[str, Any], doc: str, where: str) -> str:
    """The text of README.md, from provenance.json and config.json; `doc` is the first line of the algorithm's file, `where` the folder's address."""
    name, ours = provenance["recipe"], provenance["algorithm"].startswith("onetorch.")
    address, trusting = shlex.quote(where), "" if ours else " --trust-code"
    again = _plain(name) if ours else f"{shlex.quote(where + '/source.py')}{trusting}"
    parts = [
        *_front_matter(provenance),
        f"# {_plain(name)}",
        "",
        f"{_plain(doc)} {_count(provenance['parameters'])} parameters, trained with onetorch {provenance['versions'].get('onetorch', __version__)}.".strip(),
        "",
        "## Results",
        "",
        *_results(provenance),
        "",
        "## Use",
        "",
        "```python",
        "import onetorch",
        f"model = onetorch.load({json.dumps(where)}{'' if ours else ', trust_code=True'})  # torch.nn.Module, eval mode",
        "```",
        "",
        f"`onetorch verify {address}{trusting}` checks every hash and what the module answers on your machine; with `--results` it evaluates the model again.",
        f"`onetorch train {again} --from {address}` goes on from these weights. Any safetensors library reads `model.safetensors`.",
        "" if ours else "The algorithm is not part of onetorch: it is `source.py`, which runs only with `--trust-code`.",
        "",
        "## How it was made",
        "",
        *_origin(provenance),
        "",
        "## Config",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _leaves(entry["config"])),
        "",
        "## Check",
        "",
        _golden(provenance["golden"]),
        "",
        "## Licence",
        "",
        f"{_plain(provenance['licence'])}"
        if provenance["licence"]
        else "None was given. Without one, nobody but its authors may use, change or pass on this model: ask them.",
    ]
    text = "\n".join(parts) + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _front_matter(provenance: dict[str, Any]) -> list[str]:
    # JSON strings are YAML strings, so nothing that stands in a name can become YAML.
    lines = ["---", "library_name: onetorch"]
    licence = provenance["licence"]
    if licence:
        known = licence.lower() in HUB_LICENCES
        lines += [f"license: {licence.lower()}"] if known else ["license: other", f"license_name: {json.dumps(licence)}"]
    algorithm = provenance["algorithm"]
    if algorithm.startswith("onetorch.rl."):
        lines.append("pipeline_tag: reinforcement-learning")
    tags = ["onetorch", provenance["recipe"]] + ([algorithm.rpartition(".")[2]] if algorithm.startswith("onetorch.") else [])
    lines.append(f"tags: {json.dumps(list(dict.fromkeys(tags)))}")
    return [*lines, "---", ""]


def _results(provenance: dict[str, Any]) -> list[str]:
    results, progress = provenance["results"], provenance["progress"]
    lines = []
    if results is None:
        lines.append("Nothing was measured of these weights.")
    else:
        lines += ["| quantity | value |", "|---|---|"]
        values = results["values"]
        for name, value in values.items():
            if not name.endswith("_ci95"):
                interval = values.get(f"{name}_ci95")
                lines.append(f"| {_cell(name)} | {_number(value)}{'' if interval is None else f' ± {_number(interval)} (95 % interval)'} |")
        options = "".join(f" --{key} {shlex.quote(str(value))}" for key, value in results["options"].items())
        how = f"{results['by']}{options and f' with `{_plain(options.strip())}`'}"
        lines += ["", f"Measured by {how}, of exactly these weights. One training run{_seed(provenance)}"]
    if progress.get("total") and progress.get("done") != progress["total"]:
        scale = progress.get("scale", 1)
        lines += ["", f"The run had done {progress['done'] * scale:,} of {progress['total'] * scale:,} {progress.get('unit', 'steps')}."]
    return lines


def _seed(provenance: dict[str, Any]) -> str:
    seed = provenance["seed"]
    return f"{'' if seed is None else f' (seed {seed})'}: it says nothing about the spread over seeds."


def _origin(provenance: dict[str, Any]) -> list[str]:
    git, hardware, cost, begun = provenance["git"], provenance["hardware"], provenance["cost"], provenance["begun_from"]
    cores = f"{hardware['cores']} cores" if "cores" in hardware else None
    changed = " with changes that were not committed; the algorithm's file as it ran is `source.py`"
    rows = {
        "command": f"`{_plain(provenance['command'])}`" if provenance["command"] else None,
        "begun": provenance["created"],
        "from": begun and f"weights of {_plain(begun.get('recipe') or 'a file')}, SHA-256 `{begun['sha256']}`",
        "commit": git and f"`{_plain(git['commit'])}`" + (changed if git["dirty"] else ""),
        "speed plan": ", ".join(f"{k} {v}" for k, v in provenance["plan"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in provenance["versions"].items()),
        "machine": ", ".join(str(p) for p in (hardware.get("processor"), cores, *hardware.get("gpus", []), hardware.get("system")) if p),
        "cost": f"{cost['seconds']:,.1f} s, {cost['cpu_seconds']:,.1f} CPU-s" if cost else None,
    }
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)]


def _golden(golden: bool) -> str:
    if not golden:
        return "The folder holds no golden outputs: what the module answers elsewhere can be held against its results only."
    limits = ", ".join(f"{str(kind).removeprefix('torch.')} {limit:g}" for kind, limit in TOLERANCE.items())
    return (
        "`golden.safetensors` holds inputs and what this module answered on the machine that wrote the folder. On yours the answers have to agree within this "
        f"share of the largest magnitude of an output: {limits}; integers exactly."
    )


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, json.dumps(value))]


def _count(number: int) -> str:
    return f"{number:,}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _cell(value)


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _cell(text: Any) -> str:
    return _plain(text).replace("|", "\\|")

"""Who may import whom. The direction of imports keeps the parts apart; this walks the package's import statements and names each that goes another way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "onetorch"
ALLOWED = {  # a part may import itself and these
    "sparse": set(),
    "runs": set(),
    "share": {"runs"},
    "rl": {"sparse", "runs"},
    "generative": {"sparse", "runs"},
    "recipes": {"rl", "generative", "runs"},
}  # cli.py and __init__.py stand above all parts
KERNELS = {"torch", "triton"}  # all that sparse takes from outside
# of the extras: only inside a function
OPTIONAL = {"mujoco", "matplotlib", "pygame", "av", "pytest", "stable_baselines3", "ray", "huggingface_hub", "sklearn", "PIL", "datasets"}


def imported(tree: ast.AST, package: str) -> list[tuple[str, str, int, bool]]:
    """(module, name or "", line, at module level) for each import in a file of `package`, as a dotted name; importlib.import_module("…") counts."""
    at_import = {id(node) for node in outside_functions(tree)}
    found = []
    for node in ast.walk(tree):
        top = id(node) in at_import
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node.lineno, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found += [(module, alias.name, node.lineno, top) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((node.args[0].value, "", node.lineno, top))
    return found


def outside_functions(tree: ast.AST):
    """The nodes whose code runs when the module is imported, `if TYPE_CHECKING` apart."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from outside_functions(node)


def violations(root: Path) -> list[str]:
    """One line for each import under `root` (a package called onetorch) that goes a way it must not."""
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        part = inside.parts[0] if len(inside.parts) > 1 else ""  # "" for cli.py and __init__.py
        package = ".".join(["onetorch", *inside.parent.parts])
        if part and part not in ALLOWED:
            found.append(f"{inside}: the part {part!r} has no place in the direction of imports")
            continue
        for module, name, line, at_import in imported(ast.parse(path.read_text(encoding="utf-8")), package):
            outer = module.split(".")[0]
            if outer == "onetorch":
                target = (module.split(".") + [name])[1]
                if part and not (target == part or target in ALLOWED[part] or (target == "__version__" and part != "sparse")):
                    found.append(f"{inside}:{line}: {part} must not import onetorch{'.' + target if target else ''}")
            elif part == "sparse" and outer not in KERNELS and outer not in sys.stdlib_module_names:
                found.append(f"{inside}:{line}: sparse must not import {outer}")
            elif at_import and outer in OPTIONAL:
                found.append(f"{inside}:{line}: {outer} is optional: import it in the function that needs it")
    return found


def test_the_package_keeps_the_direction():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("runs/a.py", "from onetorch.rl import ppo", "runs/a.py:1: runs must not import onetorch.rl"),
        ("runs/a.py", "from onetorch import generative", "runs/a.py:1: runs must not import onetorch.generative"),
        ("runs/a.py", "def f():\n    import onetorch.rl.ppo", "runs/a.py:2: runs must not import onetorch.rl"),
        ("runs/a.py", "from ..cli import main", "runs/a.py:1: runs must not import onetorch.cli"),
        ("runs/a.py", "import importlib\nimportlib.import_module('onetorch.rl.ppo')", "runs/a.py:2: runs must not import onetorch.rl"),
        ("rl/a.py", "import onetorch.generative.gpt as gpt", "rl/a.py:1: rl must not import onetorch.generative"),
        ("rl/a.py", "import onetorch", "rl/a.py:1: rl must not import onetorch"),
        ("generative/deep/a.py", "from ...rl import nets", "generative/deep/a.py:1: generative must not import onetorch.rl"),
        ("share/a.py", "from onetorch.sparse import Layout", "share/a.py:1: share must not import onetorch.sparse"),
        ("recipes/a.py", "from onetorch import cli", "recipes/a.py:1: recipes must not import onetorch.cli"),
        ("sparse/a.py", "import onetorch.runs", "sparse/a.py:1: sparse must not import onetorch.runs"),
        ("sparse/a.py", "import numpy as np", "sparse/a.py:1: sparse must not import numpy"),
        ("rl/a.py", "try:\n    import mujoco\nexcept ImportError:\n    pass", "rl/a.py:2: mujoco is optional: import it in the function that needs it"),
        ("toolbox/a.py", "", "toolbox/a.py: the part 'toolbox' has no place in the direction of imports"),
    ],
)
def test_a_planted_violation_is_named(tmp_path, file, code, complaint):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == [complaint]


def test_what_is_allowed_passes(tmp_path):
    allowed = {
        "cli.py": "from onetorch.rl import ppo\nfrom onetorch import runs, share",
        "__init__.py": "from onetorch.runs import Run",
        "rl/a.py": "import gymnasium\nfrom onetorch.runs import Run\nfrom onetorch import sparse\nfrom .b import c\ndef f():\n    import mujoco",
        "generative/a.py": "from typing import TYPE_CHECKING\nfrom onetorch import __version__, sparse\nif TYPE_CHECKING:\n    import matplotlib",
        "recipes/a.py": "from onetorch.rl import ppo\nfrom onetorch.generative import gpt",
        "share/a.py": "from onetorch.runs.errors import UsageError",
        "sparse/a.py": "import math\nimport torch.nn as nn\nfrom onetorch.sparse import b\nfrom . import c",
    }
    for file, code in allowed.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("module", ["onetorch", "onetorch.cli"])
def test_importing_the_front_door_is_light(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & (OPTIONAL | {"torch", "gymnasium"})


def test_reading_every_algorithm_imports_no_torch():
    code = "import sys; from onetorch.runs import algorithm as a; n = [a.read(name).name for name in a.builtin()]; print(*n, 'torch' in sys.modules)"
    *names, torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ppo" in names
    assert torch == "False"

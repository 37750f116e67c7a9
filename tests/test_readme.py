"""The README is true: its map names what is there, and its commands are commands."""

import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path

from onetorch import recipes
from onetorch.cli import COMMAND_HELP

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", re.sub(r"^```\w+\n.*?^```", "", README, flags=re.DOTALL | re.MULTILINE), re.DOTALL | re.MULTILINE)


def test_the_map_names_every_part():
    tree = next(block for block in BLOCKS if block.startswith("onetorch/\n"))
    named = {line.split()[0] for line in tree.splitlines()}
    parts = {f"{path.parent.name}/" for path in (ROOT / "onetorch").glob("*/__init__.py")}
    assert parts >= {"runs/", "recipes/"}
    assert parts - named == set()


def test_the_recipes_are_those_that_are_listed():
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| (.*) \|$", README, re.MULTILINE)
    assert rows == [(r.name, r.algorithm, r.reaches) for r in recipes.known().values()]


def test_the_commands_exist():
    commands = [line.split() for block in BLOCKS for line in block.splitlines() if line.startswith("./go ")]
    assert len(commands) >= 10
    assert {words[1] for words in commands} <= {*COMMAND_HELP, "test"}


def test_the_table_of_returns_is_that_of_its_files(monkeypatch):
    path = ROOT / "benchmarks" / "returns.py"
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which it adds
    spec = importlib.util.spec_from_file_location("returns", path)
    returns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(returns)
    rows = returns.table()
    assert len(rows) == 2 + len(returns.CELLS)
    # Worked out here again, for one row: Student's t at 97.5 % with two degrees of freedom is 4.303.
    got = [json.loads(file.read_text())["result"]["return"] for file in sorted(returns.FOLDER.glob("ppo-LunarLander-v3-1000000-s*.json"))]
    half = 4.3027 * statistics.stdev(got) / math.sqrt(3)
    assert len(got) == 3
    assert f"| ppo | LunarLander-v3 | 1,000,000 | {statistics.mean(got):,.1f} ± {half:,.1f} | 3 |" in "\n".join(rows)
    page = (returns.FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == returns.page(), "run `python benchmarks/returns.py --table` after a change of results"

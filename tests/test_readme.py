"""The README is true: its map names what is there, and its commands are commands."""

import re
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

"""The documentation's commands and Python do what they say: all of them are run, with fewer steps."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from onetorch import cli
from onetorch.generative import diffusion, glow, gpt, vae
from onetorch.runs import folder

DOCS = Path(__file__).parents[1] / "docs"
SMALL = "--total_steps 2048 --batch_size 1024 --num_envs 32 --plan threads=1,backend=native"  # of a training on a page


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def small(words: list[str]) -> list[str]:
    """The command with fewer steps."""
    if words[0] not in ("train", "sweep"):
        return words
    return words + SMALL.split()


def test_coming_from_spinning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = DOCS / "spinningup.md"
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    assert len(commands) == 6
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "onetorch"
        assert cli.main(small(words)) == 0, f"{line}\n{capsys.readouterr().err}"
    config = folder.read_json(tmp_path / "runs" / "first" / "config.json")["config"]
    assert (config["env"], config["seed"], config["hidden"], config["activation"]) == ("CartPole-v1", 3, [64, 64], "tanh")
    trials = sorted((c["seed"], c["hidden"]) for p in (tmp_path / "runs" / "nets").glob("*/config.json") for c in [folder.read_json(p)["config"]])
    assert trials == [(seed, hidden) for seed in (0, 10, 20) for hidden in ([32, 32], [64, 32])]
    assert (tmp_path / "runs" / "nets" / "report.html").exists()
    space: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(code.replace("10_000", "4096"), space)
    assert float(space["reward"]) == 1.0
    assert [trial.state for trial in space["trials"]] == ["done", "done"]


def test_the_page_knows_every_flag_that_is_understood() -> None:
    text = (DOCS / "spinningup.md").read_text(encoding="utf-8")
    for name, field in cli.ALIASES.items():
        assert f"`--{name}`" in text or f"`--{name} " in text or f"`--{name}:" in text, name
        assert f"`--{field}`" in text, field


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_block_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "sparse.md"
    space: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(code, space)
    assert space["layout"].density == 0.25
    assert space["layer"].weight.grad.shape == (128, 32, 32)
    assert space["q"].grad.isfinite().all()
    assert space["dynamic"].steps == 8
    patterns = space["patterns"]
    named = {name for row in re.findall(r"^\| for .*", page.read_text(encoding="utf-8"), re.M) for name in re.findall(r"`(\w+)`", row)}
    public = {name for name, f in vars(patterns).items() if callable(f) and f.__module__ == patterns.__name__ and not name.startswith("_")}
    assert public - named == {"report", "strided_order", "strided_groups", "document_groups"}
    assert named <= public


def test_generative_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of the page is there and its values are allowed; the runs themselves are other tests' business."""
    page = DOCS / "generative.md"
    commands = [shlex.split(line) for block in blocks(page, "sh") for line in block.splitlines()]
    assert len(commands) == 10
    for _, verb, recipe, *words in commands:
        while "--nproc" in words:  # these two are the command's own
            del words[words.index("--nproc") : words.index("--nproc") + 2]
            words.remove("--shard")
        several = words.index("2e-3") if verb == "sweep" else len(words)
        assert cli.main(["show", recipe, *words[:several], *words[several + 1 :]]) == 0, capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    evaluations = {option for line in re.findall(r"^`--temperature`.*", text, re.M) for option in re.findall(r"`--(\w+)`", line)}
    known = {name for family in (gpt, diffusion, vae, glow) for name in inspect.signature(family.evaluate).parameters}
    assert len(evaluations) == 9
    assert evaluations <= known

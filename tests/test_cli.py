import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onetorch import cli
from onetorch.runs import algorithm, checkpoint, folder
from onetorch.runs import run as runs

IDEA = Path(__file__).parent / "runs" / "idea.py"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


Said = tuple[int, str, str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> Said:
        code = cli.main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


WRONG = [
    ([], "trian", "there is no command 'trian' (did you mean 'train'?)"),
    (["train"], "", "train takes one recipe, got none"),
    (["train"], "pppo", "there is no recipe 'pppo' (did you mean 'ppo'?)"),
    (["train"], "nowhere.py", "there is no file nowhere.py"),
    (["train", "ppo", "gpt"], "", "train takes one recipe, got ppo gpt"),
    (["train", "ppo"], "--total_stps 3", "ppo has no field 'total_stps' (did you mean 'total_steps'?)"),
    (["train", "ppo"], "--total-stps=3", "ppo has no field 'total_stps' (did you mean 'total_steps'?)"),
    (["train", "ppo"], "--total_steps many", "--total_steps: expected int, got 'many'"),
    (["train", "ppo"], "--total_steps", "--total_steps: expected int, got nothing"),
    (["show", "ppo"], "--total_steps 1 2", "--total_steps takes one value, got 2: 1 2"),
    (["train", "ppo"], "--total_steps -5", "total_steps must be at least 1, got -5"),
    (["train", "ppo"], "--activation sliu", "--activation: expected tanh|relu|silu, got 'sliu' (did you mean 'silu'?)"),
    (["train", "ppo"], "--hidden [64,x]", "--hidden: expected int, got 'x'"),
    (["train", "ppo"], "--anneal perhaps", "--anneal: expected bool, got 'perhaps'"),
    (["train", "ppo"], "--seed 1 --seed 2", "--seed is given twice"),
    (["train", "ppo"], "-seed 1", "'-seed': options begin with two hyphens"),
    (["train", "ppo"], "--dir=", "--dir: expected a folder"),
    (["train", "ppo"], "--time_limit soon", "--time_limit: expected a time such as 90, 90s, 10m or 2h, got 'soon'"),
    (["train", "ppo"], "--dri x", "ppo has no field 'dri' (did you mean 'dir'?)"),
    (["train", "ppo"], "--explain --seed 0 1", "--explain is of one run"),
    (["show"], "gtp", "there is no recipe 'gtp' (did you mean 'gpt'?)"),
    (["resume"], "nowhere", "there is no folder nowhere"),
    (["resume"], ".", ". holds no run"),
    (["resume", "x"], "--lr 3", "resume has no option --lr"),
    (["eval"], "nowhere", "there is no folder nowhere"),
    (["runs"], "nowhere", "there is no folder nowhere"),
    (["runs"], "--all", "runs has no option --all"),
    (["list"], "everything", "list takes no word beside it, got everything"),
    (["doctor"], "me", "doctor takes no word beside it, got me"),
    (["new"], "mine", "new needs --from RECIPE"),
    (["new"], "mine --from pppo", "there is no recipe 'pppo' (did you mean 'ppo'?)"),
    (["new"], "my-idea --from ppo", "'my-idea' cannot name a Python file"),
    (["new"], "random --from ppo", "'random' is the name of a Python module"),
    (["new"], "torch --from ppo", "'torch' is the name of a Python module"),
    (["new"], "no/where --from ppo", "no/where.py: "),
]


@pytest.mark.parametrize(("words", "more", "said"), WRONG, ids=[" ".join(w) + " " + m for w, m, _ in WRONG])
def test_what_is_wrong_is_named_in_one_line_before_any_work(say: Any, words: list[str], more: str, said: str) -> None:
    code, out, err = say(*words, *more.split())
    assert code == 2
    assert out == ""
    assert err.startswith(f"onetorch: {said}")
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_help_lists_and_errors_answer_without_torch() -> None:
    lines = [["--help"], ["--version"], ["list"], ["show", "ppo"], ["show", "gpt", "--steps", "3"], ["train", "--help"], ["train", "ppo", "--help"], ["runs"]]
    lines += [[*words, *more.split()] for words, more, _ in WRONG] + [["show", str(IDEA), "--lr", "0.1"], ["new", "mine", "--from", "ppo"]]
    code = f"""
import sys
from onetorch.cli import main
for words in {lines!r}:
    main(words)
    heavy = [m for m in ("torch", "numpy", "gymnasium", "rich") if m in sys.modules]
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_show_gives_the_origin_of_every_value(say: Any, tmp_path: Path) -> None:
    code, out, _ = say("show", str(IDEA), "--lr", "1e-3", "--hidden", "[3,3]")
    assert code == 0
    table = {line.split()[0]: re.split(r"  +", line) for line in out.splitlines()[3:]}
    assert table["FIELD"] == ["FIELD", "VALUE", "ORIGIN", "TYPE", "MEANING"]
    assert table["lr"] == ["lr", "0.001", "command line", "float", "step size of SGD"]
    assert table["hidden"] == ["hidden", "[3,3]", "command line", "[int, ...]", "widths"]
    assert table["steps"] == ["steps", "40", "default", "int", "optimizer steps"]


def test_a_recipes_own_values_are_shown_as_its_own_and_kept_by_new(say: Any) -> None:
    _, out, _ = say("show", "gpt-shakespeare", "--seed", "5")
    table = {line.split()[0]: re.split(r"  +", line) for line in out.splitlines()[3:]}
    assert table["context"][1:3] == ["64", "recipe gpt-shakespeare"]
    assert table["seed"][1:3] == ["5", "command line"]
    code, out, _ = say("new", "mine", "--from", "gpt-shakespeare")
    assert (code, out) == (0, "mine.py is yours. Train it: onetorch train mine.py\n")
    made, recipe = algorithm.read(Path("mine.py")), cli._resolve("gpt-shakespeare", {})
    assert repr(made.Config()) == repr(recipe.config)
    assert made.docs == recipe.source.docs
    assert say("new", "mine", "--from", "ppo")[0] == 2
    assert "gpt-shakespeare" in Path("mine.py").read_text().splitlines()[0]


def test_from_nothing_to_a_trained_idea_and_back(say: Any) -> None:
    assert say("new", "mine", "--from", str(IDEA))[0] == 0
    code, out, err = say("train", "mine.py", "--steps", "5", "--hidden", "[3]", "--dir", "a b/c")
    assert code == 0
    assert "run: a b/c" in out
    assert "again: onetorch train mine.py --steps 5 --hidden '[3]'" in out
    assert err.startswith("run: a b/c  (onetorch train ")
    assert {p.name for p in Path("a b/c").iterdir()} >= {"config.json", "run.json", "metrics.jsonl", "checkpoints", "media", "report.html", "source.py"}
    error = re.search(r"error (\S+)", out)

    code, out, _ = say("runs", "a b")
    assert code == 0
    assert re.search(r"a b/c +done +5 of 5 steps \(100 %\) +error \S+ batches 4 +\d+\.\d s, \d+\.\d CPU-s", out)
    code, out, _ = say("resume", "a b/c")
    assert code == 0
    assert "a b/c is done: 5 of 5 steps (100 %), error" in out

    Path("mine.py").unlink()  # a run's folder is enough
    code, out, _ = say("eval", "a b/c", "--batches", "4")
    assert code == 0
    assert error is not None
    assert f"error    {error[1]}" in out
    entry = folder.read_json(Path("a b/c/eval.json"))
    assert entry["options"] == {"batches": 4}
    assert f"{entry['results']['error']:.5g}" == error[1]
    assert Path("a b/c/media/samples.txt").exists()
    for words, said in ((["--batch", "3"], "eval of source has no option --batch (did you mean 'batches'?)"), (["--batches", "x"], "expected int, got 'x'")):
        code, out, err = say("eval", "a b/c", *words)
        assert code == 2
        assert said in err

    code, _, err = say("train", str(IDEA), "--dir", "a b/c")
    assert code == 2
    assert "already holds a run; `onetorch resume 'a b/c'` goes on with it" in err
    Path("a b/c").rename("a b/idea")
    assert say("resume", "a b/ide")[2] == "onetorch: there is no folder a b/ide (did you mean 'idea'?)\n"


def test_a_run_without_a_folder_gets_one_of_its_own(say: Any) -> None:
    for _ in range(2):
        assert say("train", str(IDEA), "--steps", "2")[0] == 0
    names = os.listdir("runs")
    assert len(names) == 2
    assert all(re.fullmatch(r"idea-[0-9a-f]{6}", name) for name in names)


def test_nan_is_exit_code_3_with_step_and_last_good_checkpoint(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "CHECKPOINT_SHARE", float("inf"))
    code, _, err = say("train", str(IDEA), "--break_at", "3", "--checkpoint_seconds", "0", "--dir", "r")
    assert code == 3
    assert "onetorch: loss is nan in iteration 3: the weights were not changed by it; the last good checkpoint is r/checkpoints/00000002\n" in err
    assert checkpoint.steps(Path("r/checkpoints")) == [2, 1]
    _, out, _ = say("runs", ".")
    assert re.search(r"r +failed +\d+ of 40 steps", out)
    assert say("resume", "r")[0] == 3  # the same again, and nothing is lost
    assert checkpoint.steps(Path("r/checkpoints")) == [2, 1]


def test_a_fault_in_an_idea_shows_where_and_is_exit_code_3(say: Any) -> None:
    Path("mine.py").write_text(IDEA.read_text().replace("optimizer.step()", "optimizer.leap()"))
    code, _, err = say("train", "mine.py", "--dir", "r")
    assert code == 3
    assert "optimizer.leap()" in err
    assert "onetorch: AttributeError: 'SGD' object has no attribute 'leap'" in err
    assert "onetorch: the run in r failed\n" in err
    assert json.loads(Path("r/run.json").read_text())["status"] == "failed"
    Path("mine.py").write_text(IDEA.read_text().replace("import torch\n", "import torch\nimport nowhere_at_all\n", 1))
    code, _, err = say("train", "mine.py", "--dir", "s")
    assert (code, err) == (2, f"onetorch: {Path.cwd()}/mine.py:9 does not import: ModuleNotFoundError: No module named 'nowhere_at_all'\n")
    assert not Path("s").exists()


def test_a_wrong_plan_leaves_no_folder(say: Any) -> None:
    for text in ("threads", "threads=1"):
        code, _, err = say("train", str(IDEA), "--plan", text, "--dir", "r")
        assert code == 2
        assert "--plan" in err
        assert not Path("r").exists()


def test_a_stopped_run_says_how_to_go_on(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = runs.Run.log

    def log(self: runs.Run, step: int, **values: Any) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", log)
        code, out, err = say("train", str(IDEA), "--dir", "r")
    assert (code, out) == (130, "")
    assert "stopped (SIGINT came) after 7 of 40 steps (17 %); onetorch resume r goes on\n" in err
    assert re.search(r"r +stopped +7 of 40", say("runs", ".")[1])
    code, out, err = say("resume", "r")
    assert code == 0
    assert "goes on from r/checkpoints/00000007" in err
    assert [row["step"] for row in folder.rows(Path("r"))] == list(range(1, 41))


def test_the_time_limit_stops_with_exit_code_0(say: Any) -> None:
    code, _, err = say("train", str(IDEA), "--pause", "0.05", "--time-limit", "0.2s", "--dir", "r")
    assert code == 0
    assert "stopped (the time limit is reached) after" in err


def test_runs_names_what_is_damaged_and_lists_the_rest(say: Any) -> None:
    for name in ("a", "b", "c"):
        assert say("train", str(IDEA), "--steps", "1", "--dir", f"runs/{name}")[0] == 0
    Path("runs/a/run.json").write_text("{")
    Path("runs/b/run.json").write_text('{"format": 1, "progress": []}')
    shutil.copytree("runs/c", "runs/d")
    record = json.loads(Path("runs/d/run.json").read_text())
    Path("runs/d/run.json").write_text(json.dumps(record | {"status": "running"}))
    code, out, _ = say("runs")
    assert code == 0
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert states == {"runs/a": "damaged", "runs/b": "damaged", "runs/c": "done", "runs/d": "killed"}
    assert "run.json is damaged" in out


def test_doctor_tells_what_is_here(say: Any) -> None:
    code, out, _ = say("doctor")
    assert code == 0
    assert {"python", "onetorch", "torch", "processor", "gpu", "compiler", "disk"} <= {line.split()[0] for line in out.splitlines()}


def test_a_reader_that_has_gone_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m onetorch show ppo | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_bools_are_flags(tmp_path: Path) -> None:
    values = {text: cli._resolve("ppo", cli._split(text.split())[1]).config.anneal for text in ("--anneal", "--no-anneal", "--anneal off", "--anneal=true")}
    assert values == {"--anneal": True, "--no-anneal": False, "--anneal off": False, "--anneal=true": True}


def test_a_field_must_not_hide_a_run_option(say: Any) -> None:
    Path("mine.py").write_text(IDEA.read_text().replace("pause: float", "plan: float"))
    code, _, err = say("show", "mine.py")
    assert code == 2
    assert "the field plan has the name of a run option" in err


def test_a_path_from_the_command_line_holds_from_everywhere(say: Any) -> None:
    assert cli._resolve("glow", {"data": ["hf:some/set"]}).config.data == Path("hf:some/set")  # no file
    resolved = cli._resolve("gpt", {"data": ["some/text.txt"]})
    assert resolved.config.data == Path.cwd() / "some" / "text.txt"
    assert resolved.given == ["--data", "some/text.txt"]


def test_explain_says_where_the_time_went(say: Any) -> None:
    words = ("ppo", "--total_steps", "2048", "--batch_size", "512", "--num_envs", "8", "--dir", "run", "--plan", "threads=1,backend=native", "--explain")
    code, out, _ = say("train", *words)
    assert code == 0
    table = {row.split()[0]: row.split() for row in out.splitlines()[:7]}
    assert table.keys() == {"PHASE", "environment", "action", "update", "logging", "rest", "all"}
    recorded = folder.read_json(Path("run/run.json"))["phases"]
    seconds = {name: float(row[1]) for name, row in table.items() if name != "PHASE"}
    assert seconds["all"] == pytest.approx(sum(recorded.values()), abs=0.01)
    assert {name: seconds[name] for name in recorded} == pytest.approx(recorded, abs=0.006)
    ceiling = float(table["environment"][6].replace(",", ""))
    assert 10_000 < ceiling < 1e8  # eight batched CartPoles alone
    assert float(table["all"][5].replace(",", "")) < ceiling


ON_POLICY = "--env CartPole-v1 --total_steps 2048 --batch_size 512 --plan threads=1,backend=native,num_envs=8"
OFF_POLICY = "--total_steps 400 --random_steps 20 --update_after 20 --batch_size 8 --hidden 16 --plan threads=1,dtype=float32"
ONE_WAY = "threads=1,dtype=float32,attention=explicit"
ACTING = {"environment", "action", "update", "logging"}
LEARNING = {"batch", "gradient", "update", "evaluation", "logging"}


@pytest.mark.parametrize(
    ("recipe", "words", "phases"),
    [
        ("vpg", ON_POLICY, ACTING),
        ("trpo", ON_POLICY, ACTING),
        ("sac", OFF_POLICY, ACTING),
        ("td3", OFF_POLICY, ACTING),
        ("ddpg", OFF_POLICY, ACTING),
        ("dqn", "--total_steps 256 --update_after 64 --plan threads=1,backend=native", ACTING | {"replay"}),
        ("gpt", "--data text --steps 3 --batch 4 --context 16 --width 24 --ngram_rows 50 --plan " + ONE_WAY, LEARNING),
        ("diffusion", "--steps 3 --batch 8 --width 16 --depth 1 --heads 2 --eval_samples 8 --sample_steps 2 --warmup 1 --plan " + ONE_WAY, LEARNING),
    ],
)
def test_every_algorithm_says_where_its_time_goes(recipe: str, words: str, phases: set[str], say: Any) -> None:
    Path("text").write_text("so much depends upon a red wheel barrow " * 100)
    code, out, err = say("train", recipe, *words.split(), "--dir", "run", "--explain")
    assert code == 0, err
    lines = out.splitlines()
    table = {line.split()[0]: line.split() for line in lines[1 : len(phases) + 3]}
    assert table.keys() == phases | {"rest", "all"}
    seconds = folder.read_json(Path("run/run.json"))["phases"]  # the table rounds to hundredths
    assert seconds.keys() == phases | {"rest"}
    assert seconds["rest"] < 0.5 * sum(seconds.values())  # most of the time has a name
    if phases == LEARNING:
        limit = re.search(r"([\d,]+) steps/s, the FLOPs of its model at the ([\d,]+) GFLOP/s", next(line for line in lines if line.startswith("gradient")))
        assert limit
        assert float(limit[1].replace(",", "")) > float(table["all"][5].replace(",", ""))
    else:
        assert "GFLOP/s" not in "".join(lines[: len(phases) + 3])  # nothing counted them
    if recipe in ("vpg", "trpo", "dqn"):
        assert "the environments alone" in next(line for line in lines if line.startswith("environment"))


def test_explain_of_an_algorithm_without_phases_says_so(say: Any) -> None:
    code, out, _ = say("train", str(IDEA), "--steps", "2", "--dir", "run", "--explain")
    assert code == 0
    assert out.startswith("no phases")

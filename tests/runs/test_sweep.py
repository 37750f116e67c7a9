"""Sweeps: the grid and the identity of a trial by hand; then real sweeps, undisturbed, killed in every way, and on a cluster."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from onetorch import cli
from onetorch.runs import folder, nursery, sweep, sweep_view
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.run import Run

HERE = Path(__file__).parent
IDEA, ODD = HERE / "idea.py", HERE / "odd.py"
PATIENCE = 60.0  # seconds until something that must happen has to have happened


def onetorch(*words: object, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "onetorch", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def until(happened, what: str):
    deadline = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE:.0f} s"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    return []


def weights(trial: Path) -> str:
    """The SHA-256 of the weights in the trial's newest checkpoint."""
    last = max((trial / "checkpoints").glob("[0-9]*"))
    return json.loads((last / "manifest.json").read_bytes())["files"]["model.safetensors"]["sha256"]


def rows(trial: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(trial)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No runs of this checkout are listed, no plan of this user's is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CUDA_VISIBLE_DEVICES", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


# -- the grid ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (["0..4"], int, [0, 1, 2, 3, 4]),
        (["-2..1", "7"], int, [-2, -1, 0, 1, 7]),
        (["3..3"], int | None, [3]),
        (["1e-3", "3e-4"], float, [0.001, 0.0003]),
        (["[64,64]", "[8]"], tuple[int, ...], [(64, 64), (8,)]),
        (["none", "1"], int | None, [None, 1]),
        (["0..4"], str, ["0..4"]),  # a text is what it is
        (["true", "false"], bool, [True, False]),
    ],
)
def test_words_become_values_of_the_field(words, kind, expected):
    found = sweep.values(words, kind)
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["sweep", IDEA, "--lr", "0.1", "fast"], "--lr: expected float, got 'fast'"),
        (["sweep", IDEA, "--lrr", "0.1", "0.2"], f"idea has no field 'lrr' (did you mean 'lr'?); `onetorch show {'idea'}` lists them"),
        (["sweep", IDEA, "--lr", "0.1", "1e-1"], "--lr: 0.1 is given twice"),
        (["sweep", IDEA, "--seed", "0..3", "2"], "--seed: 2 is given twice"),
        (["sweep", IDEA, "--seed", "4..0"], "--seed: 4..0 is empty: a range goes from the smaller to the larger, both included"),
        (["sweep", IDEA, "--steps", "5", "0"], "--steps 0: steps must be at least 1, got 0"),
        (["sweep", IDEA, "--hidden", "64", "32"], "--hidden: expected lists such as [64,64] [32], got '64'"),
        (["sweep", IDEA, "--seed", "0..3", "--slots", "0"], "--slots: expected a number of trials at a time, at least 1, got 0"),
        (["sweep", IDEA, "--seed", "0..3", "--slots", "two"], "--slots: expected a number of trials at a time, got 'two'"),
        (["sweep", IDEA, "--seed", "0..3", "--on", "slurm"], "--on: expected ray or ray:ADDRESS, got 'slurm'"),
        (["sweep", IDEA, "--seed", "0..3", "--plan", "threads"], "--plan: expected name=value,name=value, got 'threads'"),
        (["sweep", "ppq", "--seed", "0..3"], "there is no recipe 'ppq' (did you mean 'ppo'?); `onetorch list` shows them"),
        (["sweep", "--seed", "0..3"], "sweep takes one recipe, got none; `onetorch sweep --help`"),
        (["train", IDEA, "--lr", "0.1", "fast"], "--lr: expected float, got 'fast'"),
    ],
)
def test_every_value_is_checked_before_anything_starts(words, complaint, capsys, tmp_path):
    assert cli.main(list(map(str, words))) == 2
    said = capsys.readouterr()
    assert said.err == f"onetorch: {complaint}\n"
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_is_named_without_waiting_for_torch():
    words = ["sweep", str(IDEA), "--lr", "1", "x", "--plan", "a=1"]
    code = f"import sys; from onetorch import cli; assert cli.main({words}) == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_identity_of_a_trial_is_its_content():
    def ids(grid, **how):
        source = sweep.algorithm.read(IDEA)
        made = sweep.design(source, source.Config(), grid, recipe="idea", target="idea.py", **how)
        assert all(t.folder == made.folder / t.id for t in made.trials)
        return {tuple(sorted(t.values.items())): t.id for t in made.trials}, made.folder

    one, where = ids({"lr": [0.1, 0.2], "seed": [0, 1]})
    other, there = ids({"seed": [1, 0], "lr": [0.2, 0.1]})
    assert one == other
    assert where == there
    assert where.name.startswith("sweep-idea-")
    assert len(set(one.values())) == 4
    assert not set(one.values()) & set(ids({"lr": [0.1, 0.2], "seed": [0, 1]}, plan={"threads": "1"})[0].values())
    # SHA-256 of the JSON by hand: recipe, config with sorted keys, plan.
    config = {"break_at": 0, "hidden": [8], "lr": 0.1, "pause": 0.0, "seed": 0, "steps": 40}
    text = json.dumps(["idea", config, {}], separators=(",", ":"))
    assert one[(("lr", 0.1), ("seed", 0))] == hashlib.sha256(text.encode()).hexdigest()[:10]


def test_a_forecast_is_the_median_of_the_likest_runs_in_proportion_to_length():
    def past(seconds, **config):
        return sweep_view.Past({"lr": 0.1, "width": 8, "seed": 0, "steps": 100, **config}, seconds)

    known = [past(10.0), past(12.0, seed=1), past(40.0, seed=2), past(1000.0, width=64), past(30.0, width=64, steps=10)]
    assert sweep_view.estimate({"lr": 0.1, "width": 8, "seed": 9, "steps": 300}, known) == 36.0  # 3 x the median of 10, 12, 40
    assert sweep_view.estimate({"lr": 0.1, "width": 64, "seed": 9, "steps": 100}, known) == 650.0  # of 1000 and 300
    assert sweep_view.estimate({"lr": 0.7, "width": 8, "seed": 9, "steps": 100}, known) == 12.0
    assert sweep_view.estimate({"lr": 0.1}, []) is None


def test_slots_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6, 7})

    def shares(slots, trials, **plan):
        return [(s["threads"], s["cores"], s["gpu"]) for s in sweep._shares(slots, trials, plan)[0]]

    assert shares(None, 3) == [(2, [0, 1], None), (2, [2, 3], None), (2, [4, 5], None)]
    assert len(shares(None, 100)) == 8
    assert shares(2, 100) == [(4, [0, 1, 2, 3], None), (4, [4, 5, 6, 7], None)]
    assert shares(None, 100, threads="4") == shares(2, 100)
    assert shares(4, 100, threads="4") == [(4, None, None)] * 4  # asked for more than there are: nobody is bound
    assert len(shares(12, 100)) == 12
    assert shares(12, 100)[9] == (1, [1], None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [gpu for *_, gpu in shares(None, 100)] == ["5", "3"]
    assert [gpu for *_, gpu in shares(4, 100)] == ["5", "3", "5", "3"]
    assert [gpu for *_, gpu in shares(2, 100, device="cpu")] == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [gpu for *_, gpu in shares(2, 100)] == [None, None]


def test_the_gpus_of_the_driver_are_counted_without_torch(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho 'GPU 1: X (UUID: b)'\necho '  MIG 1g'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep.gpus() == ["0", "1"]


# -- real sweeps -------------------------------------------------------------------------------------------------------------------------------


def test_64_trials_on_a_terminal_then_the_same_command_again(tmp_path):
    words = [sys.executable, "-m", "onetorch", "sweep", str(IDEA), "--lr", "0.05", "0.01", "--seed", "0..15", "--hidden", "[4]", "[4,4]", "--dir", "s"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
    env = dict(os.environ)  # not the C library's own, in which readline sets COLUMNS
    process = subprocess.Popen([*words, "--steps", "5"], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # EIO: the terminal's last user has left
        while chunk := os.read(ours, 1 << 16):
            screen += chunk
    os.close(ours)
    assert process.wait() == 0
    text = screen.decode()
    assert "64 trials in s" in text
    assert "forecast: no finished run of idea on this machine is known" in text
    assert "(from the first trial)" in text
    last = text.rpartition("trial ")[2]  # the table as it stays: every trial, each in its line
    trials = [path.parent for path in Path("s").glob("*/config.json")]
    assert len(trials) == 64
    assert all(last.count(path.name) == 1 for path in trials)
    assert "64 done" in last

    records = {path: (path / "run.json").read_bytes() for path in trials}
    pids = {json.loads(text)["pid"] for text in records.values()}
    assert len(pids) == 64  # each trial was a process of its own
    assert all(json.loads(text)["status"] == "done" for text in records.values())
    # Any of them is what `train` with the words in its record makes.
    path = trials[0]
    again = shlex.split(json.loads(records[path])["command"])
    assert again[:2] == ["onetorch", "train"]
    assert cli.main([*again[1:], "--dir", "alone"]) == 0
    assert weights(path) == weights(Path("alone"))
    assert rows(path) == rows(Path("alone"))

    # The same in another order: nothing is left to do, so nothing is started and nothing touched.
    second = onetorch("sweep", IDEA, "--hidden", "[4,4]", "[4]", "--seed", "15", "0..14", "--lr", "0.01", "0.05", "--steps", 5, "--dir", "s")
    out, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, err
    assert "64 done before" in err
    assert "64 of 64 done" in out
    assert {p: (p / "run.json").read_bytes() for p in trials} == records


def test_what_a_trial_is_given_and_how_it_may_end(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    hows = ["well", "raises", "nan", "segfault", "killed once", "fails once", "leaves", "refuses", "prints"]
    trials = {t.values["how"]: t for t in sweep.run(ODD, {"how": hows, "child": True}, dir="s", slots=2, checkpoint_seconds=0.0)}
    ended = {how: (t.state, t.why.partition(";")[0]) for how, t in trials.items()}
    assert ended == {
        "well": ("done", ""),
        "prints": ("done", ""),
        "killed once": ("done", ""),  # a trial that was killed goes on in the same command
        "raises": ("failed", "'a fault of the algorithm'"),
        "fails once": ("failed", "the disk hiccups"),
        "nan": ("failed", "loss is nan in iteration 2: the weights were not changed by it"),
        "segfault": ("done", ""),
        "leaves": ("failed", "it left with code 0 before it was done"),
        "refuses": ("failed", "this cannot be built"),
    }
    given = {how: json.loads((t.folder / "media" / "given.json").read_bytes()) for how, t in trials.items()}
    cores = os.sched_getaffinity(0)
    width = max(1, len(cores) // 2)
    assert len({g["pid"] for g in given.values()}) == len(hows)
    assert {g["gpu"] for g in given.values()} == {"6", "7"}
    assert all(len(g["cores"]) == width and set(g["cores"]) <= cores for g in given.values())
    assert all(g["threads"] == g["plan"] <= width for g in given.values())
    assert all(g["main"] and g["handlers"] == [True, True] for g in given.values())
    until(lambda: not any(alive(g["child"]) for g in given.values()), "the end of what the trials had started")
    assert (trials["prints"].folder / "output.txt").read_text().count("to standard") == 2
    assert "Traceback" in (trials["raises"].folder / "output.txt").read_text()
    said = capfd.readouterr().err
    assert "killed, by SIGKILL" in said
    assert "killed, by SIGSEGV" in said
    assert "Traceback" not in said

    monkeypatch.setattr(sweep, "ATTEMPTS", 1)
    before = {how: (t.folder / "run.json").read_bytes() for how, t in trials.items() if t.state == "done"}
    second = {t.values["how"]: t for t in sweep.run(ODD, {"how": hows, "child": True}, dir="s", slots=2, checkpoint_seconds=0.0)}
    assert second["fails once"].state == "done"  # tried once more
    assert second["raises"].state == second["nan"].state == second["leaves"].state == "done"  # they go on behind the place of the accident
    assert second["refuses"].state == "failed"
    assert before == {how: (trials[how].folder / "run.json").read_bytes() for how in before}
    said = capfd.readouterr().err
    assert all(words in said for words in ("4 done before", "4 to be tried once more", "1 to go on"))


def test_killed_refused_and_resumed(tmp_path):
    words = ["sweep", IDEA, "--seed", "0..5", "--steps", 60, "--pause", 0.05, "--dir", "s", "--slots", 3, "--checkpoint_seconds", 0.2]
    first = onetorch(*words)

    def running() -> dict[int, Path]:
        found = {}
        for path in Path("s").glob("*/run.json"):
            record = json.loads(path.read_bytes())
            if record["status"] == "running" and alive(record["pid"]):
                found[record["pid"]] = path.parent
        return found

    def saved(count: int) -> bool:
        return len(running()) == 3 and sum(any((p / "checkpoints").glob("[0-9]*")) for p in running().values()) >= count

    until(lambda: saved(3), "three trials with checkpoints")
    # While it runs, a second one is refused.
    second = onetorch(*words)
    _, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert err.startswith(f"onetorch: s is in use by process {first.pid} on ")
    # One trial is killed: the others do not notice.
    pids = running()
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    until(lambda: not alive(victim), "the end of the killed trial")
    others = [pid for pid in pids if pid != victim]
    assert all(map(alive, others))
    # Then the process that forks them: its children go with it, and another takes its place.
    (nest,) = children(first.pid)
    os.kill(nest, signal.SIGKILL)
    until(lambda: not any(map(alive, others)), "the end of the trials of the killed nursery")
    until(lambda: saved(3), "three trials that go on")
    # Then the sweep itself: nothing of it is left.
    family = [*children(first.pid), *running()]
    assert len(family) == 4
    first.kill()
    first.communicate()
    until(lambda: not any(map(alive, family)), "the end of every process of the killed sweep")

    # A file that changed is refused, and so is another plan; the folder alone is enough to go on.
    changed = tmp_path / "idea.py"
    changed.write_text(IDEA.read_text() + "# changed\n")
    with pytest.raises(UsageError, match=r"s cannot go on: .*idea.py has changed since it was begun"):
        sweep.run(changed, {"seed": [0]}, dir="s")
    with pytest.raises(UsageError, match="its plan is measured, not threads=1"):
        sweep.run(IDEA, {"seed": [0]}, dir="s", plan={"threads": 1})
    last = onetorch("resume", "s")
    out, err = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, err
    assert "6 of 6 done" in out
    assert " to go on" in err
    disturbed = {t.values["seed"]: t.folder for t in sweep.load(Path("s")).trials}
    assert [row["step"] for row in rows(disturbed[0])] == list(range(1, 61))
    module = sweep.algorithm.read(IDEA).load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed, trial in disturbed.items():
        alone = Path("alone") / str(seed)
        with Run(alone, module.Config(seed=seed, steps=60), quiet=True) as run:
            module.train(run.config, run)
        assert weights(alone) == weights(trial)
        assert rows(alone) == rows(trial)
    torch.set_num_threads(threads)


def test_train_with_several_values_is_told_to_stop_and_listed(capsys):
    number = signal.SIGINT
    # two trials, which run at once on two cores too
    process = onetorch("train", IDEA, "--seed", "0..1", "--pause", 0.1, "--steps", 1000, "--dir", "runs/mine")
    until(lambda: len(list(Path("runs/mine").glob("*/metrics.jsonl"))) == 2, "two trials")
    until(lambda: all(p.stat().st_size for p in Path("runs/mine").glob("*/metrics.jsonl")), "two trials that log")
    assert cli.main(["runs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert listed[1].split()[:5] == ["runs/mine", "running", "0", "of", "2"]
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert "with 0 of 2 trials done; the same command goes on, and so does `onetorch resume runs/mine`" in err
    outputs = [p.read_text() for p in Path("runs/mine").glob("*/output.txt")]
    assert "Traceback" not in err + "".join(outputs)
    assert [f"stopped: {number.name} came" in text for text in outputs] == [True] * 2
    for path in Path("runs/mine").glob("*/run.json"):  # what was logged is saved
        done = json.loads(path.read_bytes())["progress"]["done"]
        assert (path.parent / "checkpoints" / f"{done:08d}").is_dir()
        assert rows(path.parent)[-1]["step"] == done
    assert cli.main(["runs", "runs/mine"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  seed={seed}  " in listed for seed in range(2))
    assert listed.count("stopped") == 2


def test_a_gpu_that_the_import_woke_makes_each_trial_an_interpreter_of_its_own(tmp_path):
    # What torch says in a child that was forked from a process that used CUDA.
    bad = tmp_path / "bad.py"
    bad.write_text(ODD.read_text() + "\nhere = os.getpid()\ntorch.cuda._is_in_bad_fork = lambda: os.getpid() != here\n")
    (trial,) = sweep.run(bad, {"how": "well"}, dir="s", quiet=True)
    assert (trial.state, trial.why) == ("done", "")
    assert json.loads((trial.folder / "run.json").read_bytes())["pid"] == json.loads((trial.folder / "media" / "given.json").read_bytes())["pid"]


def test_an_algorithm_that_does_not_import_is_named_once(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(IDEA.read_text().replace("import itertools", "raise RuntimeError('no')\nimport itertools"))
    with pytest.raises(UsageError, match=r"broken.py:\d+ does not import: RuntimeError: no"):
        sweep.run(broken, {"seed": [0, 1]}, dir="s", quiet=True)
    dying = tmp_path / "dying.py"
    dying.write_text(IDEA.read_text().replace("import itertools", "import os\nos.kill(os.getpid(), 11)\nimport itertools"))
    with pytest.raises(RunError, match=r"the process that starts the trials died with code -11 while it imported .*dying.py"):
        sweep.run(dying, {"seed": [0, 1]}, dir="t", quiet=True)


def test_folders_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"full is not empty \(thesis.tex stands in it\)"):
        sweep.run(IDEA, {"seed": [0, 1]}, dir="full")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file"):
        sweep.run(IDEA, {"seed": [0, 1]}, dir="file")
    with pytest.raises(UsageError, match=r"idea has no field 'sed' \(did you mean 'seed'\?\)"):
        sweep.run(IDEA, {"sed": [0, 1]})
    with pytest.raises(UsageError, match=r"lr: expected float, got '0\.1'"):
        sweep.run(IDEA, {"lr": ["0.1"]})


def test_a_forged_sweep_is_refused(tmp_path):
    made = tmp_path / "s"
    made.mkdir()
    trials = [{"id": "../../x", "values": {}, "config": {"seed": 0, "steps": 40, "lr": 0.05, "hidden": [8], "pause": 0.0, "break_at": 0}}]
    entry = {"format": 1, "recipe": "idea", "target": "idea.py", "algorithm": "source.py", "options": {"plan": {}}, "trials": trials}
    shutil.copy(IDEA, made / "source.py")
    (made / "sweep.json").write_text(json.dumps(entry))
    with pytest.raises(RunError, match="another config than its id says"):
        sweep.load(made)
    (made / "sweep.json").write_text(json.dumps(entry | {"algorithm": "os"}))
    with pytest.raises(UsageError, match="there is no algorithm 'os'"):
        sweep.load(made)


def test_the_order_of_a_trial_survives_the_socket():
    order = nursery.Order("a", "/f", {"x": 1}, ["onetorch"], {"threads": "1"}, 2, [0, 1], "3", 0.5)
    assert nursery.Order(**json.loads(json.dumps(order.__dict__))) == order


@pytest.mark.slow
def test_on_a_ray_cluster_one_node_of_which_is_killed(tmp_path):
    pytest.importorskip("ray", reason="needs the extra `cluster`: pip install 'onetorch[cluster]'")
    # In a process of its own: Ray leaves threads and warnings in whoever connects.
    code = f"""
import json, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from onetorch.runs import sweep

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()

def kill():
    while sum(any((p / "checkpoints").glob("[0-9]*")) for p in Path("s").glob("*/")) < 3:
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)

killer = threading.Thread(target=kill)
killer.start()
trials = sweep.run({str(IDEA)!r}, {{"seed": range(5), "pause": 0.1, "steps": 50}}, dir="s", on=f"ray:{{cluster.address}}", checkpoint_seconds=0.3)
killer.join()
cluster.shutdown()
print(json.dumps([t.state for t in trials]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["done"] * 5
    assert "killed, by SIGKILL" in done.stderr
    resumed = [p for p in Path("s").glob("*/run.json") if "resumed" in json.loads(p.read_bytes())]
    assert len(resumed) == 1  # of three that ran, the one on the node that died
    here = sweep.run(IDEA, {"seed": range(5), "pause": 0.0, "steps": 50}, dir="t", quiet=True)
    there = {json.loads((p / "config.json").read_bytes())["config"]["seed"]: p for p in Path("s").iterdir() if (p / "config.json").exists()}
    assert [weights(t.folder) for t in here] == [weights(there[t.values["seed"]]) for t in here]

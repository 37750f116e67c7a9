"""A run in two processes on this machine, over gloo: the same losses as in one, and on with the other number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onetorch import cli
from onetorch.runs import checkpoint, distributed, folder

PATIENCE = 300  # seconds that a process may take on a busy machine
SCRIPT = """
import sys
from pathlib import Path
from onetorch.generative import gpt
from onetorch.runs import distributed, follower, plan, run

place, where, text, stop, how, shard = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
if place != "alone":
    distributed.join(place, shard == "shard")
config = gpt.Config(data=text, steps=6, batch=4, context=16, layers=1, heads=2, width=16, ngram_rows=50, ngram_width=8, eval_every=3, eval_windows=4,
                    base_width=None, base_batch=None, eval_samples=1, accumulate=2, ema=(0.9,), clip=1.0)
kind = follower.Follower if distributed.rank() else run.Run
own = kind(where, config, resume=how == "resume", fixed=plan.parse("threads=1,dtype=float32,attention=explicit"), checkpoint_seconds=0, quiet=True)
run.CHECKPOINT_SHARE = 1e9  # every step is saved
class Told(Exception): pass
save = own.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        raise Told
own.checkpoint = checkpoint
try:
    with own:
        model = gpt.train(config, own)
        if distributed.rank() == 0:  # alone: what training gives back can be used without the others
            assert gpt.score(model, gpt.data.read(text)[-500:]).loss < 5.3
except Told:
    pass
distributed.leave()
distributed.end(0)
"""


def text_file(where: Path) -> Path:
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not ", "that ", "is ", "the ", "question.\n"], 3000)
    (where / "text.txt").write_text("".join(words), encoding="utf-8")
    return where / "text.txt"


def work(count: int, tmp_path: Path, name: str, stop: int = 0, how: str = "new", shard: bool = False) -> None:
    store = tmp_path / f"store-{name}-{how}-{stop}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    places = [f"{i},{count},{store}" for i in range(count)] if count > 1 else ["alone"]
    words = [str(tmp_path / name), str(tmp_path / "text.txt"), str(stop), how, "shard" if shard else "all"]
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", SCRIPT, place, *words], env=environment) for place in places]
    assert [p.wait(PATIENCE) for p in processes] == [0] * count


def rows(where: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(where)]


def shapes(saved: checkpoint.Checkpoint) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (saved.model, saved.state)]


@pytest.mark.parametrize("chain", [[(2, True), (2, True), (1, False)], [(1, False), (2, False), (2, True)]])
def test_a_run_goes_on_with_other_processes_and_the_same_losses(chain: list[tuple[int, bool]], tmp_path: Path) -> None:
    """Two steps by each of (processes, sharded) are six steps of one process."""
    text_file(tmp_path)
    work(1, tmp_path, "one")
    for i, (count, shard) in enumerate(chain, 1):
        work(count, tmp_path, "chain", stop=2 * i, how="new" if i == 1 else "resume", shard=shard)
        saved = checkpoint.load(tmp_path / "chain" / "checkpoints" / f"{2 * i:08}")
        assert shapes(saved) == shapes(checkpoint.load(tmp_path / "one" / "checkpoints" / "00000006"))  # nothing is sharded on disk
    one, found = rows(tmp_path / "one"), rows(tmp_path / "chain")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(one, found, strict=True):
        assert theirs == {k: pytest.approx(v, rel=0, abs=1e-5) for k, v in mine.items()}
    assert (tmp_path / "chain" / "media" / "samples-00000003.txt").exists()


def onetorch(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "onetorch", *map(str, words)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


TINY = ["--batch", 4, "--context", 16, "--layers", 1, "--heads", 2, "--width", 16, "--ngram_rows", 50, "--ngram_width", 8, "--eval_windows", 2]
TINY += ["--base_width", "none", "--base_batch", "none"]
TINY += ["--plan", "threads=1,dtype=float32,attention=explicit"]


def test_a_signal_to_the_command_stops_all_of_them_after_saving(tmp_path: Path) -> None:
    where = tmp_path / "run"
    process = onetorch("train", "gpt", "--data", text_file(tmp_path), "--steps", 10**6, "--nproc", 2, "--dir", where, *TINY)
    end = time.perf_counter() + PATIENCE
    while not (where / "metrics.jsonl").exists() or len(rows(where)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.perf_counter() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert f"onetorch resume {where} goes on" in said
    record = json.loads((where / "run.json").read_bytes())
    assert record["status"] == "stopped"
    assert "--nproc 2" in record["command"]
    assert record["progress"]["done"] == rows(where)[-1]["step"]


def test_under_torchrun_and_sharded_the_losses_are_those_of_one_process(tmp_path: Path) -> None:
    """Muon's bfloat16 would carry another order of its products' sums beyond 1e-5 in the fifth step."""
    words = ["train", "gpt", "--data", text_file(tmp_path), "--steps", 8, *TINY, "--dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    starter = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2, "-m", "onetorch", *words]
    two = subprocess.Popen([sys.executable, *map(str, starter), tmp_path / "two", "--shard"], env=environment, stderr=subprocess.PIPE, text=True)
    one = onetorch(*words, tmp_path / "one")
    _, said = one.communicate(timeout=PATIENCE)
    assert one.returncode == 0, said
    _, said = two.communicate(timeout=PATIENCE)
    assert two.returncode == 0, said
    found = [rows(tmp_path / name) for name in ("one", "two")]
    assert [r["step"] for r in found[0]] == list(range(1, 9))
    for mine, theirs in zip(*found, strict=True):
        assert theirs == {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in mine.items()}
    record = json.loads((tmp_path / "two" / "run.json").read_bytes())
    assert record["command"].endswith("--nproc 2 --shard")
    assert record["result"]["bpb"] == pytest.approx(json.loads((tmp_path / "one" / "run.json").read_bytes())["result"]["bpb"], rel=1e-5)


def test_what_cannot_be_shared_out_is_one_line(tmp_path: Path) -> None:
    uneven = onetorch("train", "gpt", "--data", text_file(tmp_path), "--nproc", 2, "--dir", tmp_path / "a", *TINY, "--steps", 3, "--batch_stages", "[0.75]")
    _, said = uneven.communicate(timeout=PATIENCE)
    assert uneven.returncode == 2
    assert said.strip().splitlines()[-1] == "onetorch: a batch of 3 cannot be shared out evenly among 2 processes: choose --batch or --nproc so that it can"


@pytest.mark.parametrize(("words", "says"), [
    (["train", "ppo", "--nproc", "2"], "--nproc: ppo trains in one process; it does not share out its batches"),
    (["train", "gpt", "--nproc", "two"], "--nproc: expected a number of processes, got 'two'"),
    (["train", "gpt", "--shard"], "--shard is for several processes: give --nproc too"),
    (["train", "gpt", "--nproc", "2", "--seed", "1", "2"], "--nproc is for one run; the trials of a sweep have a process each (--slots says how many at a "
     "time)"),
])  # fmt: skip
def test_several_processes_are_refused_before_any_work(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = "import sys; from onetorch import cli; code = cli.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"onetorch: {says}\n")
    assert not list(tmp_path.iterdir())


def test_under_torchrun_what_cannot_work_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun tells the processes that it starts
    for words, says in (
        (["train", "gpt"], "under torchrun every process must be told the same folder: give --dir"),
        (["train", "gpt", "--nproc", "2"], "--nproc: torchrun has started the processes already; its --nproc-per-node says how many"),
        (["train", "ppo", "--dir", "a"], "--nproc: ppo trains in one process; it does not share out its batches"),
    ):
        assert cli.main(words) == 2
        assert capsys.readouterr().err == f"onetorch: {says}\n"


@pytest.mark.parametrize(("joined", "closed"), [("True", ""), ("False", "closed\n")])
def test_a_process_that_worked_with_others_ends_without_closing_the_interpreter(joined: str, closed: str) -> None:
    script = "import atexit, sys; from onetorch.runs import distributed as d; atexit.register(print, 'closed'); print('said'); "
    script += f"d.joined = {joined}; d.end(3); sys.exit(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n" + closed, "")


def test_in_one_process_nothing_is_wrapped_or_gathered() -> None:
    layer = torch.nn.Linear(2, 3)
    assert distributed.wrap(layer, [layer]) is layer
    assert distributed.unwrap(layer, lambda: torch.nn.Linear(1, 1)) is layer
    with distributed.whole(layer):
        assert all(torch.equal(a, b) for a, b in zip(distributed.state_dict(layer).values(), layer.state_dict().values(), strict=True))

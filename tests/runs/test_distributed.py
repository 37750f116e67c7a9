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

from onetorch.runs import folder

PATIENCE = 300  # seconds that a process may take on a busy machine
SCRIPT = """
import sys
from pathlib import Path
from onetorch.generative import gpt
from onetorch.runs import distributed, follower, plan, run

place, where, text, stop, resume = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "resume"
if place != "alone":
    distributed.join(place)
config = gpt.Config(data=text, steps=6, batch=4, context=16, layers=1, heads=2, width=16, ngram_rows=50, ngram_width=8, eval_every=3, eval_windows=4,
                    eval_samples=1, accumulate=2, ema=(0.9,), clip=1.0)
kind = follower.Follower if distributed.rank() else run.Run
own = kind(where, config, resume=resume, fixed=plan.parse("threads=1,dtype=float32,attention=explicit"), checkpoint_seconds=0, quiet=True)
class Told(Exception): pass
save = own.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        raise Told
own.checkpoint = checkpoint
try:
    with own:
        gpt.train(config, own)
except Told:
    pass
distributed.leave()
"""


def text_file(where: Path) -> Path:
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not ", "that ", "is ", "the ", "question.\n"], 3000)
    (where / "text.txt").write_text("".join(words), encoding="utf-8")
    return where / "text.txt"


def work(count: int, tmp_path: Path, name: str, stop: int = 0, how: str = "new") -> None:
    store = tmp_path / f"store-{name}-{how}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    places = [f"{i},{count},{store}" for i in range(count)] if count > 1 else ["alone"]
    words = [str(tmp_path / name), str(tmp_path / "text.txt"), str(stop), how]
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", SCRIPT, place, *words], env=environment) for place in places]
    assert [p.wait(PATIENCE) for p in processes] == [0] * count


def rows(where: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(where)]


def test_one_process_two_and_there_and_back_give_the_same_losses(tmp_path: Path) -> None:
    text_file(tmp_path)
    work(1, tmp_path, "one")
    work(2, tmp_path, "two")
    work(1, tmp_path, "up", stop=3)
    work(2, tmp_path, "up", how="resume")
    work(2, tmp_path, "down", stop=3)
    work(1, tmp_path, "down", how="resume")
    one = rows(tmp_path / "one")
    assert [r["step"] for r in one] == [1, 2, 3, 4, 5, 6]
    for name in ("two", "up", "down"):
        for mine, theirs in zip(one, rows(tmp_path / name), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(theirs[k] == pytest.approx(mine[k], rel=1e-5, abs=1e-5) for k in mine), (name, mine, theirs)
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) > 0
    assert (tmp_path / "two" / "media" / "samples-00000006.txt").exists()


def onetorch(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "onetorch", *map(str, words)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


TINY = ["--batch", 4, "--context", 16, "--layers", 1, "--heads", 2, "--width", 16, "--ngram_rows", 50, "--ngram_width", 8, "--eval_windows", 2]
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


def test_what_cannot_be_shared_out_is_one_line(tmp_path: Path) -> None:
    uneven = onetorch("train", "gpt", "--data", text_file(tmp_path), "--nproc", 2, "--dir", tmp_path / "a", *TINY, "--steps", 3, "--batch_stages", "[0.75]")
    alone = onetorch("train", "ppo", "--nproc", 2, "--dir", tmp_path / "b", "--total_steps", 4096)
    _, said = uneven.communicate(timeout=PATIENCE)
    assert uneven.returncode == 2
    assert said.strip().splitlines()[-1] == "onetorch: a batch of 3 cannot be shared out evenly among 2 processes: choose --batch or --nproc so that it can"
    _, said = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 2
    assert said.strip().splitlines()[-1] == "onetorch: --nproc: ppo trains in one process; it does not share out its batches"
    wrong = onetorch("train", "gpt", "--nproc", "two")
    assert wrong.communicate(timeout=PATIENCE)[1] == "onetorch: --nproc: expected a number of processes, got 'two'\n"

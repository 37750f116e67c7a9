"""Logs of Spinning Up, stable-baselines3 and TensorBoard, as their loggers write them, among runs of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from written import curve, write

from onetorch.runs import compare, foreign, plot, report
from onetorch.runs.errors import RunError, UsageError


def spinningup(path: Path, seed: int, scale: float = 1.0) -> Path:
    """Three epochs as `EpochLogger` writes them, and its config.json."""
    path.mkdir(parents=True)
    names = ["Epoch", "AverageEpRet", "StdEpRet", "EpLen", "TotalEnvInteracts", "LossPi", "LossV", "KL", "Time"]
    rows = [[k, scale * 10.0 * k + seed, 1.5, 20.0, 4000 * (k + 1), -0.01, 3.5, 0.002, 1.25 * (k + 1)] for k in range(3)]
    (path / "progress.txt").write_text("\n".join("\t".join(map(str, row)) for row in [names, *rows]) + "\n", encoding="utf-8")
    config = {
        "exp_name": "half",
        "seed": seed,
        "gamma": 0.99,
        "actor_critic": "MLPActorCritic",
        "ac_kwargs": {"hidden_sizes": [64, 64]},
        "env_fn": f"<function call_experiment.<locals>.<lambda> at 0x7f{seed}0>",
        "logger_kwargs": {"output_dir": f"/data/half/half_s{seed}", "exp_name": "half"},
        "logger": {"<spinup.utils.logx.EpochLogger object at 0x7f80>": {"epoch_dict": {}}},
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_spinning_up(tmp_path: Path) -> None:
    for seed in (0, 10):
        spinningup(tmp_path / "half" / f"half_s{seed}", seed)
    found = compare.load([str(tmp_path / "half")])
    assert [(g.name, [e.seed for e in g.entries]) for g in found.groups] == [("Spinning Up", [0, 10])]
    entry = found.groups[0].entries[1]
    assert entry.config == {"algorithm": "half", "seed": 10, "gamma": 0.99, "actor_critic": "MLPActorCritic", "ac_kwargs.hidden_sizes": [64, 64]}
    column = entry.columns["return"]
    assert column.steps.tolist() == [4000, 8000, 12000]
    assert column.seconds.tolist() == [1.25, 2.5, 3.75]
    assert column.values.tolist() == [10.0, 20.0, 30.0]
    assert {"policy_loss", "value_loss", "kl", "episode_length", "StdEpRet"} <= entry.columns.keys()
    assert not {"Time", "TotalEnvInteracts"} & entry.columns.keys()
    assert entry.outcome("return") == 30.0


def test_stable_baselines3(tmp_path: Path) -> None:
    """A quantity that a row lacks is an empty cell."""
    for name in ("PPO_1", "PPO_2"):
        (tmp_path / name).mkdir()
        text = "rollout/ep_rew_mean,time/fps,time/time_elapsed,time/total_timesteps,train/approx_kl\n20.5,900,2,2048,\n,,5,4096,0.01\n60.0,910,6,6144,nan\n"
        (tmp_path / name / "progress.csv").write_text(text, encoding="utf-8")
    found = compare.load([str(tmp_path)])
    assert [(g.entries[0].config["algorithm"], [e.seed for e in g.entries]) for g in found.groups] == [("PPO", [1, 2])]
    columns = found.entries[0].columns
    assert (columns["return"].steps.tolist(), columns["return"].values.tolist()) == ([2048, 6144], [20.5, 60.0])
    assert (columns["kl"].seconds.tolist(), columns["kl"].values.tolist()) == ([5], [0.01])
    assert columns["time/fps"].values.tolist() == [900, 910]


def test_monitors_of_two_environments_are_one_run(tmp_path: Path) -> None:
    """Episodes in the order of time: lengths 10, 30, 20 and returns 1, 5, 3, so 10, 40 and 60 steps and means of 1, 3 and 3."""
    run = tmp_path / "run"
    run.mkdir()
    head = '#{"t_start": 1700000000.0, "env_id": "CartPole-v1"}\nr,l,t\n'
    (run / "0.monitor.csv").write_text(head + "1.0,10,0.5\n3.0,20,2.0\n", encoding="utf-8")
    (run / "1.monitor.csv").write_text(head + "5.0,30,1.0\n", encoding="utf-8")
    entry = compare.read(run)
    assert entry.columns["return"].steps.tolist() == [10, 40, 60]
    assert entry.columns["return"].seconds.tolist() == [0.5, 1.0, 2.0]
    assert entry.columns["return"].values.tolist() == [1.0, 3.0, 3.0]
    assert entry.columns["episode_length"].values.tolist() == [10.0, 20.0, 20.0]


def test_monitors_are_averaged_over_the_last_hundred_episodes(tmp_path: Path) -> None:
    text = "#{}\nr,l,t\n" + "".join(f"{k},1,{k}\n" for k in range(250))
    (tmp_path / "monitor.csv").write_text(text, encoding="utf-8")
    values = compare.read(tmp_path).columns["return"].values
    assert values.tolist() == pytest.approx([np.mean(range(max(0, k - 99), k + 1)) for k in range(250)])


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard.writer import SummaryWriter

    run = tmp_path / "CartPole-v1__dqn__7__1700000000"
    writer = SummaryWriter(str(run))
    for k in range(5):
        writer.add_scalar("charts/episodic_return", 10.0 * k, 100 * k, walltime=1000.0 + k)
        writer.add_scalar("mine/own", k, 100 * k, walltime=1000.0 + k)
    writer.close()
    entry = compare.read(run)
    assert (entry.config, entry.seed) == ({"algorithm": "CartPole-v1 dqn", "seed": 7}, 7)
    assert entry.columns["return"].steps.tolist() == [0, 100, 200, 300, 400]
    assert entry.columns["return"].values.tolist() == [0, 10, 20, 30, 40]
    assert np.diff(entry.columns["mine/own"].seconds).tolist() == pytest.approx([1.0] * 4)


def test_tensorboard_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UsageError, match=r"pip install 'onetorch\[board\]'"):
        compare.read(tmp_path)


def test_drawn_and_reported_beside_ours(tmp_path: Path) -> None:
    for seed in (0, 1):
        spinningup(tmp_path / "theirs" / f"half_s{seed}", seed)
        write(tmp_path / "ours" / f"made-{seed}", {"seed": seed}, [{"step": 4000 * k, "seconds": k, "return": 15.0 * k} for k in (1, 2, 3)])
    words = [str(tmp_path / "theirs"), str(tmp_path / "ours")]
    found = compare.load(words)
    assert [(g.name, len(g.entries)) for g in found.groups] == [("half", 2), ("made", 2)]
    plot.draw(found, tmp_path / "curves.png", clocks=("steps", "seconds"), ys=["return"])
    assert (tmp_path / "curves.png").stat().st_size > 5000
    target, _ = report.of_words(words, tmp_path / "page.html", y="return")
    page = target.read_text(encoding="utf-8")
    assert "Probability of improvement" in page
    # ours end at 45 both, theirs at 20 and 21: the settings' interquartile means
    assert "<td>made<td class=number>2<td class=number>45<" in page
    assert "<td>half<td class=number>2<td class=number>20.5<" in page


def test_a_row_that_was_cut_off_is_left_out_and_damage_is_named(tmp_path: Path) -> None:
    path = spinningup(tmp_path / "half_s0", 0)
    whole = (path / "progress.txt").read_text(encoding="utf-8")
    (path / "progress.txt").write_text(whole[:-9], encoding="utf-8")
    assert compare.read(path).columns["return"].values.tolist() == [0.0, 10.0]
    (path / "progress.txt").write_text(whole.replace("\t1.5\t", "\t1.5\t7\t7\t7\t", 1), encoding="utf-8")
    with pytest.raises(RunError, match=r"progress\.txt:2 has 12 cells under 9 names"):
        compare.read(path)
    (path / "progress.txt").write_text("a\tb\n1\t2\n3\t4\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"progress\.txt:2 names no number of steps \(expected TotalEnvInteracts"):
        compare.read(path)
    (path / "progress.txt").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="holds no number at any step"):
        compare.read(path)


def test_a_run_of_ours_is_none_of_others(tmp_path: Path) -> None:
    path = write(tmp_path / "r", {"seed": 0}, curve([1.0, 2.0]))
    (path / "progress.txt").write_text("Epoch\n", encoding="utf-8")
    assert foreign.files(path) == []
    assert compare.read(path).record["recipe"] == "made"

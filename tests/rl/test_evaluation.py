"""Intervals against tables of Student's t, returns of episodes that are known, and the video."""

import math
import sys
from pathlib import Path

import pytest
import rl_tasks
import torch

from onetorch.rl import evaluation


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622), (20, 2.0930), (100, 1.9842)])
def test_interval_is_students(n: int, t: float) -> None:
    values = [float(i) for i in range(n)]
    mean, half = evaluation.interval(values)
    deviation = math.sqrt(n * (n + 1) / 12)  # of 0, 1, …, n - 1
    assert mean == (n - 1) / 2
    assert half == pytest.approx(t * deviation / math.sqrt(n), rel=0.004)


def test_interval_of_one_episode_has_no_width() -> None:
    assert evaluation.interval([3.0]) == (3.0, 0.0)


def still(obs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(obs), dtype=torch.int64)


def test_each_environment_counts_once() -> None:
    """Always to the left, CartPole lasts 8 to 10 steps; a longer run of short episodes would count them more often."""
    result = evaluation.returns(still, "CartPole-v1", episodes=50, seed=0)
    assert result["episodes"] == 50
    assert 8 <= float(result["return_min"]) <= float(result["return"]) <= float(result["return_max"]) <= 11
    assert result["return"] == result["episode_length"] or abs(float(result["return"]) - float(result["episode_length"])) < 0.1
    assert "unfinished" not in result


def test_episodes_without_end_are_cut_and_counted() -> None:
    assert evaluation.returns(still, "Trap-v0", episodes=2, seed=0)["return"] == rl_tasks.LIMIT
    result = evaluation.returns(still, "Endless-v0", episodes=3, seed=0, max_steps=40)
    assert (result["return"], result["unfinished"]) == (40.0, 3)


def test_video_has_a_frame_for_every_step(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pytest.importorskip("pygame")
    result = evaluation.evaluate(still, "CartPole-v1", media=tmp_path / "media", episodes=2, seed=0)
    assert result["video"] == "agent.mp4"
    with av.open(str(tmp_path / "media" / "agent.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 50
    assert 8 <= len(frames) <= 11
    assert frames[0].shape == (400, 600, 3)
    assert frames[0].mean() > 200  # white, with a dark cart and a pole
    assert frames[0].min() < 60
    assert (frames[0] != frames[-1]).any()


def test_what_hinders_a_video_is_said_and_the_result_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    result = evaluation.evaluate(still, "Trap-v0", media=tmp_path, episodes=2, seed=0)
    assert result["return"] == rl_tasks.LIMIT
    assert str(result["video"]).startswith("no video: Trap-v0 ")
    assert capsys.readouterr().err == f"{result['video']}\n"
    result = evaluation.evaluate(still, "NotFilmed-v0", media=tmp_path, episodes=2, seed=0)
    assert str(result["video"]).startswith("no video: NotFilmed-v0 cannot be made: TypeError: ")
    assert capsys.readouterr().err == f"{result['video']}\n"
    monkeypatch.setitem(sys.modules, "av", None)
    result = evaluation.evaluate(still, "Trap-v0", media=tmp_path, episodes=2, seed=0)
    assert result["video"] == "no video: it needs the package av: pip install 'onetorch[media]'"
    assert list(tmp_path.iterdir()) == []


def test_deterministic_and_stochastic_are_both_reported() -> None:
    """Noisy-v0 pays its action: 1 a step for action 2, 0 for action 1, for episodes of 9.6 steps in the mean (they end with probability 0.1)."""

    def best(obs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(obs),), 2)

    def middle(obs: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(obs), dtype=torch.int64)

    result = evaluation.evaluate(best, "Noisy-v0", media=None, episodes=60, seed=0, stochastic=middle)
    assert result["return"] == pytest.approx(float(result["episode_length"]), abs=0.06)
    assert float(result["return"]) == pytest.approx(9.6, abs=3 * 8 / 60**0.5)
    assert result["stochastic_return"] == result["stochastic_return_ci95"] == result["stochastic_return_max"] == 0.0
    assert result["stochastic_episode_length"] == result["episode_length"]  # the same seeds, and this task ends by its seed alone
    assert "stochastic_episodes" not in result
    alone = evaluation.evaluate(best, "Noisy-v0", media=None, episodes=60, seed=0)
    assert alone == {name: value for name, value in result.items() if not name.startswith("stochastic")}


def test_a_policy_sees_in_the_video_what_it_sees_in_evaluation(tmp_path: Path) -> None:
    """Stacks of pictures and of vectors; Film-v0 shows the number of its step as a grey level, and 4 frames are seen at once."""
    pytest.importorskip("av")
    seen: list[torch.Tensor] = []

    def look(obs: torch.Tensor) -> torch.Tensor:
        seen.append(obs)
        return torch.zeros(len(obs), dtype=torch.int64)

    assert evaluation.film(look, "Film-v0", tmp_path / "agent.mp4", seed=0, frame_stack=4) is None
    filmed, seen = seen, []
    evaluation.returns(look, "Film-v0", episodes=1, seed=0, frame_stack=4)
    assert len(filmed) == len(seen) == 6
    assert filmed[0].shape == (1, 4, 16, 24)
    assert filmed[0].dtype == torch.uint8
    assert [frames[0, :, 0, 0].tolist() for frames in filmed] == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert all(torch.equal(a, b) for a, b in zip(filmed, seen, strict=True))


def test_held_actions_are_evaluated_and_every_frame_is_filmed(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    seen: list[list[float]] = []

    def look(obs: torch.Tensor) -> torch.Tensor:
        seen.append(obs[0, :, 0, 0].tolist())
        return torch.zeros(len(obs), dtype=torch.int64)

    result = evaluation.returns(look, "Film-v0", episodes=1, seed=0, frame_stack=2, action_repeat=4)
    assert (result["return"], result["episode_length"]) == (6.0, 2.0)
    assert seen == [[0, 0], [0, 4]]
    assert evaluation.film(look, "Film-v0", tmp_path / "agent.mp4", seed=0, frame_stack=2, action_repeat=4) is None
    assert seen == [[0, 0], [0, 4]] * 2
    with av.open(str(tmp_path / "agent.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6


def test_no_episodes() -> None:
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluation.returns(still, "CartPole-v1", episodes=0, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        evaluation.returns(still, "CartPole-v1", episodes=1, seed=-1)

"""What a policy earns: returns over separate episodes, with an interval, and a video of one."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onetorch.rl import env_worker
from onetorch.rl import envs as environments
from onetorch.runs.errors import UsageError

Policy = Callable[[Tensor], Tensor]  # observations (N, …) to actions (N, …), as envs.step takes them


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of `values` and half the width of its 95 % interval by Student's t, the quantile from Abramowitz and Stegun 26.7.5; 0 for one value.

    >>> "{:.3f} {:.3f}".format(*interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    '3.500 1.963'
    """
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, 0.0
    z, nu = 1.959964, n - 1
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384, fourth)
    t = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}.get(nu, z + sum(term / nu**k for k, term in enumerate(terms, 1)))
    return mean, t * math.sqrt(sum((v - mean) ** 2 for v in values) / nu / n)


@torch.no_grad()
def returns(
    policy: Policy, env: str, episodes: int, seed: int, max_steps: int = 10_000, frame_stack: int = 1, action_repeat: int = 1
) -> dict[str, float | int | str]:
    """Undiscounted returns of `episodes` episodes, the first of as many environments (so that short episodes do not count more often).

    An episode still running after `max_steps` counts as it stands, and `unfinished` says how many did. Lengths are in actions, each of `action_repeat` steps.
    """
    if episodes < 1:
        raise UsageError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")
    envs = environments.make(env, episodes, seed, frame_stack=frame_stack, action_repeat=action_repeat)
    total, length, running = np.zeros(episodes), np.zeros(episodes, np.int64), np.ones(episodes, bool)
    for _ in range(max_steps):
        _, reward, terminated, truncated = envs.step(policy(envs.obs))
        total += reward.numpy() * running
        length += running
        running &= ~(terminated | truncated).numpy()
        if not running.any():
            break
    envs.close()
    mean, half = interval(total.tolist())
    result: dict[str, float | int | str] = {
        "return": round(mean, 3), "return_ci95": round(half, 3), "return_min": round(float(total.min()), 3), "return_max": round(float(total.max()), 3),
        "episode_length": round(float(length.mean()), 1), "episodes": episodes,
    }  # fmt: skip
    return result | ({"unfinished": int(running.sum())} if running.any() else {})


@torch.no_grad()
def film(
    policy: Policy, env: str, path: Path, seed: int, max_frames: int = 1000, max_seconds: float = 10.0, frame_stack: int = 1, action_repeat: int = 1
) -> str | None:
    """One episode, or as much of it as can be drawn in `max_seconds` (without a GPU a frame of MuJoCo takes a tenth of a second), as an H.264 video at `path`.

    Returns None, or in one line why there is no video: a missing extra, or nothing to render with.
    """
    try:
        import av
    except ImportError:
        return "no video: it needs the package av: pip install 'onetorch[media]'"
    # Both draw into memory and must look for no screen; the user's own settings stand.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with contextlib.closing(environments.make_one(env)) as plain:
            if "rgb_array" not in plain.metadata.get("render_modes", ()):
                return f"no video: {env} does not render to rgb_array"
        one = environments.make_one(env, render_mode="rgb_array")
    except ValueError as error:
        return f"no video: {error}"
    mapped, observation = environments.ActionMap(one.action_space), env_worker.Observation(one.observation_space)

    def row(obs: Any) -> Tensor:
        out = np.empty((1, *observation.shape), observation.dtype)
        observation.write(obs, out[0])
        return torch.from_numpy(out)

    try:
        obs, _ = one.reset(seed=seed)
        stack = [row(obs)] * frame_stack
        frame: Any = one.render()
        height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2  # H.264 wants even sides
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=round(one.metadata.get("render_fps") or 30))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            deadline = time.monotonic() + max_seconds
            for t in range(max_frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")))
                if t % action_repeat == 0:
                    act = mapped(policy(torch.cat(stack, 1)))[0]
                obs, _, terminated, truncated, _ = one.step(act)
                if (t + 1) % action_repeat == 0:
                    stack = [*stack[1:], row(obs)]
                if terminated or truncated or time.monotonic() > deadline:
                    break
                frame = one.render()
            container.mux(stream.encode())
    except Exception as error:  # rendering needs a display, a driver, a codec: each fails in its own way, and none may cost the evaluation
        path.unlink(missing_ok=True)
        return f"no video: {env} could not be rendered here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        one.close()
    return None


def evaluate(
    policy: Policy, env: str, *, media: Path | None, episodes: int, seed: int, stochastic: Policy | None = None, **acting: int
) -> dict[str, float | int | str]:
    """`returns` of `policy`, which takes its likeliest actions, and where it is given of `stochastic`, which draws them as in training, as `stochastic_return`
    and so on, in environments of the same seeds. `agent.mp4` of `policy` under `media` where that is given; where no video could be made, `video` says why.
    `acting`: `frame_stack` and `action_repeat`, where the policy was trained with them."""
    result = returns(policy, env, episodes, seed, **acting)
    if stochastic is not None:
        drawn = returns(stochastic, env, episodes, seed, **acting)
        result |= {f"stochastic_{name}": value for name, value in drawn.items() if name != "episodes"}
    if media is not None:
        media.mkdir(parents=True, exist_ok=True)
        problem = film(policy, env, media / "agent.mp4", seed, **acting)
        if problem:
            sys.stderr.write(problem + "\n")
        result["video"] = problem or "agent.mp4"
    return result

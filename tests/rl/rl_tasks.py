"""Small environments with a known answer or a known fault, importable by worker processes too."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np


class Task(gymnasium.Env):
    """Constant observation, reward 1, never ends by itself; subclasses change one thing each."""

    observation_space: gymnasium.Space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space: gymnasium.Space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self.look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self.look(), 1.0, False, False, {}

    def look(self) -> Any:
        return np.ones(1, np.float32)


class BoxTask(Task):
    """The same for algorithms of continuous actions."""

    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)


class NaNObservation(Task):
    def look(self) -> Any:
        return np.full(1, np.nan if self.count == 3 else 0.0, np.float32)


class InfiniteReward(Task):
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, np.inf, *rest  # type: ignore[return-value]


class Chance(Task):
    """Not deterministic under its seed."""

    def look(self) -> Any:
        return np.frombuffer(os.urandom(1), np.uint8).astype(np.float32)


class OldReset(Task):
    """As in gym before 0.26."""

    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0]


class OldStep(Task):
    """As in gym before 0.26."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class RewardList(Task):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


class NoFlag(Task):
    def step(self, action: Any) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, None, truncated, info


class TextObservation(Task):
    observation_space = gymnasium.spaces.Text(16)


class TextAction(Task):
    action_space = gymnasium.spaces.Text(16)


class NothingSeen(Task):
    observation_space = gymnasium.spaces.Dict({"empty": gymnasium.spaces.Box(-1, 1, (0,), np.float32)})


class NothingDone(Task):
    action_space = gymnasium.spaces.Box(-1, 1, (0, 2), np.float32)


class Unmade(Task):
    def __init__(self, size: int) -> None:
        self.size = size


class NotFilmed(Task):
    """Says that it can be drawn, but does not take what asks for it."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(self) -> None:
        pass


class Slow(Task):
    def step(self, action: Any) -> Any:
        time.sleep(0.15)
        return super().step(action)


class Late(Task):
    """Its step 8 + k does not end before the file that LATE names has k bytes."""

    def step(self, action: Any) -> Any:
        answer, patience = super().step(action), time.monotonic() + 20
        while os.path.getsize(os.environ["LATE"]) < self.count - 8:
            if time.monotonic() > patience:
                raise TimeoutError(f"step {self.count} waits for update {self.count - 8}")
            time.sleep(0.001)
        return answer


class LateBox(Late):
    action_space = BoxTask.action_space


class Starter(Task):
    """Action 1 starts a process and shows its number; action 0 kills this one."""

    observation_space = gymnasium.spaces.Box(0, 2**23, (1,), np.float32)

    def step(self, action: Any) -> Any:
        if action == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return np.array([child.pid], np.float32), 0.0, False, False, {}


class Film(Task):
    """Shows the number of its step as a grey level."""

    observation_space = gymnasium.spaces.Box(0, 255, (16, 24), np.uint8)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def look(self) -> Any:
        return np.full((16, 24), self.count, np.uint8)

    def render(self) -> Any:
        return np.full((64, 64, 3), 20 * self.count, np.uint8)


class Everything(Task):
    """A Dict with one of each kind, and several choices to make at once; the reward spells them."""

    observation_space = gymnasium.spaces.Dict(
        {
            "speed": gymnasium.spaces.Box(-1, 1, (2, 2), np.float64),
            "gear": gymnasium.spaces.Discrete(3, start=-1),
            "doors": gymnasium.spaces.MultiBinary(2),
            "seats": gymnasium.spaces.Tuple((gymnasium.spaces.MultiDiscrete([2, 3]), gymnasium.spaces.Box(0, 9, (1,), np.int64))),
        }
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3, 4], start=[0, 1, -1])

    def look(self) -> Any:
        seats = (np.array([1, 2]), np.array([self.count]))
        return {"speed": np.array([[0.1, 0.2], [0.3, 0.4]]), "gear": np.int64(0), "doors": np.array([0, 1], np.int8), "seats": seats}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        obs, _, *rest = super().step(action)
        return obs, float(100 * action[0] + 10 * action[1] + action[2]), *rest


class WrongPart(Everything):
    def look(self) -> Any:
        return super().look() | ({"gear": np.int64(5)} if self.count == 2 else {})


class Switches(Film):
    """Two pictures and a number; actions are switches. The pictures are the count in the first channel, the switches in the others."""

    observation_space = gymnasium.spaces.Dict(
        {
            "eye": gymnasium.spaces.Box(0, 255, (8, 10, 3), np.uint8),
            "depth": gymnasium.spaces.Box(0, 255, (1, 8, 10), np.uint8),
            "wheel": gymnasium.spaces.Box(-1, 1, (1,), np.float32),
        }
    )
    action_space = gymnasium.spaces.MultiBinary(3)
    given: Any = (0, 0, 0)

    def look(self) -> Any:
        eye = np.broadcast_to(np.array([self.count, *self.given[:2]], np.uint8), (8, 10, 3))
        return {"eye": eye, "depth": np.full((1, 8, 10), 200, np.uint8), "wheel": np.array([0.5], np.float32)}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.given = action
        return super().step(action)


class Noisy(Task):
    """Prints where only answers may stand, draws from its seeded generator, takes actions from -1 to 1, and looks like a picture."""

    observation_space = gymnasium.spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3, start=-1)

    def look(self) -> Any:
        print("noise")  # noqa: T201
        return self.np_random.integers(0, 256, (2, 3), np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (-1, 0, 1)
        self.count += 1
        return self.look(), float(action), bool(self.np_random.random() < 0.1), False, {}


class Chain(Task):
    """Three states in a row, seen one-hot. Action 0 leaves and pays 1; action 1 walks on, and pays 5 at the row's end. With a discount of 0.9 it is best to
    walk, and the states are worth 4.05, 4.5 and 5; with a discount of 0.4 they are worth 1, 2 and 5, and from the first it is best to leave."""

    observation_space = gymnasium.spaces.Box(0, 1, (3,), np.float32)

    def look(self) -> Any:
        return np.eye(4, 3, dtype=np.float32)[self.count]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        end = self.count == 3
        return self.look(), 1.0 if action == 0 else 5.0 * end, bool(action == 0 or end), False, {}


class Tell(BoxTask):
    """The best action is 0.5, and each step pays what the square of the distance to it leaves of 1."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, 1.0 - float(np.square(action[0] - 0.5)), *rest  # type: ignore[return-value]


class Picture(Task):
    """A bright column in the left or the right half of a picture says which of two switches is to be on: right answers pay 1 each, 2 a step at most."""

    observation_space = gymnasium.spaces.Box(0, 255, (12, 12, 1), np.uint8)
    action_space = gymnasium.spaces.MultiBinary(2)

    def look(self) -> Any:
        self.right = int(self.np_random.integers(2))
        picture = np.zeros((12, 12, 1), np.uint8)
        picture[:, self.np_random.integers(6) + 6 * self.right] = 255
        return picture

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = float(action[0] == self.right) + float(action[1] != self.right)
        return self.look(), reward, self.count == 8, False, {}


class PictureAndNumber(Picture):
    """The picture says the first of two choices, a number the second of three."""

    observation_space = gymnasium.spaces.Dict({"number": gymnasium.spaces.Box(-9, 9, (1,), np.float32), "picture": Picture.observation_space})
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def look(self) -> Any:
        self.number = int(self.np_random.integers(3))
        return {"number": np.array([4 + self.number], np.float32), "picture": super().look()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = float(action[0] == self.right) + float(action[1] == self.number)
        return self.look(), reward, self.count == 8, False, {}


class Faulty(Task):
    """Action 1 brings the fault at once, action 2 ends the episode and brings it at the next reset. "spin" is a loop of C that lets nobody else run."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, kind: str) -> None:
        self.kind, self.at_reset = kind, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.fault() if self.at_reset else np.zeros(4, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at_reset = action == 2
        return self.fault() if action == 1 else np.zeros(4, np.float32), 1.0, self.at_reset, False, {}

    def fault(self) -> Any:
        match self.kind:
            case "raise":
                raise RuntimeError("the wheel came off")
            case "exit":
                sys.exit(3)
            case "quit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "sleep":
                time.sleep(600)
            case "spin":
                sum(range(10**15))
            case "nan":
                return np.array([0, np.nan, 0, 0], np.float32)
            case "infinity":
                return np.array([0, 0, -np.inf, 0], np.float32)
            case "shape":
                return np.zeros(1, np.float32)  # numpy would broadcast it in silence
            case "dtype":
                return np.zeros(4, np.complex64)
        return None  # "none"


class Payday(Task):
    """One step, which pays the number of the action: 0, 1 or 2."""

    action_space = gymnasium.spaces.Discrete(3)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.look(), float(action), True, False, {}


class Target(BoxTask):
    """One step, which pays 1 - 2 (a - 0.5)^2."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.look(), 1 - 2 * (float(action[0]) - 0.5) ** 2, True, False, {}


class Point(BoxTask):
    """A bright column in a picture says where to point, from -1 at its left to 1 at its right; one step, which pays 1 - 2 (a - place)^2."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 1), np.uint8)

    def look(self) -> Any:
        self.column = int(self.np_random.integers(8))
        picture = np.zeros((8, 8, 1), np.uint8)
        picture[:, self.column] = 255
        return picture

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 1 - 2 * (float(action[0]) - (2 * self.column / 7 - 1)) ** 2
        return self.look(), reward, True, False, {}


class PointAndNumber(Point):
    """The picture says where to point, a number whether to point the other way."""

    observation_space = gymnasium.spaces.Dict({"number": gymnasium.spaces.Box(-1, 1, (1,), np.float32), "picture": Point.observation_space})

    def look(self) -> Any:
        self.sign = float(self.np_random.integers(2)) * 2 - 1
        return {"number": np.array([self.sign], np.float32), "picture": super().look()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(action * self.sign)


# The trap for any algorithm: Trap-v0 (Discrete) and TrapBox-v0 (Box) pay 1 for ever, whatever is done, and a time limit cuts them every LIMIT steps. So the
# value of their one state is 1 / (1 - gamma), 10 for gamma = 0.9; who takes the limit for an end learns at most 1 + gamma + … + gamma^(LIMIT - 1), 4.1.
LIMIT = 5
FAULTS = ("raise", "exit", "quit", "kill", "crash", "sleep", "spin", "nan", "infinity", "shape", "dtype", "none")
if "Trap-v0" not in gymnasium.registry:  # pytest imports this file a second time, to look for doctests in it
    gymnasium.register("Trap-v0", entry_point="rl_tasks:Task", max_episode_steps=LIMIT)
    gymnasium.register("TrapBox-v0", entry_point="rl_tasks:BoxTask", max_episode_steps=LIMIT)
    gymnasium.register("Endless-v0", entry_point="rl_tasks:Task")
    gymnasium.register("Noisy-v0", entry_point="rl_tasks:Noisy", max_episode_steps=30)
    gymnasium.register("MissingPackage-v0", entry_point="a_package_that_is_not_there:Env")
    gymnasium.register("Film-v0", entry_point="rl_tasks:Film", max_episode_steps=6)
    for fault in FAULTS:
        gymnasium.register(f"Faulty-{fault}-v0", entry_point="rl_tasks:Faulty", kwargs={"kind": fault})
    faulty = (NaNObservation, InfiniteReward, Chance, OldReset, OldStep, RewardList, NoFlag)
    seen = (TextObservation, TextAction, Everything, WrongPart, Switches, Picture, PictureAndNumber, Point, PointAndNumber)
    gymnasium.register("NotFilmed-v0", entry_point="rl_tasks:NotFilmed", max_episode_steps=LIMIT)
    for kind in (*faulty, *seen, NothingSeen, NothingDone, Unmade, Slow, Late, LateBox, Starter, Chain, Tell, Payday, Target):
        gymnasium.register(f"{kind.__name__}-v0", entry_point=f"rl_tasks:{kind.__name__}")

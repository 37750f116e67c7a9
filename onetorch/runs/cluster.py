"""The trials of a sweep on a Ray cluster: one actor for each slot, which keeps a nursery on its node. Needs the extra `cluster`.

The nodes must see the sweep's folder under the same path (a shared file system) and have onetorch installed: results are not sent, they land in the folder.
When a node dies, its trials go on elsewhere from their checkpoints, as after any kill. The lock in a trial's folder keeps two nodes from one trial, so the
file system must honour flock across nodes (NFS from version 4 on, Lustre mounted with flock, and the usual cluster file systems do).
"""

import math
import signal
import threading
from pathlib import Path
from typing import Any

from onetorch.runs.errors import OneTorchError, RunError, UsageError
from onetorch.runs.nursery import Code, Nursery, Order


class Post:
    """What stands on a node for one slot: runs one trial at a time in its nursery. Its two methods are called from two threads."""

    def __init__(self, code: Code, log: Path) -> None:
        self.nursery = Nursery(code, log)
        self.lock = threading.Lock()
        self.told: int | None = None
        self.busy = False

    def run(self, order: Order) -> int:
        """Run one trial; returns its exit code, or minus the signal that killed it."""
        with self.lock:
            self.nursery.start(order, 0)
            if self.told:
                self.nursery.tell(self.told)
            self.busy = True
        while not (ended := self.nursery.wait(60)):
            pass
        with self.lock:
            self.busy = False
        return ended[0][1]

    def tell(self, number: int) -> None:
        """Send a signal to the trial that runs here, now or soon."""
        with self.lock:
            self.told = number
            if self.busy:
                self.nursery.tell(number)


class Cluster:
    """The sweep's end: has the methods of `nursery.Nursery`.

    Raises UsageError where Ray is not installed, no cluster answers, or none of its nodes has what a trial needs.
    """

    def __init__(self, code: Code, log: Path, address: str | None, slots: int | None, trials: int, plan: dict[str, str]) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--on ray needs Ray, which is not installed here: pip install 'onetorch[cluster]'") from error
        self.ray, self.code, self.log = ray, code, log.resolve()
        self.ours = not ray.is_initialized()  # a notebook may have connected already
        if self.ours:
            try:
                ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                what = address or "an address of a Ray cluster on this machine"
                raise UsageError(f"--on ray: no cluster answers ({what}); `ray start --head` starts one: {' '.join(str(error).split())[:200]}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        sizes = [int(node.get("CPU", 0)) for node in nodes]
        cards = 0 if plan.get("device") == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
        asked = int(plan["threads"]) if plan.get("threads", "").isdigit() else 0
        if max(sizes, default=0) < max(asked, 1):
            self.close()
            raise UsageError(f"--on ray: no node has {max(asked, 1)} CPUs; the nodes have {', '.join(map(str, sizes)) or 'none'}")
        if slots is None:
            slots = max(1, min(trials, cards or sum(size // max(asked, 1) for size in sizes)))
        threads = asked or max([t for t in range(1, max(sizes) + 1) if sum(size // t for size in sizes) >= slots], default=1)
        needs: dict[str, Any] = {"num_cpus": threads, "num_gpus": 1 / math.ceil(slots / cards) if cards else 0, "max_restarts": 0, "max_concurrency": 2}
        self.post = ray.remote(**needs)(Post)
        self.shares: list[dict[str, Any]] = [{"threads": threads} for _ in range(slots)]
        self.place = f"{slots} at a time on a Ray cluster of {len(nodes)} nodes, each with {threads} thread{'s' * (threads > 1)}" + " and a GPU" * bool(cards)
        self.posts: dict[int, Any] = {}  # by slot
        self.pending: dict[Any, tuple[str, int]] = {}  # (trial, slot) by the promise of its exit code

    def start(self, order: Order, slot: int) -> None:
        """Run one trial; Ray finds the node."""
        if slot not in self.posts:
            self.posts[slot] = self.post.remote(self.code, self.log)
        self.pending[self.posts[slot].run.remote(order)] = (order.id, slot)

    def wait(self, timeout: float) -> list[tuple[str, int]]:
        """(id, exit code) of trials that ended; one whose node or process died counts as killed."""
        ended: list[tuple[str, int]] = []
        ready, _ = self.ray.wait(list(self.pending), timeout=timeout) if self.pending else ([], [])
        for promise in ready:
            id, slot = self.pending.pop(promise)
            try:
                ended.append((id, self.ray.get(promise)))
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OneTorchError):
                    raise error.cause from None
                raise RunError(f"the trial {id} could not be started: {error.cause!r}") from error
            except self.ray.exceptions.RayError:
                self.idle(slot)  # the next trial of this slot gets a new actor, on a node that lives
                ended.append((id, -signal.SIGKILL))
        return ended

    def tell(self, number: int) -> None:
        """Send a signal to every trial that runs; one that waits for a node is given up."""
        for slot in {slot for _, slot in self.pending.values()}:
            told = self.posts[slot].tell.remote(number)
            if number == signal.SIGKILL or not self.ray.wait([told], timeout=2)[0]:
                self.ray.kill(self.posts[slot])

    def idle(self, slot: int) -> None:
        """Give back what the slot holds: a trial of another slot may be waiting for a node with room."""
        if slot in self.posts:
            self.ray.kill(self.posts.pop(slot))

    def close(self) -> None:
        """Kill what still runs and leave the cluster."""
        for slot in list(getattr(self, "posts", ())):
            self.idle(slot)
        if self.ours:
            self.ray.shutdown()

"""A headless Chromium, driven through its debugging pipe: open a page, evaluate JavaScript in it, move the mouse, take a picture. Standard library only."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
]


class Browser:
    """One page of a fresh Chromium; what it requested over a network, logged as an error or opened as a dialog is in `events`."""

    def __init__(self, width: int = 1300, height: int = 1400, timeout: float = 60) -> None:
        assert CHROMIUM is not None, "no chromium on this machine"
        self.timeout = timeout
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()

        def wire() -> None:
            # The debugging pipe is file descriptors 3 (commands) and 4 (answers). Both are moved up first, lest one overwrite the other.
            a, b = os.dup(to_read), os.dup(to_write)
            os.dup2(os.dup(a) if a in (3, 4) else a, 3)
            os.dup2(os.dup(b) if b in (3, 4) else b, 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=wire, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.number = 0
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result."""
        self.number += 1
        self._send(self.number, method, parameters)
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":
                self._send(0, "Page.handleJavaScriptDialog", {"accept": True})

    def _send(self, number: int, method: str, parameters: dict[str, Any]) -> None:
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write_end, json.dumps(message).encode() + b"\0")

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.read_end, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("chromium does not answer" if not ready else "chromium has gone")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path) -> None:
        """Open a file and wait until its curves are drawn, or it says that it could not draw them, or its static part is all there is."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + self.timeout
        said = "document.documentElement.dataset"
        drawn = f"(!document.getElementById('data') || !!{said}.ready || !!{said}.failed)"
        while not self.js(f"location.protocol === 'file:' && document.readyState === 'complete' && {drawn}"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{page} was not drawn in {self.timeout} s")
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, target: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        target.write_bytes(base64.b64decode(data))

    def requests(self) -> list[str]:
        """What the page asked for beside itself and data within it."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [u for u in urls if not u.startswith(("data:", "blob:", "about:", "file:"))]

    def problems(self) -> list[str]:
        """Exceptions, console errors, refused loads and dialogs."""
        bad = []
        for event in self.events:
            what, parameters = event.get("method"), event.get("params", {})
            error = (what == "Runtime.consoleAPICalled" and parameters["type"] == "error") or (
                what == "Log.entryAdded" and parameters["entry"]["level"] == "error"
            )
            if error or what in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                bad.append(json.dumps(parameters)[:500])
        return bad

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(10)
        os.close(self.read_end)
        os.close(self.write_end)
        self.profile.cleanup()

"""Starting the processes of a run that works in several (`distributed.py`). Imports no torch."""

import os
import signal
import subprocess
import sys
import tempfile
import time

GRACE = 25.0  # seconds that the first process has to end after another has failed


def launch(words: list[str], count: int) -> int:
    """Run `onetorch WORDS` in so many processes, pass signals on to the first, and return its exit code; all end when one fails."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}  # nobody outside can connect
    told: list[int] = []
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="onetorch-") as folder:
            for i in range(count):
                command = [sys.executable, "-m", "onetorch", *words, "--worker", f"{i},{count},{folder}/store"]
                # In a session of their own, so that Ctrl-C comes to them through us alone; only the first speaks.
                output = None if i == 0 else subprocess.DEVNULL
                processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True))
            while all(p.poll() is None for p in processes) or (processes[0].poll() is None and not any(p.poll() for p in processes)):
                for number in told:
                    processes[0].send_signal(number)
                told.clear()
                time.sleep(0.05)
            # Done, or the first that failed decides; what waits for it would wait for ever.
            end = time.perf_counter() + (GRACE if processes[0].poll() is None else 1.0)
            while any(p.poll() is None for p in processes) and time.perf_counter() < end:
                time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [p.returncode for p in processes]
    code = codes[0] or next((c for c in codes if c), 0)
    return code if code >= 0 else 128 - code

"""The Triton kernels without a GPU: the checks of the products and of attention once more, through Triton's interpreter.

The interpreter must be chosen before Triton is first imported, so they run in a process of their own; conftest.py puts the kernels in. It takes
milliseconds for what a GPU does in microseconds, so of the tables only random cases are taken.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = {
    "test_products.py": "random_cases or never_read or empty or autocast or in_one_piece or vmap",
    "test_attention.py": "random_cases or never_read or empty or anything or strided or merge or overflow or (test_dropout and None)",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA builds of torch or the extra `triton`")
@pytest.mark.parametrize("file", CHECKS)
def test_kernels_through_the_interpreter(file):
    root = HERE.parent.parent
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-k", f"triton and ({CHECKS[file]})", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # numpy, on which the interpreter runs, warns of each NaN that a check puts in
    done = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning"], cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout

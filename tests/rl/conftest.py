"""Makes `rl_tasks` importable by its name, as the entry points of its environments are looked up, in worker processes too; and registers them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import rl_tasks  # noqa: F401

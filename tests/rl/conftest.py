"""Makes `rl_tasks` importable by its name: the entry points of its environments are looked up by name, in worker processes too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

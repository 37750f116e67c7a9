"""What pytest looks into here: with --doctest-modules it would import every file, also those that tests share and import by their own name."""

from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None

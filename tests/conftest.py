"""What tests train is nobody's own code afterwards: the notes of it go into a folder of the session's."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def notes_of_own_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield

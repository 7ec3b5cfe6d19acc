"""The emulator for tests. pytest puts this directory on sys.path: `from modal_emulator import ...`.

There is no __init__.py here, and must not be: `tests` is on sys.path too, and would then have a
package `modal` in front of the real one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import modal
import pytest
from modal_emulator import Emulator

TOY = Path(__file__).parent / "toy" / "toy_app.py"


@pytest.fixture(scope="module")
def new_emulator() -> Iterator[Callable[..., Emulator]]:
    """Makes emulators with the options of one's choice; all are closed after the module."""
    made: list[Emulator] = []

    def new(**options: object) -> Emulator:
        made.append(Emulator(**options))
        return made[-1]

    yield new
    for emulator in made:
        emulator.close()


@pytest.fixture(scope="module")
def emulator(new_emulator: Callable[..., Emulator]) -> Emulator:
    return new_emulator()


@pytest.fixture(scope="module")
def modal_client(emulator: Emulator) -> Iterator[modal.Client]:
    """A real client of the emulator in this process."""
    with emulator.client() as client:
        yield client


@pytest.fixture
def modal_env(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Makes code that reads its credentials from the environment talk to the emulator."""
    with emulator.in_this_process(monkeypatch):
        yield emulator

"""A KreaResource whose EvoLink is an emulator in this process."""

import atexit
import threading
from typing import Any, Final

from pydantic import Field

from krea_dagster.application.krea import Krea
from krea_dagster.emulator import Emulator
from krea_dagster.plugin.resource import KreaResource

#: Seconds that a task takes.
_LATENCY_S: Final = 0.01

#: The emulators of this process by storage root: Dagster copies a resource for each run.
_running: Final[dict[str, Emulator]] = {}
_lock: Final = threading.Lock()


class FakeKrea(KreaResource):
    """A ``KreaResource`` for tests: it needs no key, costs nothing, and draws synthetic images.

    Everything else is real: the journal, the files, budgets and manifests. A prompt may ask for a
    fault, such as ``[emulator: refuse]``, ``[emulator: fail]`` or ``[emulator: stuck]``. Each
    storage root has an emulator, and so an account, of its own.

    Example::

        def test_hero(tmp_path):
            krea = FakeKrea(storage=str(tmp_path))
            hero(dg.build_asset_context(), krea=krea)
            assert krea.bought == ["a lighthouse in fog"]
    """

    storage: str = Field(description="A folder of the test, such as tmp_path.")

    def krea(self) -> Krea:
        """Return the application with these settings, over the emulator."""
        settings = super().krea().settings
        return Krea(
            settings.model_copy(
                update={
                    "api_key": "emulator",
                    "base_url": self.evolink.url,
                    "emulator": False,
                    "expected_latency_s": _LATENCY_S,
                }
            )
        )

    @property
    def evolink(self) -> Emulator:
        """The emulator, to script faults and to read what it has received."""
        with _lock:
            if self.storage not in _running:
                emulator = Emulator(latency_s=_LATENCY_S, latency_jitter=0.0)
                emulator.start()
                _running[self.storage] = emulator
            return _running[self.storage]

    @property
    def bought(self) -> list[str]:
        """The prompts of all tasks that were created, in their order."""
        return [str(task["prompt"]) for task in self._stats()["tasks"]]

    @property
    def credits_charged(self) -> float:
        """What the account was charged."""
        return sum(int(task["charged_units"]) for task in self._stats()["tasks"]) / 10_000

    def close(self) -> None:
        """Stop the emulator; at the end of the process this is done for all."""
        with _lock:
            emulator = _running.pop(self.storage, None)
        if emulator is not None:
            emulator.stop()

    def _stats(self) -> dict[str, Any]:
        return self.evolink.stats()


@atexit.register
def _stop_all() -> None:
    while _running:
        _running.popitem()[1].stop()

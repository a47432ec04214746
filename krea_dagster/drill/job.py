"""What a worker process is told: which rows, from where, under which policy, and where to die."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from krea_dagster.models import ImageRequest

#: The key of the emulator's account.
API_KEY: Final = "drill"
#: The one partition of the drill's rows.
PARTITION: Final = "drill"


@dataclass(frozen=True)
class Job:
    """One life of a worker process.

    It carries the first ``rows`` of the drill's requests, over the journal and the files in
    ``folder``. It kills itself when it passes ``edge`` for the ``passage``-th time. ``policy``
    are fields of the engine's Policy that differ from the default. ``latency_s`` is what a task
    is known to take. ``resolutions`` are a person's decisions, by request key, as text.
    """

    number: int
    folder: str
    url: str
    rows: int
    seed: int
    latency_s: float
    edge: str = ""
    passage: int = 1
    max_in_flight: int = 64
    policy: Mapping[str, Any] = field(default_factory=dict)
    resolutions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def journal_url(folder: Path) -> str:
    """The drill's journal."""
    return f"sqlite:///{storage_root(folder) / 'journal.db'}"


def storage_root(folder: Path) -> Path:
    """Where the drill's images are."""
    return folder / "krea"


def write_requests(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Write what the workers are to buy, in their order."""
    text = json.dumps([asdict(request) for request in requests])
    (folder / "requests.json").write_text(text, encoding="utf-8")


def read_requests(folder: Path) -> list[ImageRequest]:
    """Read what the workers are to buy."""
    rows = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    return [ImageRequest(**row) for row in rows]

"""What a worker process is told: which rows, from where, under which policy, and where to die."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from krea_dagster.engine.policy import OnUnknown
from krea_dagster.models import ImageRequest

#: The key of the emulator's account, and that of another one.
API_KEY: Final = "drill"
OTHER_API_KEY: Final = "drill-other"
#: The one partition of the drill's rows.
PARTITION: Final = "drill"


@dataclass(frozen=True)
class Place:
    """Where a drill keeps its things: the images, and the journal apart from them."""

    folder: Path

    @property
    def storage(self) -> Path:
        """The storage root."""
        return self.folder / "krea"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.folder / "journal" / "journal.db"

    @property
    def journal_url(self) -> str:
        """The journal, as the engine is told."""
        return f"sqlite:///{self.journal}"

    @property
    def prompts(self) -> Path:
        """The prompt table, of drills that have one."""
        return self.folder / "prompts.parquet"


@dataclass(frozen=True)
class Job:
    """One life of a worker process.

    It carries the first ``rows`` of the drill's requests, with the journal and the files of the
    ``folder``'s Place and the account of ``api_key``. It kills itself when it passes ``edge`` for
    the ``passage``-th time. ``policy`` are fields of the engine's Policy that differ from the
    default. ``latency_s`` is what a task is known to take. ``resolutions`` are a person's
    decisions, by request key, as text.

    Its wall clock is ``ahead_s`` ahead, and is set by ``step_s`` when it was looked at for the
    ``step_after``-th time.

    With ``again`` it is no run over the requests but the command ``materialize --again`` over the
    place's prompt table; with an empty one, plain ``materialize``.
    """

    number: int
    folder: str
    url: str
    rows: int
    seed: int
    latency_s: float
    edge: str = ""
    passage: int = 1
    api_key: str = API_KEY
    on_unknown: OnUnknown = "replay"
    max_in_flight: int = 64
    policy: Mapping[str, Any] = field(default_factory=dict)
    resolutions: Mapping[str, str] = field(default_factory=dict)
    ahead_s: float = 0.0
    step_s: float = 0.0
    step_after: int = 0
    again: Sequence[str] | None = None

    @property
    def place(self) -> Place:
        """Where its journal and files are."""
        return Place(Path(self.folder))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def write_requests(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Write what the workers are to buy, in their order."""
    text = json.dumps([asdict(request) for request in requests])
    (folder / "requests.json").write_text(text, encoding="utf-8")


def read_requests(folder: Path) -> list[ImageRequest]:
    """Read what the workers are to buy."""
    rows = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    return [ImageRequest(**row) for row in rows]

"""A worker process's instructions, and the files of a drill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from krea_dagster.engine.policy import OnUnknown
from krea_dagster.models import ImageRequest

#: The key of the emulator's account, and the key of another account.
API_KEY: Final = "drill"
OTHER_API_KEY: Final = "drill-other"
#: The one partition of the drill's rows.
PARTITION: Final = "drill"


@dataclass(frozen=True)
class DrillPaths:
    """The files of a drill, below one folder. The journal is outside the storage root."""

    folder: Path

    @property
    def storage(self) -> Path:
        """The storage root."""
        return self.folder / "krea"

    @property
    def journal(self) -> Path:
        """The journal's SQLite file."""
        return self.folder / "journal" / "journal.db"

    @property
    def journal_url(self) -> str:
        """The journal's SQLAlchemy URL."""
        return f"sqlite:///{self.journal}"

    @property
    def prompts(self) -> Path:
        """The prompt table, of drills that have one."""
        return self.folder / "prompts.parquet"


@dataclass(frozen=True)
class WorkerJob:
    """The instructions of one worker process.

    The worker buys the first ``rows`` of the drill's requests, with the account of ``api_key``. It
    kills itself when it passes ``edge`` for the ``passage``-th time. ``policy`` holds fields of
    the engine's Policy that differ from the default. ``latency_s`` is how long a task is known to
    take. ``resolutions`` are a person's decisions, by request key, as text.

    The worker's wall clock is ``ahead_s`` ahead, and is moved by ``step_s`` when it is read for the
    ``step_after``-th time.

    With ``again`` the worker runs the command ``materialize --again`` over the drill's prompt
    table instead; with an empty ``again``, plain ``materialize``.
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
    def paths(self) -> DrillPaths:
        """The drill's files."""
        return DrillPaths(Path(self.folder))


def write_requests(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Write the requests that the workers buy, in order."""
    text = json.dumps([asdict(request) for request in requests])
    (folder / "requests.json").write_text(text, encoding="utf-8")


def read_requests(folder: Path) -> list[ImageRequest]:
    """Read the requests that the workers buy, in order."""
    rows = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    return [ImageRequest(**row) for row in rows]

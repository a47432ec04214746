"""The plan of a drill: its requests, kills and faults, and the world it is held in. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from krea_dagster.drill.edges import Edge, edges_under
from krea_dagster.drill.fork_server_client import COMMAND
from krea_dagster.drill.worlds import WorldPart
from krea_dagster.engine.policy import OnUnknown
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.requests import request_key

#: Server faults, at a small rate, while workers are killed.
KILL_FAULTS: Final = (
    "drop_before_create", "drop_after_create", "reset_after_create", "garbage_after_create", "500",
    "500_after_create", "502_html", "502_html_after_create", "no_id", "html_200",
    "429_no_retry_after", "no_results", "read_drop", "read_500", "batch_drop", "batch_502_html",
    "file_drop", "truncated", "file_html_200",
)  # fmt: skip
#: Server faults of ``--storm``, all at once.
STORM_FAULTS: Final = (
    "drop_before_create", "drop_after_create", "429", "429_no_retry_after", "500",
    "500_after_create", "502_html", "502_html_after_create", "stuck", "no_results",
    "unknown_status", "unknown_final_status", "fail", "unknown_error_code", "read_drop", "read_429",
    "read_500", "read_502_html", "batch_drop", "batch_500", "batch_502_html", "truncated",
    "file_html_200", "black", "wrong_dimensions",
)  # fmt: skip

#: Share of the kills at edges; the others are at random times.
_AT_EDGES: Final = 0.75
#: Kills per episode, and the most episodes.
_KILLS_PER_EPISODE: Final = 8
_MOST_EPISODES: Final = 20
#: Limits of a drill of ``materialize --again``: each command takes seconds.
_MOST_REGENERATION_ROWS: Final = 30
_MOST_REGENERATIONS: Final = 20
_KILLS_PER_REGENERATION: Final = 4
_SUBJECTS: Final = ("a lighthouse", "a heron", "a tram", "a greenhouse", "a market", "a glacier")
_LIGHTS: Final = ("at dawn", "in fog", "under neon", "at noon", "by candlelight", "in the rain")


@dataclass(frozen=True)
class DrillPlan:
    """The plan of one drill.

    ``honours_key``: whether the server honours the Idempotency-Key. ``rates`` are faults of the
    server by name, from 0 to 1, all at once. ``workers`` processes work at the same time on the
    same rows. A worker waits ``patience_s`` for a task before it detaches from it, and counts as
    hung after ``hung_after_s``. Workers are killed at ``edges``; if empty, at all edges and at
    random times. ``command`` starts the fork server. ``part`` is the part of a world that the
    drill is held in.
    """

    requests: int = 200
    kills: int = 60
    workers: int = 1
    on_unknown: OnUnknown = "replay"
    honours_key: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    patience_s: float = 4.0
    edges: Sequence[str] = ()
    hung_after_s: float | None = None
    command: Sequence[str] = COMMAND
    part: WorldPart = WorldPart()  # noqa: RUF009 - it is frozen

    def of(self, part: WorldPart) -> DrillPlan:
        """Return the plan of one part of a world."""
        workers = part.workers or self.workers
        requests, kills = round(self.requests * part.share), round(self.kills * part.share)
        if part.episode is not None:
            workers = 1
        if part.regenerates:
            workers, requests = 1, min(_MOST_REGENERATION_ROWS, requests)
            kills = min(_MOST_REGENERATIONS, max(1, kills // _KILLS_PER_REGENERATION))
        rates = self.rates if part.rates is None else part.rates
        return replace(
            self,
            requests=max(workers, requests),
            kills=kills if part.kills else 0,
            workers=workers,
            on_unknown=part.on_unknown or self.on_unknown,
            honours_key=self.honours_key if part.honours_key is None else part.honours_key,
            rates=rates if part.kills else {},
            part=part,
        )

    @property
    def episodes(self) -> int:
        """The number of episodes among the kills."""
        if self.part.episode is None:
            return 0
        return min(_MOST_EPISODES, max(1, self.kills // _KILLS_PER_EPISODE))


def requests_of(plan: DrillPlan) -> list[ImageRequest]:
    """Return the drill's requests: the same for the same seed and number."""
    rng = random.Random(plan.seed)  # noqa: S311 - nothing secret
    requests = []
    for number in range(plan.requests):
        prompt = f"{rng.choice(_SUBJECTS)} {rng.choice(_LIGHTS)}, drill {plan.seed}/{number}"
        key = request_key(
            prompt=prompt, size="1:2", quality="1K", seed=number + 1, nsfw_check=False
        )
        requests.append(
            ImageRequest(key, prompt, "1:2", "1K", number + 1, nsfw_check=False, attempt=0)
        )
    return requests


@dataclass
class Kill:
    """A planned kill: at an edge, or at a random time (None)."""

    edge: Edge | None
    tries: int = 0


def plan_kills(
    count: int, policy: OnUnknown, rng: random.Random, names: Collection[str] = ()
) -> list[Kill]:
    """Plan ``count`` kills: three of four at edges, and each edge once before any comes twice.

    With ``names`` all kills are at these edges.
    """
    edges = [edge for edge in edges_under(policy) if not names or edge.name in names]
    at_edges = count if names else round(count * _AT_EDGES)
    chosen: list[Edge] = []
    while len(chosen) < at_edges:
        cycle = list(edges)
        rng.shuffle(cycle)
        chosen += cycle[: at_edges - len(chosen)]
    kills = [Kill(edge) for edge in chosen] + [Kill(None) for _ in range(count - at_edges)]
    rng.shuffle(kills)
    return kills

"""What a drill is to do: requests, kills, faults, and where it is held. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from krea_dagster.drill.edges import Edge, edges_under
from krea_dagster.drill.fork_server_client import COMMAND
from krea_dagster.drill.worlds import Part
from krea_dagster.engine.policy import OnUnknown
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.requests import request_key

#: Faults that strike at a small rate while workers are killed.
KILL_FAULTS: Final = (
    "drop_before_create",
    "drop_after_create",
    "reset_after_create",
    "garbage_after_create",
    "500",
    "500_after_create",
    "502_html",
    "502_html_after_create",
    "no_id",
    "html_200",
    "429_no_retry_after",
    "no_results",
    "read_drop",
    "read_500",
    "batch_drop",
    "batch_502_html",
    "file_drop",
    "truncated",
    "file_html_200",
)
#: Faults of the storm: all at once.
STORM_FAULTS: Final = (
    "drop_before_create",
    "drop_after_create",
    "429",
    "429_no_retry_after",
    "500",
    "500_after_create",
    "502_html",
    "502_html_after_create",
    "stuck",
    "no_results",
    "unknown_status",
    "unknown_final_status",
    "fail",
    "unknown_error_code",
    "read_drop",
    "read_429",
    "read_500",
    "read_502_html",
    "batch_drop",
    "batch_500",
    "batch_502_html",
    "truncated",
    "file_html_200",
    "black",
    "wrong_dimensions",
)

#: Share of the kills that are at edges; the others are at random times.
_AT_EDGES: Final = 0.75
#: Kills for each episode, and the most episodes.
_KILLS_BETWEEN: Final = 8
_MOST_EPISODES: Final = 20
_MOST_WISH_ROWS: Final = 30
_MOST_WISHES: Final = 20
#: Kills in place of which there is a wish, where wishes are made.
_KILLS_A_WISH: Final = 4
_SUBJECTS: Final = ("a lighthouse", "a heron", "a tram", "a greenhouse", "a market", "a glacier")
_LIGHTS: Final = ("at dawn", "in fog", "under neon", "at noon", "by candlelight", "in the rain")


@dataclass(frozen=True)
class Plan:
    """What a drill does.

    ``honours_key``: whether the server honours the Idempotency-Key. ``rates`` are faults of
    the server by name, from 0 to 1, all at once. ``workers`` work at the same time on the same
    rows. ``patience_s`` is how long a worker waits for a task before it detaches from it.
    ``edges`` are those at which workers are killed, all and random times where it is
    empty. ``life_s`` is how long a worker may live before it counts as hung. ``command`` starts the
    fork server. ``part`` is that of a world where it is held.
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
    life_s: float | None = None
    command: Sequence[str] = COMMAND
    part: Part = Part()  # noqa: RUF009 - it is frozen

    def of(self, part: Part) -> Plan:
        """The plan of one part of a world."""
        workers = part.workers or self.workers
        requests, kills = round(self.requests * part.share), round(self.kills * part.share)
        if part.episode is not None:
            workers = 1
        if part.wishes:  # each is the whole command, which takes seconds
            workers, requests = 1, min(_MOST_WISH_ROWS, requests)
            kills = min(_MOST_WISHES, max(1, kills // _KILLS_A_WISH))
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
        """How many episodes there are among the kills."""
        if self.part.episode is None:
            return 0
        return min(_MOST_EPISODES, max(1, self.kills // _KILLS_BETWEEN))


def requests_of(plan: Plan) -> list[ImageRequest]:
    """The drill's requests: the same for the same seed and number."""
    drawn = random.Random(plan.seed)  # noqa: S311 - nothing secret
    requests = []
    for number in range(plan.requests):
        prompt = f"{drawn.choice(_SUBJECTS)} {drawn.choice(_LIGHTS)}, drill {plan.seed}/{number}"
        what = {"prompt": prompt, "size": "1:2", "quality": "1K", "seed": number + 1}
        key = request_key(
            prompt=prompt, size="1:2", quality="1K", seed=number + 1, nsfw_check=False
        )
        requests.append(ImageRequest(request_key=key, nsfw_check=False, attempt=0, **what))  # type: ignore[arg-type]  # the values' types are mixed
    return requests


@dataclass
class Kill:
    """A kill that is to be made: at an edge, or at a random time (None)."""

    edge: Edge | None
    tries: int = 0


def plan_kills(
    count: int, policy: OnUnknown, drawn: random.Random, names: Collection[str] = ()
) -> list[Kill]:
    """So many kills: three of four at edges, each edge once before any is twice.

    With ``names`` all are at these edges.
    """
    edges = [edge for edge in edges_under(policy) if not names or edge.name in names]
    at_edges = count if names else round(count * _AT_EDGES)
    chosen: list[Edge] = []
    while len(chosen) < at_edges:
        cycle = list(edges)
        drawn.shuffle(cycle)
        chosen += cycle[: at_edges - len(chosen)]
    kills = [Kill(edge) for edge in chosen] + [Kill(None) for _ in range(count - at_edges)]
    drawn.shuffle(kills)
    return kills

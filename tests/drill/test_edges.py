"""Where the drill kills: around every event of the state machine, and between them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from krea_dagster.drill.edges import (
    BEFORE_POST,
    EDGES,
    TASK_EXISTS,
    after,
    before,
    edges_under,
)
from krea_dagster.drill.plan import KILL_FAULTS, STORM_FAULTS, plan_kills
from krea_dagster.emulator import FAULTS
from krea_dagster.engine.policy import OnUnknown
from krea_dagster.engine.states import Event

POLICIES: tuple[OnUnknown, ...] = ("replay", "hold")


def test_every_event_of_the_state_machine_has_an_edge_before_and_after_its_commit() -> None:
    """But for a file that is found: that follows a worker which was killed before it said so."""
    names = {edge.name for edge in EDGES}
    events = set(Event) - {Event.FOUND}
    assert {before(event) for event in events} | {after(event) for event in events} <= names


def test_an_edge_has_one_name_and_can_be_reached_under_some_policy() -> None:
    assert max(Counter(edge.name for edge in EDGES).values()) == 1
    assert all(edge.policies for edge in EDGES)


def test_only_what_a_policy_rules_out_is_left_out_under_it() -> None:
    left_out = {
        policy: {edge.name for edge in EDGES} - {edge.name for edge in edges_under(policy)}
        for policy in POLICIES
    }
    assert left_out == {
        "replay": {before(Event.RELEASED), after(Event.RELEASED)},
        "hold": {before(Event.REPLAYING), after(Event.REPLAYING)},
    }


def test_every_fault_of_the_drill_is_one_that_the_emulator_knows() -> None:
    wanted = {fault for edge in EDGES for fault in edge.faults} | {*KILL_FAULTS, *STORM_FAULTS}
    assert wanted <= set(FAULTS)


@pytest.mark.parametrize("policy", POLICIES)
def test_sixty_kills_are_enough_to_plan_every_edge_and_fifteen_random_times(
    policy: OnUnknown,
) -> None:
    kills = plan_kills(60, policy, random.Random(1))
    edges = [kill.edge.name for kill in kills if kill.edge is not None]
    assert set(edges) == {edge.name for edge in edges_under(policy)}
    assert (len(kills), len(edges)) == (60, 45)


def test_the_same_seed_plans_the_same_kills() -> None:
    first, again = (plan_kills(40, "replay", random.Random(7)) for _ in range(2))
    assert [kill.edge for kill in first] == [kill.edge for kill in again]


def test_kills_can_be_kept_to_some_edges() -> None:
    kills = plan_kills(5, "hold", random.Random(1), [TASK_EXISTS, BEFORE_POST])
    names = Counter(kill.edge.name for kill in kills if kill.edge is not None)
    assert sorted(names.values()) == [2, 3]
    assert set(names) == {TASK_EXISTS, BEFORE_POST}

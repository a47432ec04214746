"""When the batch endpoint is used: it may be missing, appear, and disappear."""

from __future__ import annotations

import pytest

from krea_dagster.api.batch_support import BATCH_TRIES, OFF_MAX_S, OFF_S, BatchSupport


def test_the_endpoint_is_untried_at_first_and_works_once_it_has_answered() -> None:
    assert BatchSupport().supported(0.0) is None
    assert BatchSupport().answered().supported(1e9) is True


@pytest.mark.parametrize("before", [BatchSupport(), BatchSupport().answered()])
def test_a_missing_endpoint_is_not_used_for_a_while_and_then_untried(before: BatchSupport) -> None:
    use = before.missing(100.0)
    assert use.supported(100.0 + OFF_S - 0.1) is False
    assert use.supported(100.0 + OFF_S) is None


def test_the_pause_doubles_up_to_ten_minutes_until_a_batch_is_answered() -> None:
    use, now_s, pauses = BatchSupport(), 0.0, []
    for _ in range(6):
        use = use.missing(now_s)
        assert use.off_until_s is not None
        pauses.append(use.off_until_s - now_s)
        now_s = use.off_until_s
    assert pauses == [60, 120, 240, 480, 600, 600]
    assert pauses[-1] == OFF_MAX_S
    again = use.answered().missing(now_s)
    assert again.off_until_s == now_s + OFF_S


@pytest.mark.parametrize("before", [BatchSupport(), BatchSupport().answered()])
def test_unusable_answers_in_a_row_start_a_pause(before: BatchSupport) -> None:
    use = before
    for _ in range(BATCH_TRIES - 1):
        use = use.not_answered(0.0)
        assert use.supported(0.0) is before.supported(0.0)
    assert use.answered().not_answered(0.0).supported(0.0) is True
    use = use.not_answered(0.0)
    assert use.supported(0.0) is False
    assert use.supported(OFF_S) is None


def test_one_unusable_answer_after_a_pause_starts_the_next() -> None:
    use = BatchSupport()
    for _ in range(BATCH_TRIES):
        use = use.not_answered(0.0)
    use = use.not_answered(OFF_S)
    assert use.supported(OFF_S + 2 * OFF_S - 0.1) is False


def test_simultaneous_answers_start_one_pause() -> None:
    use = BatchSupport().answered().missing(10.0)
    assert use.missing(10.5) == use.not_answered(11.0) == use

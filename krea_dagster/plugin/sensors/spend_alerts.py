"""The sensor that posts the warnings in the spend tables, each once, by a user's function."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

import dagster as dg

from krea_dagster import redact
from krea_dagster.application.spend_alerts import post_alerts
from krea_dagster.application.spend_warnings import recent_warnings
from krea_dagster.engine.budget import Budget
from krea_dagster.errors import KreaError
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.change_marks import mark_of_reports


def build_spend_alerts(
    post: Callable[..., Any],
    *,
    name: str | None = None,
    required_resource_keys: Collection[str] = (),
    soft_budgets: Sequence[str] = (),
    key_prefix: str | Sequence[str] = (),
    resource_key: str | None = None,
    minimum_interval_seconds: int = 60,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """Build a sensor that calls a function once for each warning in the spend tables.

    It looks when the job ``krea_spend`` has updated the tables, and on each new UTC day: give
    ``spend_schedule`` to the factory. A warning that grows is not posted again; one that ends and
    comes again is. What is posted is kept in the journal, so that no restart, and no second daemon
    or code location with the same journal, posts it twice.

    If the function raises an error, the tick fails, and the next one calls it again, also if the
    warning has ended meanwhile. A warning can be posted twice only if the process is killed between
    the function's return and the journal's next write.

    Args:
        post: Is called with a ``SpendWarning``, and with each required resource by its key.
        name: Name of the sensor; ``krea_spend_alerts`` with the prefix by default. Sensors with the
            same name post a warning once together, so several channels need several names.
        required_resource_keys: Resources of the code location that ``post`` takes.
        soft_budgets: Those that ``build_krea_definitions`` was given. Budgets of the resource are
            known anyway.
        key_prefix: The prefix that it was given.
        resource_key: Key of the ``KreaResource``; ``krea`` with the prefix by default.
        minimum_interval_seconds: Seconds between two ticks, and so between two attempts.
        default_status: On by default: it buys nothing, and starts no run.

    Returns:
        The sensor.

    Raises:
        ConfigError: for a malformed budget.

    Example::

        def post(warning: SpendWarning, slack: SlackResource) -> None:
            slack.get_client().chat_postMessage(channel="#finance", text=warning.text)

        alerts = build_spend_alerts(post, required_resource_keys={"slack"})
    """
    names = Names.of(key_prefix, resource_key=resource_key)
    channel = name or names.prefixed("krea_spend_alerts")
    budgets = [Budget.parse(text) for text in soft_budgets]
    daily = names.key("spend_daily")

    @dg.sensor(
        name=channel,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={names.resource_key, *required_resource_keys},
        description="Posts each warning in the spend tables once.",
    )
    def spend_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        at = datetime.now(timezone.utc)
        mark = f"{at.date()}/{mark_of_reports(context.instance, [daily])}"
        if mark == context.cursor:
            return dg.SkipReason("The spend tables have not changed.")
        resources = {key: getattr(context.resources, key) for key in required_resource_keys}
        try:
            krea = krea_of(context, names.resource_key)
            found = recent_warnings(krea, budgets, now=at)
            if found is None:
                return dg.SkipReason("There are no spend tables; the job krea_spend makes them.")
            outcome = post_alerts(krea, channel, found, partial(post, **resources), at=at)
        except KreaError as error:
            return dg.SkipReason(str(error))
        if outcome.errors:
            raise _failure(outcome.errors, outcome.posted)
        return dg.SensorResult(
            skip_reason=f"Posted {outcome.posted} of {len(found)} warnings.",
            cursor=context.cursor if outcome.left else mark,
        )

    return spend_alerts


def _failure(errors: Sequence[Exception], posted: int) -> dg.Failure:
    """Return the failure of a tick, with the first error."""
    said = redact.text(f"{type(errors[0]).__name__}: {errors[0]}")
    failure = dg.Failure(
        f"{len(errors)} of {posted + len(errors)} warnings could not be posted, and will be tried "
        f"again: {said}"
    )
    failure.__cause__ = redact.safe_cause(errors[0])
    return failure

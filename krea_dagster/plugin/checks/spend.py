"""The check of charges against the published prices, and against a limit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import digests_from_hex, first_of_each
from krea_dagster.engine.budget import PUBLISHED_UNITS
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from krea_dagster.models import UNITS_PER_CREDIT, credits_from_units, parse_cap, units_from_credits
from krea_dagster.plugin.checks.findings import RowFindings
from krea_dagster.plugin.checks.manifest_check import (
    CheckedManifests,
    common_metadata,
    manifest_check,
)
from krea_dagster.plugin.checks.sampling import with_digests

_COLUMNS: Final = ("request_key", "status", "quality", "credits_charged")

#: States that the server does not charge.
_FREE: Final = pa.array([State.FAILED.value, State.REFUSED.value])


def build_spend_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    most_credits: float | None = None,
    tolerance: float = 0.0,
    prices: Mapping[str, float] | None = None,
) -> dg.AssetChecksDefinition:
    """Build the check ``spend_expected``: no image cost more than its price.

    A higher charge, or a charge without an image, is a warning. Rows with equal requests are one
    purchase.

    Args:
        manifest_key: Key of the manifest's asset.
        resource_key: Key of the ``KreaResource``.
        most_credits: Maximum credits of one partition, for all runs; above it is an error.
        tolerance: Share above the price that is accepted; 0.1 is a tenth.
        prices: Credits per image by quality; the published ones by default.

    Returns:
        The check.

    Raises:
        ConfigError: for a negative number.

    Example::

        build_krea_definitions(
            ..., checks=[functools.partial(build_spend_check, most_credits=50)]
        )
    """
    if tolerance < 0 or (most_credits is not None and most_credits < 0):
        raise ConfigError("tolerance and most_credits must not be negative")
    published = {name: credits_from_units(units) for name, units in PUBLISHED_UNITS.items()}
    expected = {
        name: units_from_credits(credits)
        for name, credits in (published if prices is None else prices).items()
    }
    most_units = None if most_credits is None else parse_cap(most_credits, "most_credits")
    limits = {name: int(units * (1 + tolerance)) for name, units in expected.items()}

    def check(manifests: CheckedManifests) -> dg.AssetCheckResult:
        findings, total, over = RowFindings(), _Spent(), list[str]()
        for name in manifests.names:
            spent = _spent(manifests, name, expected, limits, findings)
            total += spent
            if most_units is not None and spent.charged_units > most_units:
                over.append(
                    f"partition {spent.partition} cost "
                    f"{credits_from_units(spent.charged_units):g} credits, more than "
                    f"{credits_from_units(most_units):g}"
                )
        charged = credits_from_units(total.charged_units)
        wanted = credits_from_units(total.expected_units)
        said = f"{charged:g} credits charged, {wanted:g} expected for {total.bought} images"
        more = f"; and {len(over) - 3} more" if len(over) > 3 else ""
        parts = ["; ".join(over[:3]) + more] if over else []
        if findings.count:
            parts.append(f"{findings.count} rows cost more than expected: {findings.named()}")
        return dg.AssetCheckResult(
            passed=not parts,
            severity=dg.AssetCheckSeverity.ERROR if over else dg.AssetCheckSeverity.WARN,
            description=f"{said}. {'. '.join(parts)}" if parts else f"{said}.",
            metadata={
                **common_metadata(manifests, total.rows),
                "credits_charged": charged,
                "credits_expected": wanted,
                "charges_unknown": total.unknown,
                **({"partitions_over_limit": len(over)} if most_units is not None else {}),
                **findings.metadata(),
            },
        )

    return manifest_check(
        manifest_key,
        resource_key,
        name="spend_expected",
        description=(
            "No image cost more than its published price"
            + (
                "."
                if most_credits is None
                else f", and no partition cost more than {most_credits:g} credits."
            )
        ),
        check=check,
    )


@dataclass(frozen=True)
class _Spent:
    """The sums of a manifest; ``unknown`` counts purchases whose charge is not known yet."""

    partition: str = ""
    rows: int = 0
    bought: int = 0
    unknown: int = 0
    charged_units: int = 0
    expected_units: int = 0

    def __add__(self, other: "_Spent") -> "_Spent":
        return _Spent(
            "",
            self.rows + other.rows,
            self.bought + other.bought,
            self.unknown + other.unknown,
            self.charged_units + other.charged_units,
            self.expected_units + other.expected_units,
        )


def _spent(
    manifests: CheckedManifests,
    name: str,
    expected: Mapping[str, int],
    limits: Mapping[str, int],
    findings: RowFindings,
) -> _Spent:
    qualities = pa.array(list(expected), pa.string())
    highest = max(expected.values(), default=0)  # for an unknown quality
    price_of = np.array([*expected.values(), highest], np.int64)
    limit_of = np.array([*(limits[one] for one in expected), max(limits.values(), default=0)])
    digests = [np.empty((0, 32), np.uint8)]
    charges = [np.empty(0, np.int64)]
    prices = [np.empty(0, np.int64)]
    rows, partition = 0, ""
    for batch in manifests.batches_of(name, _COLUMNS):
        rows += batch.num_rows
        batch = with_digests(batch, "request_key")  # noqa: PLW2901 - other rows have no purchase
        if batch.num_rows and not partition:
            partition = str(batch.column("partition_key")[0])
        place = pc.index_in(batch.column("quality"), value_set=qualities).fill_null(len(expected))
        at = place.to_numpy().astype(np.int64)
        credits = batch.column("credits_charged").cast(pa.float64())
        known = credits.fill_null(0.0).to_numpy()
        units = np.rint(known * UNITS_PER_CREDIT).astype(np.int64)
        free = np.asarray(
            pc.is_in(batch.column("status"), value_set=_FREE).to_numpy(zero_copy_only=False), bool
        )
        above = (units > limit_of[at]) | (free & (units > 0))
        if above.any():
            findings.add(batch, pa.array(above), lambda row: _why(row, expected))
        digests.append(digests_from_hex(batch.column("request_key").cast(pa.string())))
        valid = np.asarray(credits.is_valid().to_numpy(zero_copy_only=False), bool)
        charges.append(np.where(valid, units, -1))
        prices.append(price_of[at])
    first, _ = first_of_each(np.concatenate(digests))
    charged, price = np.concatenate(charges)[first], np.concatenate(prices)[first]
    paid = charged > 0
    return _Spent(
        partition,
        rows,
        bought=int(paid.sum()),
        unknown=int((charged < 0).sum()),
        charged_units=int(charged[paid].sum()),
        expected_units=int(price[paid].sum()),
    )


def _why(row: Mapping[str, Any], expected: Mapping[str, int]) -> str:
    charged = f"{row['credits_charged']:g} credits charged"
    if row["status"] in (State.FAILED.value, State.REFUSED.value):
        return f"{charged}, but it {row['status']}"
    price = expected.get(row["quality"])
    if price is None:
        return f"{charged}, but the price of {row['quality']} is not known"
    return f"{charged} instead of {credits_from_units(price):g} for {row['quality']}"

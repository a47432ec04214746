"""Price, volume and mix add up to the change of a month, exactly, for each quality and in all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.spend.statements.variance import QualityCharge, variance

_CHARGES = st.dictionaries(
    st.sampled_from(["1K", "2K", "4K"]),
    st.builds(QualityCharge, st.integers(1, 5_000), st.integers(1, 10**9)),
)


@given(before=_CHARGES, after=_CHARGES)
def test_the_parts_are_the_difference(
    before: dict[str, QualityCharge], after: dict[str, QualityCharge]
) -> None:
    lines = variance(before, after)
    for line in lines:
        parts = line.volume_units + line.mix_units + line.price_units
        assert parts == line.after.units - line.before.units
    assert {line.quality for line in lines} == {*before, *after}


def test_each_part_has_its_meaning() -> None:
    def of(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[int]:
        charges = [
            {name: QualityCharge(count, count * price) for name, (count, price) in one.items()}
            for one in (before, after)
        ]
        lines = variance(*charges)
        return [
            sum(getattr(line, f"{part}_units") for line in lines)
            for part in ("volume", "mix", "price")
        ]

    assert of({"1K": (10, 4_500)}, {"1K": (20, 4_500)}) == [45_000, 0, 0]
    assert of({"1K": (10, 4_500)}, {"1K": (10, 4_800)}) == [0, 0, 3_000]
    both = {"1K": (10, 4_500), "2K": (10, 18_000)}
    assert of(both, {"1K": (5, 4_500), "2K": (15, 18_000)}) == [0, 67_500, 0]
    assert of({}, both) == [225_000, 0, 0]
    assert of(both, {}) == [-225_000, 0, 0]

"""The assets of the same project that make a prompt table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import dagster as dg

#: What Dagster takes as a dependency.
CoercibleToAssetDep: TypeAlias = (
    dg.AssetKey | str | Sequence[str] | dg.AssetsDefinition | dg.AssetSpec | dg.AssetDep
)


@dataclass(frozen=True)
class Upstream:
    """The assets that a prompt table is made by. They are foreign: nothing is reported on them."""

    deps: Sequence[dg.AssetDep] = ()

    @classmethod
    def of(cls, deps: Sequence[CoercibleToAssetDep]) -> "Upstream":
        """Return the upstream of a table, from what Dagster takes as dependencies."""
        # A spec reads them as Dagster does, also an asset definition with several keys.
        return cls(tuple(dg.AssetSpec("of", deps=deps).deps))

    @property
    def keys(self) -> list[dg.AssetKey]:
        """The keys of the assets."""
        return [dep.asset_key for dep in self.deps]

"""The names of one prompt table's assets, jobs, sensors and resources."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import dagster as dg

#: The last part of the manifest's asset key.
MANIFEST_ASSET: Final = "image_manifest"

#: The jobs' names without a key prefix.
JOB_NAME: Final = "krea_images"
SALVAGE_JOB_NAME: Final = "krea_salvage"


#: The tag of all assets of this package.
TAG: Final = "krea"


@dataclass(frozen=True)
class Names:
    """The key prefix of the assets, their group, and the key of the ``KreaResource``."""

    prefix: tuple[str, ...] = ()
    group_name: str = "krea"
    resource_key: str = "krea"

    @classmethod
    def of(
        cls,
        key_prefix: str | Sequence[str] = (),
        group_name: str | None = None,
        resource_key: str | None = None,
    ) -> "Names":
        """Return the names with a prefix, which is also the default of group and resource."""
        prefix = prefix_of(key_prefix)
        group = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(prefix)) or "krea"
        return cls(prefix, group_name or group, resource_key or cls(prefix).prefixed("krea"))

    def key(self, name: str) -> dg.AssetKey:
        """Return the key of an asset."""
        return dg.AssetKey([*self.prefix, name])

    def prefixed(self, name: str) -> str:
        """Return the name of a job, a sensor, an op or a resource."""
        return "_".join([*self.prefix, name])

    @property
    def manifest_key(self) -> dg.AssetKey:
        """The key of ``image_manifest``."""
        return self.key(MANIFEST_ASSET)


def prefix_of(key_prefix: str | Sequence[str]) -> tuple[str, ...]:
    """Return a key prefix as its parts; one text has a slash between them."""
    if isinstance(key_prefix, str):
        return tuple(part for part in key_prefix.split("/") if part)
    return tuple(key_prefix)

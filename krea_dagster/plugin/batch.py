"""What one run works on: the rows of its partitions, and the images that they ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from krea_dagster.manifest import manifest_table
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import (
    PlannedImage,
    PromptRows,
    PromptTable,
    partition_version,
    plan_images,
)


@dataclass(frozen=True)
class Batch:
    """The rows of some partitions, and the images that they ask for, at their attempts."""

    keys: Sequence[str]
    rows: PromptRows
    images: tuple[PlannedImage, ...]

    @classmethod
    def read(
        cls,
        table: PromptTable,
        keys: Sequence[str] | None,
        krea: KreaResource,
        *,
        to_buy: bool = False,
    ) -> "Batch":
        """Read the partitions, or all, and where they are ``to_buy``, check that one can.

        In that order: a bad table makes nothing, not even a journal. Raises PromptTableError,
        ConfigError or JournalError.
        """
        rows = table.read(keys)
        if to_buy:
            krea.check()
        return cls(keys or [], rows, tuple(plan_images(rows.rows, krea.attempts())))

    def ask_again(self, config: KreaImagesConfig, krea: KreaResource, raised_by: str) -> "Batch":
        """Raise the attempts of the rows that a person wants another picture of.

        ``raised_by`` is the root of the run and its re-executions, none of which asks again.
        """
        wanted = set(config.again)
        samples = [
            (image.prompt_id, image.sample) for image in self.images if image.prompt_id in wanted
        ]
        if not samples:
            return self
        krea.raise_attempts(samples, raised_by=raised_by)
        return Batch(self.keys, self.rows, tuple(plan_images(self.rows.rows, krea.attempts())))

    def versions(self) -> Mapping[str, str]:
        """The data version of ``prompts``, by partition."""
        request_keys: dict[str, list[str]] = {key: [] for key in self.keys}
        for image in self.images:
            request_keys[image.partition_key].append(image.request.request_key)
        return {key: partition_version(found) for key, found in request_keys.items()}

    def manifest(self, krea: KreaResource, run_id: str) -> pa.Table:
        """The manifest of these rows, as the journal has them now."""
        return manifest_table(
            self.images,
            self.rows,
            krea.records(self.images),
            locate=krea.open_storage().locate,
            run_id=run_id,
        )

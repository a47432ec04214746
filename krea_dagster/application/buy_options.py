"""What a person may request of one run: images to regenerate, retries, decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from krea_dagster.arrow import as_array
from krea_dagster.engine.journal.bulk_reads import record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.resolution import Resolution, parse_resolution
from krea_dagster.engine.verdict import REJECT
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PLAN_SCHEMA, Plan
from krea_dagster.prompts.trial import Trial

#: Select all rows whose image a person has rejected, or whose file was pruned; ``error:`` is the
#: prefix of an error code.
REJECTED_ROWS: Final = "rejected"
PRUNED_ROWS: Final = "pruned"
_CODE: Final = "error:"
_FILE: Final = "@"

Sample = tuple[str, int]


class BuyOptions(BaseModel):
    """Options of one run; with the defaults it buys what is missing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int | None = Field(
        default=None,
        ge=1,
        description=(
            "A trial: only the first rows of these partitions, this many. The others are bought by "
            "a run without limit and sample."
        ),
    )
    sample: int | None = Field(
        default=None,
        ge=1,
        description=(
            "A trial: only this many rows of these partitions, the same ones each time, chosen by "
            "their prompt_id."
        ),
    )
    regenerate: list[str] = Field(
        default=[],
        description=(
            "Rows of which another image is bought: prompt_ids; error:CODE for rows that failed "
            "with that code; rejected for rows whose image a person has rejected; pruned for rows "
            "whose image was pruned and not rejected. Their attempt "
            "is raised by one, and with it the seed, unless the table fixes it. The old images "
            "stay in the journal. If the run is interrupted, the same request continues it and "
            "buys no second image."
        ),
    )
    new_seed: bool = Field(
        default=False,
        description=(
            "Draw a new seed for the rows in `regenerate` whose seed the table fixes. They are "
            "refused otherwise: the same seed gives the same image."
        ),
    )
    retry_errors: list[str] = Field(
        default=[],
        description="Error codes: rows that failed or were refused with one are bought again.",
    )
    resolve: dict[str, str] = Field(
        default={},
        description=(
            "Decisions about purchases with an unknown outcome, by prompt_id or request_key: "
            "replay (repeat under the same key), not-charged (buy again), lost, or task:ID."
        ),
    )
    wait: bool | None = Field(
        default=None,
        description=(
            "Wait for the images, or submit and end. By default as the assets were built: they "
            "wait, unless they collect later."
        ),
    )

    def trial(self) -> Trial | None:
        """Return the rows that are taken; None for all. Raises ConfigError for a contradiction."""
        if self.limit is None and self.sample is None:
            return None
        if self.limit is not None and self.sample is not None:
            raise ConfigError("limit and sample exclude each other; give one of them")
        if self.regenerate or self.resolve:
            raise ConfigError(
                "limit and sample choose rows, and so do --again and --resolve (regenerate and "
                "resolve in the run config). Nothing was bought. Give only one of them."
            )
        return Trial(self.limit or self.sample or 0, sample=self.limit is None)

    def of_rows(self, rows: int) -> BuyOptions:
        """Return these options for a part of the partitions, with this part of the trial's rows."""
        name = "sample" if self.limit is None else "limit"
        return self.model_copy(update={name: rows})

    def waits(self, by_default: bool) -> bool:
        """Return whether the run waits for its images."""
        return by_default if self.wait is None else self.wait

    def resolutions(self, plan: Plan) -> dict[str, Resolution]:
        """Return the decisions by request key. Raises ConfigError for an unknown decision."""
        decided = {name: parse_resolution(text) for name, text in self.resolve.items()}
        found: dict[str, Resolution] = {}
        for image in plan.named(decided):
            key = image.request.request_key
            decision = decided.get(key) or decided.get(image.prompt_id)
            if decision is not None:
                found[key] = decision
        return found


@dataclass(frozen=True)
class RowSelection:
    """Rows to regenerate: by prompt_id, by error code, or the rejected or pruned ones."""

    prompt_ids: frozenset[str] = frozenset()
    error_codes: frozenset[str] = frozenset()
    rejected: bool = False
    pruned: bool = False

    @classmethod
    def parse(cls, texts: Sequence[str]) -> RowSelection:
        """Read ``PROMPT_ID``, ``rejected``, ``pruned``, and ``error:CODE``."""
        codes = [text for text in texts if text.startswith(_CODE)]
        return cls(
            prompt_ids=frozenset(texts) - {REJECTED_ROWS, PRUNED_ROWS, *codes},
            error_codes=frozenset(text.removeprefix(_CODE) for text in codes),
            rejected=REJECTED_ROWS in texts,
            pruned=PRUNED_ROWS in texts,
        )

    def without_row(self, plan: Plan) -> list[str]:
        """Return the prompt_ids that no row of a plan has."""
        return sorted(self.prompt_ids.difference(i.prompt_id for i in plan.named(self.prompt_ids)))

    def samples(self, plan: Plan, journal: Journal | None) -> list[Sample]:
        """Return the selected (prompt_id, sample) of a plan, in its order.

        Raises ConfigError for a prompt_id that is also a keyword.
        """
        words = [_CODE + code for code in self.error_codes]
        words += [REJECTED_ROWS] if self.rejected else []
        words += [PRUNED_ROWS] if self.pruned else []
        if doubled := [image.prompt_id for image in plan.named(words) if image.prompt_id in words]:
            raise ConfigError(
                f"--again {doubled[0]} is ambiguous: a row has this prompt_id, and it is a "
                "keyword. Name the rows in a file (--again @FILE). Nothing was bought."
            )
        found = [
            (image.prompt_id, image.sample)
            for image in plan.named(self.prompt_ids)
            if image.prompt_id in self.prompt_ids
        ]
        if words and journal is not None:
            found += self._by_record(plan, journal)
        return list(dict.fromkeys(found))

    def _by_record(self, plan: Plan, journal: Journal) -> list[Sample]:
        found: list[Sample] = []
        rejected: set[str] = set()
        if self.rejected:
            verdicts = journal.verdicts.current()
            rejected = {sha for sha, one in verdicts.items() if one.verdict == REJECT}
        # Of rejected images the row is among the rejected ones.
        pruned = journal.pruned.keys(without=REJECTED_ROWS)
        pruned = pruned if self.pruned else pruned.slice(0, 0)
        codes = pa.array(sorted(self.error_codes), pa.string())
        shas = pa.array(sorted(rejected), pa.string())
        for key in plan.keys:
            for batch in plan.batches(key):
                keys = _column(batch, "request_key")
                records = record_columns(journal, keys, ("error_code", "image_sha256"))
                mask = pc.or_(
                    pc.is_in(records["error_code"], value_set=codes),
                    pc.is_in(records["image_sha256"], value_set=shas),
                )
                mask = pc.or_(as_array(mask), pc.is_in(keys, value_set=pruned))
                chosen = batch.filter(mask)
                ids, samples = _column(chosen, "prompt_id"), _column(chosen, "sample")
                found += zip(ids.to_pylist(), samples.to_pylist(), strict=True)
        return found


def with_files(texts: Sequence[str]) -> list[str]:
    """Replace each ``@FILE`` by the prompt_ids in it, one per line.

    Raises ConfigError for a file that cannot be read or is empty.
    """
    found: list[str] = []
    for text in texts:
        if not text.startswith(_FILE):
            found.append(text)
            continue
        try:
            lines = Path(text.removeprefix(_FILE)).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--again {text}: the file cannot be read: {error}") from error
        named = [line for line in lines if line.strip()]
        if not named:
            raise ConfigError(f"--again {text}: the file names no row")
        found += named
    return found


def _column(images: pa.RecordBatch, name: str) -> pa.Array:
    # By position: a further column of the table may have the same name.
    return images.column(PLAN_SCHEMA.get_field_index(name))

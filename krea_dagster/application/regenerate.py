"""What a person may ask another image of: rows by name or by error code, or rejected ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.journal.bulk_reads import record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.verdict import REJECT
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PLAN_SCHEMA, Plan

#: The word for all rows whose image a person has rejected, and what begins an error code.
REJECTED_ROWS: Final = "rejected"
_CODE: Final = "error:"
_FILE: Final = "@"

Slot = tuple[str, int]


@dataclass(frozen=True)
class Wishes:
    """Which rows another image is wanted of."""

    prompt_ids: frozenset[str] = frozenset()
    error_codes: frozenset[str] = frozenset()
    rejected: bool = False

    def without_row(self, plan: Plan) -> list[str]:
        """Return the prompt_ids that no row of a plan has."""
        return sorted(self.prompt_ids.difference(i.prompt_id for i in plan.named(self.prompt_ids)))

    def slots(self, plan: Plan, journal: Journal | None) -> list[Slot]:
        """Return the (prompt_id, sample) of a plan that are wished for, in its order.

        Raises ConfigError for a prompt_id that is one of the words too.
        """
        words = [_CODE + code for code in self.error_codes]
        words += [REJECTED_ROWS] if self.rejected else []
        if doubled := [image.prompt_id for image in plan.named(words) if image.prompt_id in words]:
            raise ConfigError(
                f"--again {doubled[0]} may mean the row of that prompt_id, or what the word means: "
                "name the rows in a file (--again @FILE). Nothing was bought."
            )
        found = [
            (image.prompt_id, image.sample)
            for image in plan.named(self.prompt_ids)
            if image.prompt_id in self.prompt_ids
        ]
        if words and journal is not None:
            found += self._by_record(plan, journal)
        return list(dict.fromkeys(found))

    def _by_record(self, plan: Plan, journal: Journal) -> list[Slot]:
        found: list[Slot] = []
        rejected: set[str] = set()
        if self.rejected:
            verdicts = journal.verdicts.current()
            rejected = {sha for sha, one in verdicts.items() if one.verdict == REJECT}
        codes = pa.array(sorted(self.error_codes), pa.string())
        shas = pa.array(sorted(rejected), pa.string())
        for key in plan.keys:
            for batch in plan.batches(key):
                records = record_columns(
                    journal, _own(batch, "request_key"), ("error_code", "image_sha256")
                )
                mask = pc.or_(
                    pc.is_in(records["error_code"], value_set=codes),
                    pc.is_in(records["image_sha256"], value_set=shas),
                )
                chosen = batch.filter(mask.combine_chunks())
                ids, samples = _own(chosen, "prompt_id"), _own(chosen, "sample")
                found += zip(ids.to_pylist(), samples.to_pylist(), strict=True)
        return found


def read(texts: Sequence[str]) -> Wishes:
    """Read wishes: ``PROMPT_ID``, ``rejected``, or ``error:CODE``."""
    return Wishes(
        prompt_ids=frozenset(
            text for text in texts if text != REJECTED_ROWS and not text.startswith(_CODE)
        ),
        error_codes=frozenset(text.removeprefix(_CODE) for text in texts if text.startswith(_CODE)),
        rejected=REJECTED_ROWS in texts,
    )


def with_files(texts: Sequence[str]) -> list[str]:
    """Return the wishes with those of ``@FILE`` in its place: one prompt_id a line.

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


def _own(images: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column of the plan's own: by its place, as the table may have any names too."""
    return images.column(PLAN_SCHEMA.get_field_index(name))

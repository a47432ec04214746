"""Facts about the images of an export, for its card and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.export.image_content import written_schema
from krea_dagster.curation.export.image_edits import ImageEdits
from krea_dagster.curation.export.plan import ExportPlan
from krea_dagster.curation.export.selected_rows import SelectedRows
from krea_dagster.curation.export.spec import ExportSpec

#: The column of verdicts.
VERDICT: Final = "verdict"


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about the images of an export. ``splits`` are numbers of images by name, in order.

    ``columns`` are those of the rows, ``edits`` what was changed in files, and ``with_nulls`` names
    the columns that have a null. ``origin`` is a host, "an emulator", or empty where it is not
    known. ``verdicts`` counts the images by verdict, "" for none; None where the rows do not tell
    it.
    """

    columns: pa.Schema
    edits: ImageEdits
    with_nulls: frozenset[str]
    origin: str
    verdicts: Mapping[str, int] | None
    left_out: Sequence[str]
    images: int
    prompts: int
    splits: Mapping[str, int]
    leaked: Mapping[str, int]
    near_duplicates_known: bool
    models: Sequence[str]
    sizes: Mapping[str, int]
    qualities: Mapping[str, int]
    formats: Mapping[str, int]
    seeds: tuple[int, int, int] | None
    stored: tuple[str, str] | None
    bytes: int
    purchases: int
    credits: float
    unpriced: int
    made_by: Mapping[str, str]

    @property
    def never_judged(self) -> int | None:
        """Return the number of images without a verdict; None where that is not known."""
        return None if self.verdicts is None else self.verdicts.get("", 0)


def facts_of(
    rows: SelectedRows,
    plan: ExportPlan,
    spec: ExportSpec,
    origin: str = "",
    left_out: Sequence[str] = (),
) -> DatasetFacts:
    """Compute the facts about the images of a plan.

    ``origin`` is where they come from. ``left_out`` are partitions without accepted images.
    """
    names = ["prompt", "model", "size", "quality", "seed", "request_key", "image_format"]
    table = rows.take(plan.rows(), [*names, "credits_charged", "stored_at"])
    judged = rows.take(plan.rows(), [VERDICT])[VERDICT] if rows.has_verdicts else None
    # A purchase that several rows share was paid once.
    paid = table.group_by("request_key").aggregate([("credits_charged", "max")])
    charged = paid["credits_charged_max"]
    seeds = pc.min_max(table["seed"])
    times = pc.min_max(table["stored_at"])
    return DatasetFacts(
        columns=written_schema(rows.schema, rows.edits),
        edits=rows.edits,
        with_nulls=rows.with_nulls,
        origin=origin,
        verdicts=None if judged is None else _counts(judged.fill_null("")),
        left_out=left_out,
        images=plan.images,
        prompts=int(pc.count_distinct(table["prompt"]).as_py()),
        splits={
            one.name: sum(len(shard.rows) for shard in plan.of(one.name)) for one in spec.splits
        },
        leaked=plan.leaked,
        near_duplicates_known=plan.near_duplicates_known,
        models=sorted(_counts(table["model"])),
        sizes=_counts(table["size"]),
        qualities=_counts(table["quality"]),
        formats=rows.edits.formats(_counts(table["image_format"])),
        seeds=None
        if seeds["min"].as_py() is None
        else (
            seeds["min"].as_py(),
            seeds["max"].as_py(),
            int(pc.count_distinct(table["seed"]).as_py()),
        ),
        stored=None
        if times["min"].as_py() is None
        else (f"{times['min'].as_py():%Y-%m-%d}", f"{times['max'].as_py():%Y-%m-%d}"),
        bytes=int(rows.sizes[plan.rows()].sum()),
        purchases=len(paid),
        credits=round(float(pc.sum(charged).as_py() or 0), 4),
        unpriced=charged.null_count,
        made_by={name: _version(name) for name in _made_by(rows.edits)},
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    found = Counter(
        {one["values"].as_py(): one["counts"].as_py() for one in pc.value_counts(column)}
    )
    return {str(name): count for name, count in found.most_common() if name is not None}


def _made_by(edits: ImageEdits) -> list[str]:
    return ["krea-dagster", "pyarrow", *(["pillow"] if edits.converts else [])]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"

"""The dataset card: the images, how they were generated, and what they cost.

``README.md`` with a YAML header for the Hugging Face Hub and ``datasets``; its values are JSON,
which is valid YAML. It does not contain the time of the export, so an unchanged export gives the
same version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from krea_dagster import redact
from krea_dagster.curation.export.dataset_facts import DatasetFacts
from krea_dagster.curation.export.features import card_entries
from krea_dagster.curation.export.image_edits import EMULATOR
from krea_dagster.curation.export.plan import ExportPlan
from krea_dagster.curation.export.spec import ExportSpec

_SIZES: Final = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)

_FORMS: Final = {
    "webdataset": "WebDataset shards: each image as `<key>.png` (or jpg, webp, avif), its prompt "
    "as `<key>.txt`, its row as `<key>.json`",
    "parquet": "Parquet files with the images inside, in the column `image`",
    "imagefolder": "image files, with the rows in each split's `metadata.parquet`",
    "jsonl": "image files, with the rows of each split as JSON lines",
    "csv": "image files, with the rows of each split as CSV",
}


#: How the card names the verdicts.
_VERDICTS: Final = {
    "keep": "were kept by a person",
    "flag": "were flagged by a person",
    "reject": "were rejected by a person",
    "": "were not seen by a person",
}


def write_card(facts: DatasetFacts, spec: ExportSpec, plan: ExportPlan, *, version: str) -> str:
    """Return the card of a version as Markdown."""
    title = title_of(facts, spec)
    return "\n".join(
        [
            *("---", *_header(facts, spec, plan, title, version), "---"),
            *("", *_body(facts, spec, plan, title), ""),
        ]
    )


def title_of(facts: DatasetFacts, spec: ExportSpec) -> str:
    """Return the title of a dataset, in one line."""
    models = ", ".join(facts.models) or "a text-to-image model"
    return _line(spec.title or f"Images of {models}")


def _source(location: str) -> str:
    """Return the origin of the prompts: a URL, or only the name of a local path."""
    if "://" in location:
        return redact.location(location)
    return location.rstrip("/").rpartition("/")[2]


# -- the header ------------------------------------------------------------------------------


def _header(
    facts: DatasetFacts, spec: ExportSpec, plan: ExportPlan, title: str, version: str
) -> list[str]:
    size = next((name for most, name in _SIZES if facts.images < most), "n>10M")
    # datasets keeps what it has read by this name: with the same one in each version, the new
    # `latest` would be taken for the old one.
    name = f"version-{version}"
    in_config, in_info = card_entries(spec.form, facts.columns, facts.with_nulls, plan.endings)
    values: dict[str, Any] = {}
    if spec.license is not None:
        values["license"] = spec.license.lower()
    values |= {
        "pretty_name": title,
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "text-to-image", "krea-dagster"],
        "size_categories": [size],
        "configs": [
            {"config_name": name, "data_files": _data_files(facts, spec, plan), **in_config}
        ],
    }
    if in_info:
        values["dataset_info"] = [{"config_name": name, **in_info}]
    return [f"{name}: {json.dumps(value, ensure_ascii=True)}" for name, value in values.items()]


def _data_files(facts: DatasetFacts, spec: ExportSpec, plan: ExportPlan) -> list[dict[str, Any]]:
    found = []
    for name, images in facts.splits.items():
        if not images:
            continue
        match spec.form:
            case "webdataset":
                path: Any = f"data/{name}-*.tar"
            case "parquet":
                path = f"data/{name}-*.parquet"
            case "imagefolder":
                # By extension: sidecars are not images.
                endings = sorted({ending.lower() for ending in plan.endings})
                path = [f"{name}/metadata.parquet", *(f"{name}/*/*.{one}" for one in endings)]
            case _:
                path = f"{name}.{spec.form}"
        found.append({"split": name, "path": path})
    return found


# -- the text --------------------------------------------------------------------------------


def _body(facts: DatasetFacts, spec: ExportSpec, plan: ExportPlan, title: str) -> list[str]:
    kind = "stored" if spec.everything else "accepted"
    lines = [
        f"# {_plain(title)}",
        "",
        (
            f"{_many(facts.images, 'image')} of {_many(facts.prompts, 'prompt')}, all {kind}: "
            f"{_FORMS[spec.form]}."
        ),
        *_about_verdicts(facts, spec),
        *_about_partitions(facts),
        "",
        "| split | share of prompts | images | shards |",
        "|---|---:|---:|---:|",
        *(
            f"| {one.name} | {one.share.normalize():f} | {facts.splits[one.name]} | "
            f"{len(plan.of(one.name))} |"
            for one in spec.splits
        ),
        "",
        *_about_splits(facts, spec),
        "## How the images were made",
        "",
        _model(facts),
        f"- Sizes: {_shares(facts.sizes)}",
        f"- Qualities: {_shares(facts.qualities)}",
        *_about_files(facts),
    ]
    if facts.seeds is not None:
        least, most, distinct = facts.seeds
        lines.append(
            f"- Seeds: {distinct} distinct ones, {least} to {most}, in the column `seed`; if the "
            "table has none, derived from prompt_id, sample and attempt"
        )
    if spec.source:
        lines.append(f"- Prompts: {_plain(_source(spec.source))}")
    if facts.stored is not None:
        lines.append(f"- Stored: {facts.stored[0]} to {facts.stored[1]}, UTC")
    if spec.filters:
        texts = list(map(str, spec.filters))
        lines.append(f"- Only rows where {_plain('; '.join(texts))}")
    lines += [
        "",
        "## What they cost",
        "",
        _cost(facts),
        "",
        "## Traceability",
        "",
        (
            "`index.parquet` has the shard, prompt_id, sample, request_key (the purchase) and "
            "sha256 of each image. Each file was compared with the hash from when it was stored, "
            "and every shard was verified. `export.json` has the shards and their hashes."
        ),
        "",
        "Made by " + ", ".join(f"{name} {number}" for name, number in facts.made_by.items()) + ".",
    ]
    if spec.license is None:
        lines += ["", "No licence was specified for this export."]
    return lines


def _model(facts: DatasetFacts) -> str:
    if facts.origin == EMULATOR:
        return (
            f"- **Synthetic test images**: they were drawn by an emulator of EvoLink's API, not by "
            f"{_list(facts.models)}"
        )
    host = f" ({_plain(facts.origin)})" if facts.origin else ""
    return f"- Model: {_list(facts.models)}, through EvoLink's API{host}"


def _about_files(facts: DatasetFacts) -> list[str]:
    """Say what was changed in the files."""
    edits = facts.edits
    lines = [f"- Files: {_shares(facts.formats)}, {facts.bytes} bytes, as received"]
    if edits.converts:
        lines = [f"- Files: {_shares(facts.formats)}, from {facts.bytes} bytes as received"]
    if edits.longest_side is not None:
        lines.append(
            f"- Larger images were made smaller: their longer side has {edits.longest_side} pixels"
        )
    if edits.converts:
        lines.append(f"- JPEG and WebP files that were encoded have the quality {edits.quality}")
    if edits.mark:
        term = edits.source_type.rpartition("/")[2]
        lines.append(
            f"- PNG, JPEG and WebP files say that they were generated: their XMP has the IPTC "
            f"property `DigitalSourceType` with the value `{term}`"
        )
    if edits.credentials is not None:
        lines.append("- The files have content credentials (C2PA), which say what made the images")
    if edits.parameters:
        lines.append(
            "- The PNG files contain the generation's parameters in the text chunk `parameters`"
        )
    if edits.changes_files:
        pixels = "" if edits.converts else "The pixels are as received. "
        lines.append(
            f"- {pixels}`image_sha256` and `image_bytes` are of the received file, "
            "`exported_sha256` and `exported_bytes` of the one here"
        )
    return lines


def _about_verdicts(facts: DatasetFacts, spec: ExportSpec) -> list[str]:
    """Say how many of the images a person has looked at."""
    if facts.verdicts is None:
        return []
    counts = [
        f"{facts.verdicts.get(verdict, 0)} {text}"
        for verdict, text in _VERDICTS.items()
        if facts.verdicts.get(verdict) or verdict in ("keep", "")
    ]
    accepted = (
        "" if spec.everything else " An image counts as accepted unless it was rejected or flagged."
    )
    return ["", f"Of the images, {', '.join(counts)}.{accepted}"]


def _about_partitions(facts: DatasetFacts) -> list[str]:
    if not facts.left_out:
        return []
    named = ", ".join(map(_plain, facts.left_out[:20])) + (" …" if len(facts.left_out) > 20 else "")
    return ["", f"Partitions without accepted images are not included: {named}."]


def _cost(facts: DatasetFacts) -> str:
    unknown = f", without {facts.unpriced} whose charge is unknown" if facts.unpriced else ""
    emulated = " of an emulator, which cost nothing," if facts.origin == EMULATOR else ""
    purchases = _many(facts.purchases, "purchase")
    return (
        f"{facts.credits:g} credits{emulated} for the {purchases} of these images{unknown}. "
        "Purchases that are not in this export are not included."
    )


def _about_splits(facts: DatasetFacts, spec: ExportSpec) -> list[str]:
    if len(spec.splits) == 1:
        return []
    basis = "by near-duplicates" if facts.near_duplicates_known else "by equal files only"
    similar = (
        "Similar images of different prompts may be in several splits."
        if spec.leaks
        else (
            f"Where images of different prompts are similar ({basis}), the last split keeps its "
            f"own; {sum(facts.leaked.values())} images of the others are left out."
        )
    )
    return [
        "A prompt's split depends only on its text (ignoring case and spacing), so equal prompts "
        "are never in two splits, and none moves as the dataset grows. " + similar,
        "",
    ]


def _shares(counts: Mapping[str, int]) -> str:
    shown = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:20]
    return ", ".join(f"{_plain(name)} ({count})" for name, count in shown) or "unknown"


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(_plain, names)) or "unknown"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _plain(text: str) -> str:
    """Escape a text for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", _line(text))

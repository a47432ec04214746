"""What a run says of a prompt table before it buys: nothing that stops it. Pure."""

from __future__ import annotations

from typing import Final

from krea_dagster.digests import Digests, first_of_each
from krea_dagster.prompts import Plan

#: Long prompts that are named.
_NAMED: Final = 3


def plan_notes(plan: Plan, wanted: Digests) -> list[str]:
    """Return what is not a problem of a table, and perhaps not expected.

    ``wanted`` are the request keys of the images that may be bought.
    """
    notes = list(plan.notes)
    if plan.warning_count:
        named = "; ".join(str(problem) for problem in plan.warnings[:_NAMED])
        more = " …" if plan.warning_count > _NAMED else ""
        notes.append(f"{plan.warning_count:,} prompts are very long: {named}{more}")
    first, counts = first_of_each(wanted)
    if (sharing := counts > 1).any():
        images = int((first & sharing).sum())
        notes.append(
            f"{int(sharing.sum()):,} rows share {images:,} image{'' if images == 1 else 's'}: they "
            "request the same one; num_images buys more of one prompt"
        )
    return notes

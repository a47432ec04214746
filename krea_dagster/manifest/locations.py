"""The paths of images in manifests, under the present place of a storage root.

A manifest has the path or URL that an image had when it was written. A root that was moved since,
or is mounted elsewhere, has the same names in it.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.storage.storage import Storage

#: The name of an image, at the end of its path.
IMAGE_NAME: Final = r"/images/[0-9a-f]{2}/[^/]+$"


def image_names(storage: Storage, paths: Any) -> Any:
    """Return the name under the root of each path; null for a path of no image of a root.

    ``paths`` is an array or a column of texts.
    """
    root = storage.locate("images").removesuffix("images")
    under = pc.starts_with(paths, root)
    within = pc.utf8_slice_codeunits(paths, len(root))
    found = pc.match_substring_regex(paths, IMAGE_NAME)
    name = pc.replace_substring_regex(paths, f"^.*({IMAGE_NAME})", r"\1")
    name = pc.utf8_slice_codeunits(name, 1)  # without the slash
    return pc.if_else(under, within, pc.if_else(found, name, pa.scalar(None, pa.string())))


def located_now(storage: Storage, table: pa.Table) -> pa.Table:
    """Return a manifest whose ``image_path`` is under the present place of the root."""
    place = table.column_names.index("image_path") if "image_path" in table.column_names else -1
    if place < 0:
        return table
    paths = table.column(place)
    root = storage.locate("images").removesuffix("images")
    names = image_names(storage, paths)
    now = pc.coalesce(pc.binary_join_element_wise(root, names, ""), paths)
    return table.set_column(place, table.field(place), now)

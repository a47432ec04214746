"""Where a user's code calls this package, as the UI's link from an asset to its definition."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import dagster as dg

from krea_dagster.plugin.partitions import without_beta_warnings

_OWN: Final = str(Path(__file__).parents[1])
_DAGSTER: Final = str(Path(dg.__file__).parent)


def caller_reference() -> Mapping[str, Any]:
    """Return metadata with the file and line that called this package.

    It is empty if Dagster itself called: that of a component is its YAML, which Dagster adds.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_DAGSTER):
        return {}
    file = Path(frame.f_code.co_filename)
    if not file.is_file():  # such as a notebook's cell
        return {}
    with without_beta_warnings():
        place = dg.LocalFileCodeReference(file_path=str(file), line_number=frame.f_lineno)
        return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[place])}

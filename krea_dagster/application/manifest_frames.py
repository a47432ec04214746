"""Loads manifests as a pandas, Arrow, Polars or DuckDB object."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from krea_dagster import redact
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import IMAGE_NAME, manifest_paths, no_column, read_manifests

#: Default maximum number of images to load: about 1.5 GB of 1K images.
MOST_IMAGES: Final = 1_000

#: The column that holds them.
IMAGE_COLUMN: Final = "image"

_OPTIONS: Final = ("columns", "images", "most_images")

#: What a parameter may be annotated with, by module and name.
_SHAPES: Final = {
    ("pandas", "DataFrame"): "pandas.DataFrame",
    ("pyarrow", "Table"): "pyarrow.Table",
    ("polars", "DataFrame"): "polars.DataFrame",
    ("polars", "LazyFrame"): "polars.LazyFrame",
    ("_duckdb", "DuckDBPyRelation"): "duckdb.DuckDBPyRelation",
    ("duckdb", "DuckDBPyRelation"): "duckdb.DuckDBPyRelation",
}


@dataclass(frozen=True)
class Selection:
    """What to load of a manifest; a downstream asset's ``AssetIn(metadata=…)`` says it.

    Only ``columns`` are read; ``images`` is ``bytes`` or ``pil`` and adds the column ``image``, for
    at most ``most_images`` rows.
    """

    columns: Sequence[str] | None = None
    images: str | None = None
    most_images: int = MOST_IMAGES

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> Selection:
        """Read the metadata; other keys are ignored. Raises ConfigError."""
        given = {name: plain(metadata[name]) for name in _OPTIONS if name in metadata}
        columns = given.get("columns")
        if columns is not None and (
            isinstance(columns, str)
            or not isinstance(columns, Sequence)
            or not columns
            or not all(isinstance(name, str) for name in columns)
        ):
            raise ConfigError(f"columns is {columns!r}; give a list of column names")
        images = given.get("images")
        if images not in (None, "bytes", "pil"):
            raise ConfigError(f"images is {images!r}; there are 'bytes' and 'pil'")
        most = given.get("most_images", MOST_IMAGES)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ConfigError(f"most_images is {most!r}; give a number of rows")
        chosen = None if columns is None else list(dict.fromkeys(columns))
        return cls(chosen, images, most)


def plain(value: Any) -> Any:
    """Return the plain value of a Dagster metadata value."""
    return getattr(value, "value", value)


def shape_of(annotation: Any) -> str:
    """Return the type that an annotation means; Arrow without one. Raises ConfigError."""
    if annotation is Any or annotation is None:
        return "pyarrow.Table"
    module = str(getattr(annotation, "__module__", "")).partition(".")[0]
    shape = _SHAPES.get((module, str(getattr(annotation, "__name__", ""))))
    if shape is None:
        raise ConfigError(
            f"a manifest cannot be loaded as {annotation!r}; annotate the parameter with "
            f"{', '.join(dict.fromkeys(_SHAPES.values()))}, or leave it out for an Arrow table"
        )
    return shape


def load(
    storage: Storage,
    partition_keys: Sequence[str],
    folders: Sequence[str],
    *,
    annotation: Any,
    selection: Selection,
) -> Any:
    """Read the manifests of these partitions in the shape of an annotation.

    Raises ConfigError for an unknown annotation or column, for too many images, and for a missing
    image.
    """
    shape = shape_of(annotation)
    if selection.images == "pil" and shape != "pandas.DataFrame":
        raise ConfigError(
            f"images='pil' needs the annotation pandas.DataFrame: a {shape} cannot hold "
            "images; use images='bytes'"
        )
    columns = selection.columns
    extra: list[str] = []
    if selection.images is not None and columns is not None:
        extra = [name for name in ("prompt_id", "image_path") if name not in columns]
        columns = [*columns, *extra]
    if selection.images is None and shape == "polars.LazyFrame":
        paths = manifest_paths(storage, partition_keys, folders)
        if paths:  # on disk: Polars reads only what the query needs, when it is collected
            return _scanned(paths, columns, storage)
    table = read_manifests(storage, partition_keys, columns, folders)
    if selection.images is None:
        return _shaped(table, shape)
    contents = _contents(table, storage, selection.most_images)
    table = table.drop_columns(extra)
    if IMAGE_COLUMN in table.column_names:
        raise ConfigError(
            f"the prompt table already has a column {IMAGE_COLUMN!r}, which the images would hide; "
            "select the columns that you need without it"
        )
    if selection.images == "pil":
        frame = table.to_pandas()
        opened = [None if one is None else Image.open(io.BytesIO(one)) for one in contents]
        pandas = importlib.import_module("pandas")  # takes a second to import
        frame[IMAGE_COLUMN] = pandas.Series(opened, index=frame.index, dtype=object)
        return frame
    return _shaped(table.append_column(IMAGE_COLUMN, pa.array(contents, pa.large_binary())), shape)


def _scanned(paths: Sequence[str], columns: Sequence[str] | None, storage: Storage) -> Any:
    """Return a LazyFrame over files on disk; columns that a file lacks are null."""
    polars = importlib.import_module("polars")
    frames = [polars.scan_parquet(path, glob=False) for path in paths]
    names = list(dict.fromkeys(name for one in frames for name in one.collect_schema().names()))
    for name in columns or ():
        if name not in names:
            raise no_column(name, names)
    frame = polars.concat(frames, how="diagonal_relaxed")
    if "image_path" in names:  # under the present place of the root
        place = polars.col("image_path")
        root = storage.locate("").rstrip("/").replace("$", "$$")
        frame = frame.with_columns(place.str.replace(f"^.*({IMAGE_NAME})", root + "${1}"))
    return frame if columns is None else frame.select(list(columns))


def _shaped(table: pa.Table, shape: str) -> Any:
    match shape:
        case "pandas.DataFrame":
            return table.to_pandas()
        case "pyarrow.Table":
            return table
        case "duckdb.DuckDBPyRelation":
            return importlib.import_module("duckdb").connect().from_arrow(table)
    frame = importlib.import_module("polars").from_arrow(table)
    return frame.lazy() if shape == "polars.LazyFrame" else frame


def _contents(table: pa.Table, storage: Storage, most: int) -> list[bytes | None]:
    """Return the bytes of each row's image, None for rows without one."""
    count = len(table) - table["image_path"].null_count
    if count > most:
        total = f", {gigabytes:.1f} GB" if (gigabytes := _gigabytes(table)) else ""
        raise ConfigError(
            f"{count} images would be loaded{total}, but the limit is {most}: read fewer "
            "partitions, or read image_path and open the files one by one, or raise most_images"
        )
    contents: list[bytes | None] = []
    for prompt_id, location in zip(
        table["prompt_id"].to_pylist(), table["image_path"].to_pylist(), strict=True
    ):
        contents.append(None if location is None else _content(storage, prompt_id, location))
    return contents


def _content(storage: Storage, prompt_id: str, location: str) -> bytes:
    try:
        with storage.open(storage.name_of(location)) as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"the image of {prompt_id} is missing at {redact.location(location)}; a run of images "
            "fetches it again"
        ) from None


def _gigabytes(table: pa.Table) -> float:
    if "image_bytes" not in table.column_names:
        return 0.0
    return float(pc.sum(table["image_bytes"]).as_py() or 0) / 1e9

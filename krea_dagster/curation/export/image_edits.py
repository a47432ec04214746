"""What an export changes in image files: format, size, and what is written into them.

In this order: convert, write the parameters (PNG), mark as generated, sign.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
from PIL import Image

from krea_dagster.curation.export.content_credentials import ContentCredentials
from krea_dagster.curation.export.file_metadata import (
    BY_ALGORITHM,
    BY_MODEL,
    with_png_text,
    with_source_type,
)
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.engine.record import FORMATS

#: The origin of images that no model has made, as the journal has it.
EMULATOR: Final = "an emulator"

#: From this quality on, a JPEG has the colours of every pixel.
_ALL_COLOURS: Final = 90
#: The modes that every format here can have, but JPEG no transparency.
_MODES: Final = frozenset({"L", "RGB", "RGBA"})
_FORMAT_OF: Final = {ending: name for name, ending in FORMATS.items()}
#: The keyword of the parameters, which image viewers look for.
_KEYWORD: Final = "parameters"


@dataclass(frozen=True)
class ImageEdits:
    """What an export changes in image files.

    ``image_format`` (Pillow's name) and ``longest_side`` are None where they stay as they are.
    ``source_type`` is how the images came about, by IPTC; with ``mark`` the files say it.
    """

    image_format: str | None = None
    quality: int = 95
    longest_side: int | None = None
    parameters: bool = False
    mark: bool = False
    source_type: str = BY_MODEL
    credentials: ContentCredentials | None = None

    @classmethod
    def of(cls, spec: ExportSpec, origin: str = "") -> ImageEdits:
        """Return the edits of an export whose images come from ``origin``."""
        credentials = None
        if spec.certificate is not None and spec.private_key is not None:
            credentials = ContentCredentials(spec.certificate, spec.private_key)
        return cls(
            image_format=spec.image_format and spec.image_format.upper(),
            quality=spec.quality or cls.quality,
            longest_side=spec.longest_side,
            parameters=spec.embed_parameters,
            mark=spec.mark,
            source_type=BY_ALGORITHM if origin == EMULATOR else BY_MODEL,
            credentials=credentials,
        )

    @property
    def converts(self) -> bool:
        """Whether images may be encoded again."""
        return self.image_format is not None or self.longest_side is not None

    @property
    def changes_files(self) -> bool:
        """Whether files may differ from the stored ones."""
        return self.converts or self.parameters or self.mark or self.credentials is not None

    @property
    def is_slow(self) -> bool:
        """Whether a file takes much longer than to read it."""
        return self.converts or self.credentials is not None

    def settings(self) -> list[Any]:
        """Return all settings, as JSON: equal ones make equal files, except for signatures."""
        return [
            *(self.image_format, self.quality, self.longest_side, self.parameters, self.mark),
            self.source_type,
            self.credentials and self.credentials.certificate_sha256,
        ]

    def ending(self, stored: str) -> str:
        """Return the extension of an exported file by that of the stored one."""
        return stored if self.image_format is None else FORMATS[self.image_format]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of an exported image. None is enlarged."""
        longest, most = max(width, height), self.longest_side
        if most is None or longest <= most:
            return width, height
        scaled = [max(1, (side * most + longest // 2) // longest) for side in (width, height)]
        return scaled[0], scaled[1]

    def formats(self, counts: dict[str, int]) -> dict[str, int]:
        """Return how many exported files have each format."""
        return counts if self.image_format is None else {self.image_format: sum(counts.values())}

    def described(self, table: pa.Table) -> pa.Table:
        """Return rows whose columns about the file are those of the exported one."""
        if self.longest_side is not None and {"width", "height"} <= set(table.column_names):
            pairs = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
            sizes = [(None, None) if None in pair else self.size(*pair) for pair in pairs]
            for at, name in enumerate(("width", "height")):
                table = _replaced(table, name, [size[at] for size in sizes])
        if self.image_format is not None and "image_format" in table.column_names:
            table = _replaced(table, "image_format", [self.image_format] * len(table))
        return table

    def apply(self, data: bytes, ending: str, model: str, parameters: str | None = None) -> bytes:
        """Return the exported file of a stored one, which gets the extension ``ending``.

        Raises what Pillow raises for a bad file, and ValueError for one that cannot be signed.
        """
        data = self._converted(data) if self.converts else data
        if parameters is not None:
            data = with_png_text(data, _KEYWORD, parameters)
        if self.mark:
            data = with_source_type(data, self.source_type)
        if self.credentials is None:
            return data
        made_by = model if self.source_type == BY_MODEL else "an emulator of EvoLink's API"
        return self.credentials.sign(
            data, _FORMAT_OF[ending], made_by=made_by, source_type=self.source_type
        )

    def _converted(self, data: bytes) -> bytes:
        """Return the image in its format and size, or the file itself if it has them."""
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            image_format = self.image_format or image.format or "PNG"
            size = self.size(*image.size)
            if (image_format, size) == (image.format, image.size):
                return data
            profile = image.info.get("icc_profile") if image.mode in _MODES else None
            pixels = _simple(image, transparent=image_format != "JPEG")
        if size != pixels.size:
            pixels = pixels.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        pixels.save(file, image_format, icc_profile=profile, **self._encoding(image_format))
        return file.getvalue()

    def _encoding(self, image_format: str) -> dict[str, Any]:
        if image_format == "PNG":
            return {}
        if image_format == "JPEG" and self.quality >= _ALL_COLOURS:
            return {"quality": self.quality, "subsampling": 0}
        return {"quality": self.quality}


def _simple(image: Image.Image, *, transparent: bool) -> Image.Image:
    """Return the pixels as grey, RGB or RGBA; without transparency, they are laid on white."""
    if image.mode not in _MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode != "RGBA" or transparent:
        image.load()
        return image.copy()
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _replaced(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    place = table.column_names.index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))

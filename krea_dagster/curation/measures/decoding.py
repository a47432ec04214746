"""Reads image files, decodes them in threads, and takes the figures that are lacking.

Some files are decoded ahead of the user's functions, which are called in the caller's thread, a
batch at a time; so memory does not grow with the number of files.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from PIL import Image

from krea_dagster.curation.measures.builtin import Measures, measure, plain
from krea_dagster.curation.measures.cache import MeasureWriter
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.curation.measures.measures_table import BUILTIN
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import verify_image
from krea_dagster.errors import ConfigError, DownloadError, ImageRejected

#: Pictures, one after the other, that a function may fail on before it counts as broken.
_BROKEN: Final = 10

#: Threads for each core where files are fetched from afar: they mostly wait.
_THREADS_AFAR: Final = 4


@dataclass(frozen=True)
class ImageFile:
    """A file that is to be read, whose it is, and which figures are wanted of it.

    ``path`` is what the manifest says; ``lacking`` holds the names of measures, and ``BUILTIN``
    for the figures that every picture has.
    """

    sha256: str
    path: str
    pixels: tuple[int, int]
    prompt_id: str
    sample: int
    lacking: Sequence[str]


@dataclass(frozen=True)
class MeasureFailure:
    """An image that could not be measured: which, why, and by what where it has a row at all."""

    file: ImageFile
    why: str
    measure: str = BUILTIN

    def __str__(self) -> str:
        by = f", {self.measure}" if self.measure else ""
        file = self.file
        return f"{file.prompt_id}, sample {file.sample}{by}: {self.why} ({file.path})"


@dataclass(frozen=True)
class _Decoded:
    file: ImageFile
    figures: Measures | None = None
    picture: Image.Image | None = None
    why: str = ""


def measure_files(
    storage: Storage,
    files: Iterable[ImageFile],
    own: Mapping[str, Measure],
    notes: Mapping[str, MeasureWriter],
    *,
    threads: int | None = None,
    on_read: Callable[[], None] = lambda: None,
) -> list[MeasureFailure]:
    """Take what is lacking of these files into ``notes``; return what could not be taken.

    ``own`` and ``notes`` are by name. ``on_read`` is called after each file. Raises ConfigError
    where a user's function fails on every picture, and StorageError where notes cannot be
    written.
    """
    troubles: list[MeasureFailure] = []
    batches = {name: _Batches(one, notes[name], troubles) for name, one in own.items()}
    with closing(_decoded(storage, files, threads or _threads(storage))) as decoded:
        for found in decoded:
            on_read()
            if found.why:
                troubles.append(MeasureFailure(found.file, found.why))
                continue
            if found.figures is not None:
                notes[BUILTIN].take(found.file.sha256, found.figures.values())
            if found.picture is not None:
                for name in found.file.lacking:
                    if name in batches:
                        batches[name].add(found.file, found.picture)
    for one in batches.values():
        one.finish()
    return troubles


def _threads(storage: Storage) -> int:
    cores = os.cpu_count() or 1
    return cores if storage.folder is not None else cores * _THREADS_AFAR


def _decoded(
    storage: Storage, files: Iterable[ImageFile], threads: int
) -> Generator[_Decoded, None, None]:
    """Decode files in threads, and yield them in their order; twice as many are under way."""
    pool = ThreadPoolExecutor(threads, "krea-measure")
    ahead: deque[Future[_Decoded]] = deque()
    try:
        for file in files:
            ahead.append(pool.submit(_decode, storage, file))
            if len(ahead) >= 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(storage: Storage, file: ImageFile) -> _Decoded:
    pictures: list[Image.Image] = []
    try:
        with storage.open(storage.name_of(file.path)) as opened:
            data = opened.read()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            return _Decoded(file, why="the file is not the one that was stored: its hash differs")
        verify_image(data, file.pixels, seen=pictures.append)
    except FileNotFoundError:
        return _Decoded(file, why="the file is missing")
    except (DownloadError, OSError) as error:
        # One flat colour is for the figures to tell.
        if not (isinstance(error, ImageRejected) and pictures):
            return _Decoded(file, why=str(error))
    (picture,) = pictures
    wants_own = any(name != BUILTIN for name in file.lacking)
    return _Decoded(
        file,
        figures=measure(picture) if BUILTIN in file.lacking else None,
        picture=plain(picture).convert("RGB") if wants_own else None,
    )


class _Batches:
    """Calls a user's function on batches of pictures, and takes note of its values.

    A batch that fails is tried picture by picture, so that one bad picture costs one value and
    is named.
    """

    def __init__(self, one: Measure, notes: MeasureWriter, troubles: list[MeasureFailure]) -> None:
        self._measure = one
        self._notes = notes
        self._troubles = troubles
        self._waiting: list[tuple[ImageFile, Image.Image]] = []
        self._failed_in_a_row = 0

    def add(self, file: ImageFile, picture: Image.Image) -> None:
        self._waiting.append((file, picture))
        if len(self._waiting) >= self._measure.batch_size:
            self.finish()

    def finish(self) -> None:
        """Call the function on what waits."""
        batch, self._waiting = self._waiting, []
        if not batch or (error := self._called(batch)) is None:
            return
        if len(batch) == 1:
            self._give_up(batch[0][0], error)
            return
        for file, picture in batch:
            if (error := self._called([(file, picture)])) is not None:
                self._give_up(file, error)

    def _called(self, batch: Sequence[tuple[ImageFile, Image.Image]]) -> Exception | None:
        try:
            values = self._measure.values([picture for _, picture in batch])
        except Exception as error:  # noqa: BLE001 - the user's function: it is told with its image
            return error
        for (file, _), value in zip(batch, values, strict=True):
            self._notes.take(file.sha256, (value,))
        self._failed_in_a_row = 0
        return None

    def _give_up(self, file: ImageFile, error: Exception) -> None:
        trouble = MeasureFailure(file, _said(error), self._measure.name)
        self._troubles.append(trouble)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _BROKEN:
            raise ConfigError(
                f"the measure {self._measure.name!r} failed on {_BROKEN} pictures one after the "
                f"other; the last was {trouble}. What was measured before is kept. Mend its "
                "function, and run again"
            ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

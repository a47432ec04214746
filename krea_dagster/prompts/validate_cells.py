"""Read the recognised columns cell by cell: what is wrong, in which row, and what is allowed.

The definition of what a row may hold. It is slow, so ``scan`` comes here only with a batch that
has something in it which is not plainly right.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from krea_dagster.errors import Problem
from krea_dagster.models import QUALITIES, SEED_MAX, SIZES
from krea_dagster.prompts.cells import Bad, Cells, flag_cells, shown, text_cells, whole_cells
from krea_dagster.prompts.requests import MAX_IMAGES, Defaults
from krea_dagster.prompts.table_schema import problem_in

T = TypeVar("T", bound=Hashable)


class ExactRows:
    """The recognised columns of one batch, with the defaults filled in, and what is wrong.

    ``columns`` holds a list for each; a cell that is wrong is noted, and stands as None.
    ``numbers`` are the rows' numbers in the table.
    """

    def __init__(
        self, batch: Mapping[str, pa.Array], numbers: Sequence[int], defaults: Defaults
    ) -> None:
        self._batch = batch
        self._numbers = numbers
        self._wrong: list[tuple[int, str, Bad]] = []
        self.columns: dict[str, list[Any]] = {
            "prompt": self._cells("prompt", text_cells, _is_prompt, ""),
            "prompt_id": self._cells("prompt_id", text_cells, bool, ""),
            "size": self._cells("size", text_cells, SIZES.__contains__, defaults.size),
            "quality": self._cells("quality", text_cells, QUALITIES.__contains__, defaults.quality),
            "seed": self._cells("seed", whole_cells, _is_seed, 0),
            "nsfw_check": self._cells("nsfw_check", flag_cells, _is_flag, defaults.nsfw_check),
            "num_images": self._cells("num_images", whole_cells, _is_count, defaults.num_images),
        }

    def add(self, column: str, at: int, bad: Bad) -> None:
        """Note one more cell that is wrong."""
        self._wrong.append((at, column, bad))

    def add_bad(self, column: str, cells: Iterable[object]) -> None:
        """Note those that are :class:`Bad`."""
        for at, cell in enumerate(cells):
            if isinstance(cell, Bad):
                self.add(column, at, cell)

    def problems(self) -> list[Problem]:
        """Return all that was noted."""
        ids = self.columns["prompt_id"]
        return [
            problem_in(self._numbers[at], ids[at] or None, column, bad)
            for at, column, bad in self._wrong
        ]

    def _cells(
        self,
        column: str,
        read: Callable[[pa.Array], Cells[T]],
        right: Callable[[T], bool],
        default: T,
    ) -> list[Any]:
        if column not in self._batch:
            return [default] * len(self._numbers)
        # Each different value is looked at once.
        found = read(self._batch[column])
        values = set(found)
        kept = {cell: cell for cell in values if not isinstance(cell, Bad | None) and right(cell)}
        if len(kept) == len(values):
            return found
        required = column in {"prompt", "prompt_id"}
        for at, cell in enumerate(found):
            if isinstance(cell, Bad):
                self.add(column, at, cell)
            elif cell is None and required:
                self.add(column, at, Bad("missing"))
            elif cell is not None and cell not in kept:
                self.add(column, at, Bad(shown(cell)))
        return [
            (None if required else default)
            if cell is None
            else (None if isinstance(cell, Bad) else kept.get(cell))
            for cell in found
        ]


def _is_prompt(prompt: str) -> bool:
    return bool(prompt.strip())


def _is_seed(seed: int) -> bool:
    return 0 <= seed <= SEED_MAX


def _is_flag(_flag: bool) -> bool:
    return True


def _is_count(count: int) -> bool:
    return 1 <= count <= MAX_IMAGES

"""The column types of exports: those that every reader has.

The readers of datasets have no maps, dictionaries, views, intervals or fixed sizes, and a column of
nulls has no type. Such columns are exported as the nearest type with the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.export.spec import Form

_is = pa.types

#: Arrow's type of an interval in months, days and nanoseconds.
_INTERVAL: Final = pa.month_day_nano_interval()


@dataclass(frozen=True)
class ExportedTypes:
    """The types of an export.

    Unsigned integers of 64 bits are text unless they are ``exact``: readers of JSON make
    floating-point numbers of large ones, and ``datasets`` fails for those of an image folder.
    """

    exact: bool

    @classmethod
    def of(cls, form: Form) -> ExportedTypes:
        """Return the types of a form."""
        return cls(exact=form == "parquet")

    def type_of(self, kind: pa.DataType) -> pa.DataType:
        """Return the type that a column of this type is exported as."""
        if isinstance(kind, pa.BaseExtensionType):
            is_text = kind.extension_name in {"arrow.uuid", "arrow.json"}
            return pa.string() if is_text else self.type_of(kind.storage_type)
        if _is.is_map(kind):
            fields = [("key", self.type_of(kind.key_type)), ("value", self.type_of(kind.item_type))]
            return _list_of(pa.struct(fields))
        if _is_list(kind):
            return _list_of(self.type_of(kind.value_type))
        if _is.is_struct(kind):
            return pa.struct([pa.field(one.name, self.type_of(one.type)) for one in kind])
        if _is.is_dictionary(kind) or _is.is_run_end_encoded(kind):
            return self.type_of(kind.value_type)
        if _is.is_uint64(kind) and not self.exact:
            return pa.string()
        return next((new(kind) for matches, new in _OTHERS if matches(kind)), kind)

    def convert(self, array: pa.Array) -> pa.Array:
        """Return the values of an array in the exported type.

        A value of a type without a counterpart becomes its text.
        """
        old, new = array.type, self.type_of(array.type)
        if old == new:
            return array
        if isinstance(old, pa.BaseExtensionType):
            is_uuid = old.extension_name == "arrow.uuid"
            return _texts(array) if is_uuid else self.convert(array.storage)
        if _is.is_run_end_encoded(old):
            return self.convert(pc.run_end_decode(array))
        if _is.is_dictionary(old):
            return self.convert(array.dictionary_decode())
        if old == _INTERVAL:
            return _texts(array)
        if _is.is_struct(new):
            children = [self.convert(child) for child in array.flatten()]
            return pa.StructArray.from_arrays(children, fields=list(new), mask=array.is_null())
        if _is.is_map(old):
            return self._lists(array, self._pairs(array, new.value_type), new)
        if _is.is_list(new):
            # Without what null lists hide.
            return self._lists(array, self.convert(pc.list_flatten(array)), new)
        return array.cast(new)

    def _pairs(self, array: pa.Array, new: pa.DataType) -> pa.Array:
        """Return the keys and values of all maps."""
        pairs = [pair for one in array.to_pylist() for pair in one or ()]
        children = [
            self.convert(pa.array([key for key, _ in pairs], array.type.key_type)),
            self.convert(pa.array([value for _, value in pairs], array.type.item_type)),
        ]
        return pa.StructArray.from_arrays(children, fields=list(new))

    def _lists(self, array: pa.Array, values: pa.Array, new: pa.DataType) -> pa.Array:
        """Return lists of these values, as long as those of an array of lists or maps."""
        if _is.is_map(array.type):
            lengths = np.array([len(one or ()) for one in array.to_pylist()], np.int32)
        else:
            lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, type=new, mask=array.is_null())


def _texts(array: pa.Array) -> pa.Array:
    return pa.array([None if one is None else str(one) for one in array.to_pylist()], pa.string())


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))  # as Parquet names it


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        _is.is_list(kind)
        or _is.is_large_list(kind)
        or _is.is_fixed_size_list(kind)
        or _is.is_list_view(kind)
        or _is.is_large_list_view(kind)
    )


#: Other types that are exported as another one.
_OTHERS: Final[tuple[tuple[Callable[[Any], bool], Callable[[Any], pa.DataType]], ...]] = (
    (_is.is_fixed_size_binary, lambda _: pa.binary()),
    (_is.is_binary_view, lambda _: pa.binary()),
    (_is.is_string_view, lambda _: pa.string()),
    (_is.is_null, lambda _: pa.string()),
    (lambda kind: kind == _INTERVAL, lambda _: pa.string()),
    (_is.is_decimal32, lambda kind: pa.decimal128(kind.precision, kind.scale)),
    (_is.is_decimal64, lambda kind: pa.decimal128(kind.precision, kind.scale)),
)

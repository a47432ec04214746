"""Counts what an asset or op of a user's own buys, and shows it in that asset's metadata."""

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.application.run import Ran
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import Submission, credits_from_units
from krea_dagster.plugin.metadata import krea_metadata, usage_metadata

Context = dg.AssetExecutionContext | dg.OpExecutionContext

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Usage:
    """What one step has bought so far. Calls that get the same image count it once."""

    def __init__(self) -> None:
        self._figures = ManifestSummary()
        self._seen: set[str] = set()
        self._submissions = 0
        self._reserved_units = 0

    def add(self, result: object) -> None:
        """Count a manifest, a run of ``Krea``, or a submission of ``KreaClient``.

        Raises TypeError for anything else.
        """
        match result:
            case pa.Table():
                self._add_rows(result)
            case Ran():
                self._figures += result.summary
            case Submission():
                if not result.replayed:
                    self._submissions += 1
                    self._reserved_units += result.credits_reserved_units or 0
            case _:
                raise TypeError(
                    f"a {type(result).__name__} has no usage: wrap KreaResource.generate, "
                    "Krea.generate, Krea.run or KreaClient.submit"
                )

    def _add_rows(self, manifest: pa.Table) -> None:
        seen = pa.array(sorted(self._seen), pa.string())
        keys = manifest["request_key"].cast(pa.string())
        new = manifest.filter(pc.invert(pc.is_in(keys, value_set=seen)))
        self._seen.update(new["request_key"].to_pylist())
        self._figures += ManifestSummary.of(new)

    def metadata(self, storage: Storage) -> dict[str, Any]:
        """Return what was counted, as metadata."""
        values: dict[str, Any] = {}
        if self._submissions:
            values["submissions"] = self._submissions
            values["credits_reserved"] = credits_from_units(self._reserved_units)
        if self._figures.rows:
            values.update(usage_metadata(self._figures, storage))
        return {**krea_metadata(values)}


#: The usage of the steps of this process.
_usages: Final[WeakKeyDictionary[Context, Usage]] = WeakKeyDictionary()


def add_usage(
    context: Context, result: object, storage: Storage, output_name: str | None = None
) -> None:
    """Count a result, and show the sum of the step on its output.

    A step with several outputs shows nothing unless the name of one is given.
    """
    usage = _usages.setdefault(context, Usage())
    usage.add(result)
    outputs = context.op_def.output_dict
    if output_name is not None or len(outputs) == 1:
        name = output_name or next(iter(outputs))
        context.add_output_metadata(usage.metadata(storage), output_name=name)


def counted(
    context: Context,
    call: Callable[_Arguments, _Result],
    storage: Storage,
    output_name: str | None = None,
) -> Callable[_Arguments, _Result]:
    """Return a function, or a coroutine function, whose results are counted."""

    async def awaited(result: Awaitable[Any]) -> Any:
        found = await result
        add_usage(context, found, storage, output_name)
        return found

    @wraps(call)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        result: Any = call(*args, **kwargs)
        if inspect.isawaitable(result):
            result = awaited(result)
        else:
            add_usage(context, result, storage, output_name)
        counted_result: _Result = result
        return counted_result

    return wrapper

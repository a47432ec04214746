"""Paths of this machine, and object stores and other places behind URLs, through fsspec.

A file system behind a URL never caches listings: a cached one lacks what another process has
stored since.

Options are what fsspec calls ``storage_options``. At any depth ``{"env": "NAME"}`` is the
value of a variable, as in Dagster, so that no secret has to be written down; at the top the
variable holds all options as JSON. They are resolved when a URL is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from krea_dagster import redact
from krea_dagster.errors import ConfigError, StorageError, StorageRefused, StorageUnavailable
from krea_dagster.store_faults import StoreFault, fault_of, is_of_client, one_line

if TYPE_CHECKING:
    from pyarrow import fs

Options: TypeAlias = Mapping[str, Any]

#: What is true while a store does not answer.
UNTIL_IT_DOES: Final = (
    "Nothing more is bought until it does. What was paid for is in the journal, and the next run "
    "fetches it: run again within 24 hours, before the links expire."
)

#: Options that are not secret; every other text is hidden in messages.
_SHOWN: Final = re.compile(
    r"(endpoint|region|url|host|account_name|project|location|version|style|protocol|profile)",
    re.IGNORECASE,
)
#: A shorter text may occur in a message by chance.
_LEAST_SECRET: Final = 4

#: By kind of URL: the variables that its client reads the endpoint from, and what to check if it
#: refuses access.
_ENDPOINTS: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "az": ("AZURE_STORAGE_CONNECTION_STRING",),
}
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
}
_KINDS: Final = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
_BLOB_ENDPOINT: Final = re.compile(r"BlobEndpoint=([^;]+)", re.IGNORECASE)


def local_path(place: str) -> Path | None:
    """Return the absolute path of a file or folder of this machine, None for what may be a URL."""
    return None if ":" in place else Path(place).expanduser().absolute()


def open_url(url: str, options: Options | None = None) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises ConfigError for a variable that is not set, and what fsspec raises for a URL that it
    cannot open.
    """
    # Here, because it imports asyncio and ssl, which a project on a disk does not need.
    import fsspec.core

    given = resolved(options)
    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **given)
    except TypeError:  # a file system without that option
        found, path = fsspec.core.url_to_fs(url, **given)
        found.invalidate_cache()
    return found, str(path)


def open_for_arrow(place: str, options: Options | None = None) -> tuple[fs.FileSystem, str]:
    """Return the same for Arrow, also for a path of this machine."""
    from pyarrow import fs  # here, because settings need no Arrow

    if (path := local_path(place)) is not None:
        return fs.LocalFileSystem(), str(path)
    found, inner = open_url(place, options)
    return fs.PyFileSystem(fs.FSSpecHandler(found)), inner


def resolved(options: Options | None, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return options with the values of the variables that they name. Raises ConfigError."""
    given = os.environ if environ is None else environ
    if options is not None and set(options) == {"env"}:
        name = str(options["env"])
        options = parse_options(_value_of(name, given), name)
    return {name: _resolved(value, given) for name, value in (options or {}).items()}


def parse_options(text: str, variable: str) -> dict[str, Any]:
    """Read options from JSON. Raises ConfigError, which names the variable and shows no value."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f'{variable} is not a JSON object; use one such as {{"key": {{"env": "NAME"}}}}'
        )
    return found


def same_kind(url: str, other: str) -> bool:
    """Return whether two places are opened by the same client, and so have the same options."""
    return kind_of(url) == kind_of(other)


def kind_of(url: str) -> str:
    """Return the kind of a URL: ``s3``, ``gs``, ``az``, or its scheme; ``file`` for a path."""
    scheme = url.rpartition("::")[2].partition("://")[0] if "://" in url else "file"
    return _KINDS.get(scheme, scheme)


def endpoint_of(url: str, options: Options, environ: Mapping[str, str] | None = None) -> str:
    """Return where a store is reached, for people; empty for its provider's own endpoint."""
    given = os.environ if environ is None else environ
    client = options.get("client_kwargs")
    places = [
        options.get("endpoint_url"),
        client.get("endpoint_url") if isinstance(client, Mapping) else None,
        options.get("account_host"),
        options.get("connection_string"),
        *(given.get(name) for name in _ENDPOINTS.get(kind_of(url), ())),
    ]
    found = next((str(place) for place in places if place), "")
    if kind_of(url) == "az" and ";" in found:
        blob = _BLOB_ENDPOINT.search(found)
        found = blob[1] if blob else ""
    return redact.address(found) if found else ""


def store_error(
    error: Exception, url: str, options: Options | None = None, *, called: str, doing: str = ""
) -> StorageError | None:
    """Return an error of a store's client as one line for people; None if it is about one file.

    Args:
        error: What the client raised.
        url: The root, which may contain a password.
        options: Its options.
        called: What the root is, such as "the storage root".
        doing: What was tried, such as "write".
    """
    fault = fault_of(error)
    if fault is None:
        return None
    given = _resolved_for_text(options)
    said = redact.text(without_secrets(one_line(error), given), url).rstrip(".")
    endpoint = endpoint_of(url, given)
    where = " ".join(filter(None, [called, redact.location(url), endpoint and f"at {endpoint}"]))
    tried = f" (tried to {doing})" if doing else ""
    if fault in (StoreFault.UNREACHABLE, StoreFault.TROUBLED):
        return StorageUnavailable(f"{where} does not answer: {said}. {UNTIL_IT_DOES}")
    return StorageRefused(f"{where}: {fault.value}{tried}: {said}. {_remedy(fault, url)}")


def error_of_client(error: Exception) -> StorageError | None:
    """Return the same for an error that comes out of reading an open file, of any store."""
    return store_error(error, "", called="an object store") if is_of_client(error) else None


def without_secrets(text: str, options: Options) -> str:
    """Return a text without the secrets in resolved options."""
    for secret in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(secret, redact.HIDDEN)
    return text


def _remedy(fault: StoreFault, url: str) -> str:
    kind = kind_of(url)
    if fault is StoreFault.NO_BUCKET:
        return "Create it, or correct its name and the endpoint."
    if fault is StoreFault.WRONG_PLACE:
        return "Name its region and endpoint (KREA_STORAGE_OPTIONS, or the client's variables)."
    variables = _CREDENTIALS.get(kind)
    named = f"{variables}, or KREA_STORAGE_OPTIONS" if variables else "KREA_STORAGE_OPTIONS"
    return f"Check the credentials ({named}): whether they are right, valid now, and permit this."


def _resolved_for_text(options: Options | None) -> dict[str, Any]:
    try:
        return resolved(options)
    except ConfigError:  # nothing was opened with them
        return {}


def _resolved(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"env"}:
            return _value_of(str(value["env"]), environ)
        return {name: _resolved(one, environ) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(one, environ) for one in value]
    return value


def _value_of(name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name)
    if value is None:
        raise ConfigError(f"the variable {name}, which the storage options name, is not set")
    return value


def _secrets(options: Any, *, shown: bool = False) -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _secrets(value, shown=_SHOWN.search(str(name)) is not None)
    elif isinstance(options, list | tuple):
        for one in options:
            yield from _secrets(one, shown=shown)
    elif isinstance(options, str) and not shown and len(options) >= _LEAST_SECRET:
        yield options

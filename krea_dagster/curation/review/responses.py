"""The review's HTTP helpers: JSON responses, numbers in a query, and error messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response


def parse_whole_number(request: Request, name: str, default: int) -> int:
    """Return an integer of the query, at least -1. Raises HTTPException."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise HTTPException(400, f"{name} must be an integer")
    return max(int(text), -1)


def as_json(value: Any) -> Response:
    """Return a JSON response; NaN and infinity become null, which JSON requires."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json")


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


async def http_error(_request: Request, error: Exception) -> Response:
    """Return the error as JSON; the page shows its text."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these only
    response = as_json({"error": error.detail})
    response.status_code = error.status_code
    return response


async def journal_error(_request: Request, error: Exception) -> Response:
    """Return 503 for a JournalError: the page keeps its verdicts and retries."""
    response = as_json({"error": str(error)})
    response.status_code = 503
    return response

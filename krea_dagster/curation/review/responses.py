"""How the review answers: JSON, numbers in an address, and errors in words for people."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response


def parse_whole_number(request: Request, name: str, default: int) -> int:
    """A whole number of the address, at least -1. Raises HTTPException."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise HTTPException(400, f"{name} is a whole number")
    return max(int(text), -1)


def as_json(said: Any) -> Response:
    """An answer that is JSON."""
    # Figures that are no numbers would be no JSON.
    text = json.dumps(_plain(said), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
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


async def said(_request: Request, error: Exception) -> Response:
    """Say what is wrong, in words that the page shows."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    answer = as_json({"error": error.detail})
    answer.status_code = error.status_code
    return answer


async def unavailable(_request: Request, error: Exception) -> Response:
    """The journal cannot be written or read: the page keeps its verdicts and tries again."""
    answer = as_json({"error": str(error)})
    answer.status_code = 503
    return answer

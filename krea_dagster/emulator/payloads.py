"""The bodies of successful responses, as EvoLink documents them. Pure.

The row of the list call is not documented; it has the fields that EvoLink's clients read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from krea_dagster.emulator.contract import MODEL, UNITS_PER_CREDIT, task_error_message
from krea_dagster.emulator.model import Account, EmulatedTask

CREDITS_PER_USD: Final = 68


def create_body(task: EmulatedTask) -> dict[str, Any]:
    """Return the body of the create call. A replay gets the same one."""
    return {
        "created": int(task.created_at),
        "id": task.task_id,
        "model": MODEL,
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "task_info": {"can_cancel": False, "estimated_time": 45},
        "type": "image",
        "usage": {
            "billing_rule": "per_call",
            "credits_reserved": task.reserved / UNITS_PER_CREDIT,
            "user_group": "default",
        },
    }


def task_body(task: EmulatedTask, now: float, links: Sequence[str]) -> dict[str, Any]:
    """Return the body of the task query. ``links`` count if the task is completed."""
    status = task.status(now)
    shown = task.fault("final_status") or task.fault("status")
    answer: dict[str, Any] = {
        "created": int(task.created_at),
        "id": task.task_id,
        "model": MODEL,
        "object": "image.generation.task",
        "progress": task.progress(now),
        "status": shown.arg if shown and status == "processing" else status,
        "task_info": {"can_cancel": False},
        "type": "image",
    }
    if status == "completed":
        if links:
            answer["results"] = list(links)
        if task.fault("usage"):
            used = task.reserved / UNITS_PER_CREDIT
            cost = {"credits": used, "usd": round(used / CREDITS_PER_USD, 6)}
            answer["usage"] = {"credits_used": used, "cost": cost}
    elif status == "failed":
        code = task.error_code or "unknown_error"
        answer["error"] = {"code": code, "message": task_error_message(code)}
        if any(one.fault.name == "fail_bare" for one in task.faults):
            for name in ("created", "type", "task_info"):
                del answer[name]
        else:
            answer["error"]["type"] = "task_error"
    return answer


def list_row(task: EmulatedTask, now: float) -> dict[str, Any]:
    """Return one row of the list call, which has no links."""
    status = task.status(now)
    row: dict[str, Any] = {
        "id": task.task_id,
        "model": MODEL,
        "type": "image",
        "status": status,
        "progress": task.progress(now),
        "created_at": int(task.created_at),
        "has_results": status == "completed",
        "has_error": status == "failed",
    }
    if status == "completed":
        row["credits_used"] = task.reserved / UNITS_PER_CREDIT
    return row


def credits_body(account: Account) -> Mapping[str, Any]:
    """Return the body of the credits call. The key itself has no limit."""
    remaining = account.remaining / UNITS_PER_CREDIT
    used = account.charged / UNITS_PER_CREDIT
    return {
        "data": {
            "token": {
                "remaining_credits": remaining,
                "unlimited_credits": True,
                "used_credits": used,
            },
            "user": {"remaining_credits": remaining, "used_credits": used},
        },
        "message": "",
        "success": True,
    }

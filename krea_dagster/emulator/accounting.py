"""Sum up the emulator's requests, tasks, credits and callbacks."""

from __future__ import annotations

import sqlite3
from typing import Any

from krea_dagster.emulator.model import EmulatedTask


def read_totals(db: sqlite3.Connection) -> dict[str, Any]:
    """Return the totals. Ended tasks must be settled already. Money in units."""
    counts: dict[str, dict[str, int]] = {}
    for kind, what, n in db.execute("SELECT kind, what, n FROM counts"):
        counts.setdefault(kind, {})[what] = n
    notes = counts.pop("note", {})
    posts = counts.get("create", {})
    calls = counts.pop("call", {})
    money = db.execute(
        "SELECT total(granted), total(reserved), total(charged), total(returned) FROM accounts"
    ).fetchone()
    granted, reserved, charged, returned = (round(amount) for amount in money)
    waiting = db.execute("SELECT count(*) FROM callbacks").fetchone()
    states = db.execute("SELECT count(*), total(settled = 0) FROM tasks").fetchone()
    bought_again = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE settled = 0 OR ends_as = 'completed' "
        "GROUP BY account, fingerprint HAVING count(*) > 1)"
    ).fetchone()
    return {
        "requests": counts,
        "submit_posts": sum(posts.values()),
        "creates": states[0],
        "replays": notes.get("replays", 0),
        "refused": sum(n for status, n in posts.items() if status.startswith("4")),
        "reads": sum(counts.get("read", {}).values()),
        "batch_reads": sum(counts.get("batch", {}).values()),
        "lists": sum(counts.get("list", {}).values()),
        "credits_reads": sum(counts.get("credits", {}).values()),
        "file_gets": sum(counts.get("file", {}).values()),
        "key_leaks": notes.get("key_leaks", 0),
        "in_flight": round(states[1]),
        "callbacks": calls,
        "callbacks_sent": sum(calls.values()),
        "callbacks_answered": notes.get("callbacks_answered", 0),
        "callbacks_given_up": notes.get("callbacks_given_up", 0),
        "callbacks_waiting": waiting[0],
        "granted_units": granted,
        "reserved_units": reserved,
        "charged_units": charged,
        "returned_units": returned,
        "held_units": reserved - charged - returned,
        "bodies_bought_more_than_once": int(bought_again[0]),
    }


def task_record(task: EmulatedTask, sent: dict[str, Any], now: float) -> dict[str, Any]:
    """Return one task's record. ``sent`` holds the fields of the create call."""
    status = task.status(now)
    ended = status not in ("pending", "processing")
    return {
        "task_id": task.task_id,
        **sent,
        "prompt": task.prompt,
        "size": task.size,
        "quality": task.quality,
        "used_seed": task.used_seed,
        "status": status,
        "error_code": task.error_code if status == "failed" else None,
        "reserved_units": task.reserved,
        "charged_units": task.reserved if status == "completed" else 0,
        "created_at": task.created_at,
        "completed_at": task.ready_at if ended else None,
        "file_sha256": task.file_sha256,
        "fetched": task.fetched,
        "faults": [one.fault.name for one in task.faults],
    }

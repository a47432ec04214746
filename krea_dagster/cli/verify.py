"""The command ``verify``."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.exit_codes import DONE, NOT_DELIVERED
from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import LINE_EVERY_S, err, out, printable, show_json
from krea_dagster.models import credits_from_units, credits_text

if TYPE_CHECKING:
    from krea_dagster.spend.proof.findings import Proof, ProofFigures


@click.command("verify")
@project_options
@click.option("--no-files", is_flag=True, help="Compare only the sizes of files, not their hashes.")
@json_option
def verify_command(*, no_files: bool, as_json: bool) -> None:
    """Prove that every credit is accounted for; exit with 1 if something does not add up.

    Compares every charge in the journal with its task, its file (read and hashed again), its
    manifest row, the events, the budget sums, and the account's own usage. Changes nothing, and
    needs no network.
    """
    with _progress() as on_progress:
        krea = open_krea(reads_values=False)
        proof = krea.verify(hash_bytes=0 if no_files else None, on_progress=on_progress)
    if as_json:
        show_json(proof_figures(proof))
    else:
        show_proof(proof)
    sys.exit(DONE if proof.adds_up else NOT_DELIVERED)


@contextmanager
def _progress() -> Iterator[Callable[[ProofFigures], None]]:
    """Yield a callback that prints a line every few seconds."""
    next_s = time.monotonic() + LINE_EVERY_S

    def show(figures: ProofFigures) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + LINE_EVERY_S
            err.print(
                f"{figures.requests} requests, {figures.files_hashed} files read again "
                f"({figures.bytes_hashed / 1e9:.1f} GB)"
            )

    yield show


def show_proof(proof: Proof) -> None:
    """Print the figures of a proof, then its findings."""
    figures, account = proof.figures, proof.account
    rows: list[tuple[str, str]] = [
        ("requests", f"{figures.requests}, by {figures.events} events"),
        ("charges", f"{figures.charges} of {credits_text(figures.charged_units)} credits"),
        ("tasks", str(figures.tasks)),
        (
            "files",
            f"{figures.files}, {figures.files_hashed} of them read again"
            + (f"; {figures.pruned} pruned" if figures.pruned else ""),
        ),
        ("manifest rows", f"{figures.rows_agreeing} of {figures.rows} agree"),
        (
            "at stake",
            f"{figures.at_stake} of at most {credits_text(figures.at_stake_units)} credits",
        ),
        ("lost", f"{figures.lost} of at most {credits_text(figures.lost_units)} credits"),
    ]
    if account is not None:
        first, last = account.stretches[0].before, account.stretches[-1].after
        explained = f"{credits_text(account.journal_units)} credits"
        if account.in_flight_units:
            explained += f", and up to {credits_text(account.in_flight_units)} in flight"
        rows += [
            ("account before", f"{credits_text(first.used_units)} credits used"),
            ("account after", f"{credits_text(last.used_units)} credits used"),
            ("of it charged", explained),
            ("unexplained", f"{credits_text(account.unexplained_units)} credits"),
        ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)
    shown: Counter[str] = Counter()
    for finding in proof.findings:
        shown[finding.kind.value] += 1
        mark = "[bold red]error[/]" if finding.severity.value == "error" else "note"
        out.print(f"{mark}: {escape(printable(finding.text))}")
    for kind, count in proof.counts.items():
        if count > shown[kind.value]:
            out.print(f"… and {count - shown[kind.value]} more of the kind {kind.value}")
    if proof.adds_up:
        out.print("Every credit is accounted for.")
    else:
        many = "1 thing does" if proof.errors == 1 else f"{proof.errors} things do"
        out.print(f"[bold red]{many} not add up.[/]")


def proof_figures(proof: Proof) -> dict[str, Any]:
    """Return a proof for JSON."""
    figures, account = proof.figures, proof.account
    return {
        "adds_up": proof.adds_up,
        "errors": proof.errors,
        "notes": proof.notes,
        "requests": figures.requests,
        "events": figures.events,
        "submissions": figures.submissions,
        "charges": figures.charges,
        "tasks": figures.tasks,
        "files": figures.files,
        "files_hashed": figures.files_hashed,
        "bytes_hashed": figures.bytes_hashed,
        "files_pruned": figures.pruned,
        "manifest_rows": figures.rows,
        "manifest_rows_agreeing": figures.rows_agreeing,
        "credits_charged": credits_from_units(figures.charged_units),
        "at_stake": figures.at_stake,
        "credits_at_stake": credits_from_units(figures.at_stake_units),
        "lost": figures.lost,
        "credits_lost": credits_from_units(figures.lost_units),
        "account": None
        if account is None
        else {
            "readings": account.readings,
            "credits_used_before": credits_from_units(account.stretches[0].before.used_units),
            "credits_used_after": credits_from_units(account.stretches[-1].after.used_units),
            "credits_used": credits_from_units(account.used_units),
            "credits_charged": credits_from_units(account.journal_units),
            "credits_in_flight": credits_from_units(account.in_flight_units),
            "credits_unexplained": credits_from_units(account.unexplained_units),
        },
        "counts": {kind.value: count for kind, count in proof.counts.items()},
        "credits": {kind.value: credits_from_units(units) for kind, units in proof.units.items()},
        "findings": [
            {
                "severity": finding.severity.value,
                "kind": finding.kind.value,
                "text": finding.text,
                "credits": credits_from_units(finding.units),
                "request_key": finding.request_key,
                "task_id": finding.task_id,
            }
            for finding in proof.findings
        ],
    }

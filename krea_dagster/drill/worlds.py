"""The worlds in which the drill can be held, as data.

A world has one or more parts, each a separate drill. A part says how it differs from the plain
drill. It may have an episode, which one worker meets between the others: the episode changes the
world before that worker and mends it after. It changes only things outside the package (a folder,
a file, a key, a clock or the server), so the package has to notice the change.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from krea_dagster.drill.job import API_KEY, OTHER_API_KEY, DrillPaths
from krea_dagster.engine.policy import OnUnknown

#: The command of Linux that gives a process its own host name and process ids.
_NAMESPACES: Final = ("unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
_DISK_BYTES: Final = 64 * 1024 * 1024
#: Free bytes on a full disk: none, or enough for a few commits.
_ROOM_BYTES: Final = (0, 20_000, 60_000, 120_000)
#: Seconds by which a wall clock is moved: by NTP, by hand, by a wrong zone and day.
_STEPS_S: Final = (3.0, 300.0, 30 * 3600.0, -30 * 3600.0)

#: A server fault, how many of the next requests it strikes, and its argument.
Script = tuple[str, int, float | None]

#: The server has forgotten all Idempotency-Keys: a repeated purchase is charged again.
KEYS_FORGOTTEN: Final[Mapping[str, float]] = {"ignore_idempotency": 1.0}
#: After a day: the server has also forgotten all tasks, and no link works.
TASKS_FORGOTTEN: Final[Mapping[str, float]] = {
    **KEYS_FORGOTTEN,
    "read_404": 1.0,
    "no_batch": 1.0,
    "file_404": 1.0,
}


@dataclass(frozen=True)
class WorkerHost:
    """Where workers run: this machine, or with ``name`` a separate host with its own clock."""

    name: str = ""
    ahead_s: float = 0.0


def _nothing(_paths: DrillPaths, _number: int) -> None:
    pass


def _nothing_to_mend(_paths: DrillPaths, _number: int, *, refused: bool) -> None:
    pass


@dataclass(frozen=True)
class WorldEpisode:
    """What one worker meets between the others.

    ``earlier`` is called some workers before, ``enter`` just before the worker, and ``leave`` after
    it. ``leave`` is told whether the worker refused, that is, ended with an error before it
    requested a purchase. ``midway`` is called once purchases of the worker have reached the server,
    which delays its responses for a moment. All get the drill's paths and the episode's number.

    When the episode begins, all rows opened so far are stored; with ``amid_purchases`` a worker was
    killed just before while it bought. ``rates`` are the server faults for the worker,
    ``mended_rates`` those for the workers that then finish the open rows. The worker buys with
    ``api_key``, its clock is ``ahead_s`` ahead, it has new rows to buy with ``opens``, and it is
    killed at the edge ``killed_at``.
    """

    enter: Callable[[DrillPaths, int], None] = _nothing
    leave: Callable[..., None] = _nothing_to_mend
    earlier: Callable[[DrillPaths, int], None] | None = None
    midway: Callable[[DrillPaths, int], None] | None = None
    amid_purchases: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    mended_rates: Mapping[str, float] = field(default_factory=dict)
    api_key: str = API_KEY
    ahead_s: float = 0.0
    opens: bool = False
    killed_at: str = ""


@contextmanager
def _plain_disk(_paths: DrillPaths) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class WorldPart:
    """One drill of a world, by its differences from the plain drill.

    Fields that are None are as the command says. ``share`` is the part's share of the world's
    requests and kills. Without ``kills`` no worker is killed and no fault strikes, so no purchase
    may be repeated, with or without an Idempotency-Key; workers then begin while others' purchases
    are under way. ``scripts`` are faults that strike the first requests of each worker.
    ``steps_s`` are times that wall clocks are set to, as seconds ahead.

    With ``unknown_is_right`` an outcome may stay unknown also under replay, because no clock said
    how old it was. With ``adopts`` the journal may hold images without a purchase. ``disk`` sets up
    the journal's disk for the whole drill. With ``regenerates`` workers run the command
    ``materialize --again``.
    """

    description: str = ""
    share: float = 1.0
    kills: bool = True
    on_unknown: OnUnknown | None = None
    honours_key: bool | None = None
    rates: Mapping[str, float] | None = None
    hosts: Sequence[WorkerHost] = (WorkerHost(),)
    workers: int | None = None
    scripts: Sequence[Script] = ()
    steps_s: Sequence[float] = ()
    episode: WorldEpisode | None = None
    unknown_is_right: bool = False
    adopts: bool = False
    disk: Callable[[DrillPaths], AbstractContextManager[None]] = _plain_disk
    regenerates: bool = False


@dataclass(frozen=True)
class DrillWorld:
    """A world. ``lacking`` says what this machine lacks for it, "" if nothing."""

    description: str
    parts: Sequence[WorldPart]
    lacking: Callable[[], str] = str


# -- two hosts --------------------------------------------------------------------------------


def on_host(name: str, command: Sequence[str]) -> list[str]:
    """Return a command that runs under its own host name and process ids."""
    set_name = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return [*_NAMESPACES, "sh", "-c", set_name, name, *command]


def _no_namespaces() -> str:
    command = on_host("krea-drill", [sys.executable, "-c", "import os; assert os.getpid() == 1"])
    return "" if _succeeds(command) else f"needs Linux, root and {' '.join(_NAMESPACES)}"


def _succeeds(command: Sequence[str]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        done = subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - our command
    except OSError:
        return False
    return done.returncode == 0


# -- a backup ---------------------------------------------------------------------------------


def _backup_of(paths: DrillPaths, number: int) -> Path:
    return paths.folder / f"backup-{number}.db"


def _back_up(paths: DrillPaths, number: int) -> None:
    """Copy the journal by SQLite's backup."""
    with (
        closing(sqlite3.connect(paths.journal)) as journal,
        closing(sqlite3.connect(_backup_of(paths, number))) as copy,
    ):
        journal.backup(copy)


def _restore(paths: DrillPaths, number: int) -> None:
    """Replace the journal by the copy, and keep the journal."""
    _move_journal(paths.journal.parent, paths.folder / f"newer-{number}")
    shutil.copyfile(_backup_of(paths, number), paths.journal)


def _put_newer_back(paths: DrillPaths, number: int, *, refused: bool) -> None:
    """Put the newer journal back if the worker refused. Otherwise the copy stays."""
    if refused:
        _move_journal(paths.journal.parent, paths.folder / f"refused-{number}")
        _move_journal(paths.folder / f"newer-{number}", paths.journal.parent)


def _move_journal(here: Path, there: Path) -> None:
    there.mkdir(exist_ok=True)
    for file in here.glob("journal.db*"):
        file.replace(there / file.name)


# -- an unmounted root ------------------------------------------------------------------------


def _unmount(paths: DrillPaths, _number: int) -> None:
    """Replace the storage root by an empty mount point."""
    paths.storage.rename(paths.folder / "unmounted")
    paths.storage.mkdir()


def _mount(paths: DrillPaths, number: int, *, refused: bool) -> None:  # noqa: ARG001 - either way
    """Put the root back; it hides what was written to the mount point."""
    paths.storage.rename(paths.folder / f"hidden-{number}")
    (paths.folder / "unmounted").rename(paths.storage)


# -- a full disk ------------------------------------------------------------------------------


@contextmanager
def _small_disk(paths: DrillPaths) -> Iterator[None]:
    """Keep the journal on a small separate disk; afterwards put its files where the disk was."""
    disk = paths.journal.parent
    disk.mkdir()
    _mount_tmpfs(disk)
    try:
        yield
    finally:
        shutil.copytree(disk, kept := paths.folder / "kept", ignore=lambda *_: [_BALLAST])
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # noqa: S603, S607 - as above
        disk.rmdir()
        kept.rename(disk)


_BALLAST: Final = "ballast"


def _mount_tmpfs(disk: Path) -> None:
    options = f"size={_DISK_BYTES}"
    subprocess.run(  # noqa: S603 - our folder
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],  # noqa: S607 - the system's
        check=True,
        capture_output=True,
    )


def _fill(paths: DrillPaths, number: int) -> None:
    """Fill the disk, all but a few bytes."""
    disk = paths.journal.parent
    room = _ROOM_BYTES[number % len(_ROOM_BYTES)]
    free = os.statvfs(disk)
    # Unbuffered, because a worker writes to the disk at the same time: this fills the room left.
    with suppress(OSError), (disk / _BALLAST).open("wb", buffering=0) as ballast:
        ballast.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))


def _make_room(paths: DrillPaths, _number: int, *, refused: bool) -> None:  # noqa: ARG001 - either way
    (paths.journal.parent / _BALLAST).unlink(missing_ok=True)


def _no_small_disk() -> str:
    mounts = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return "" if _succeeds(mounts) else "needs Linux, root and mount -t tmpfs"


# -- all of them ------------------------------------------------------------------------------

_AWAY: Final = WorkerHost("krea-drill-a"), WorkerHost("krea-drill-b", ahead_s=120.0)
_SLOW: Final[Sequence[Script]] = (("delay_create", 1_000_000, 0.6),)

#: Every world by its name; the plain one is the first.
WORLDS: Final[Mapping[str, DrillWorld]] = {
    "plain": DrillWorld("this machine and nothing odd", (WorldPart(),)),
    "two-hosts": DrillWorld(
        "workers on two hosts, whose clocks differ by two minutes, share the journal",
        (
            WorldPart("killed", share=0.7, hosts=_AWAY, workers=2),
            WorldPart(
                "no kills, keys ignored",
                share=0.3,
                kills=False,
                on_unknown="replay",
                honours_key=False,
                hosts=_AWAY,
                workers=2,
                scripts=_SLOW,
            ),
        ),
        lacking=_no_namespaces,
    ),
    "clock": DrillWorld(
        "the wall clock is set by 3 s, 5 min, +30 h and -30 h while a worker works",
        (
            WorldPart(
                "killed, also with intents of tomorrow",
                share=0.7,
                on_unknown="replay",
                honours_key=True,
                steps_s=_STEPS_S,
                unknown_is_right=True,
                episode=WorldEpisode(
                    ahead_s=30 * 3600.0,
                    opens=True,
                    killed_at="task exists, answer unread",
                    mended_rates=KEYS_FORGOTTEN,
                ),
            ),
            WorldPart(
                "two workers, no kills, keys ignored",
                share=0.3,
                kills=False,
                on_unknown="replay",
                honours_key=False,
                workers=2,
                scripts=_SLOW,
                steps_s=_STEPS_S,
            ),
        ),
    ),
    "backup": DrillWorld(
        "the journal is replaced by a copy that is some workers old, and the keys are forgotten",
        (
            WorldPart(
                on_unknown="replay",
                honours_key=True,
                adopts=True,
                episode=WorldEpisode(
                    enter=_restore,
                    leave=_put_newer_back,
                    earlier=_back_up,
                    rates=KEYS_FORGOTTEN,
                    mended_rates=KEYS_FORGOTTEN,
                ),
            ),
        ),
    ),
    "unmounted": DrillWorld(
        "the storage root is an empty folder for one worker, a day after all was bought",
        (
            WorldPart(
                on_unknown="replay",
                honours_key=True,
                episode=WorldEpisode(
                    enter=_unmount,
                    leave=_mount,
                    rates=TASKS_FORGOTTEN,
                    mended_rates=TASKS_FORGOTTEN,
                ),
            ),
        ),
    ),
    "foreign-key": DrillWorld(
        "one worker, after one that was killed while it bought, has another account's key",
        (
            WorldPart(
                on_unknown="replay",
                honours_key=True,
                episode=WorldEpisode(amid_purchases=True, opens=True, api_key=OTHER_API_KEY),
            ),
        ),
    ),
    "again": DrillWorld(
        "`materialize --again` is killed and repeated: one new image for each",
        (WorldPart(on_unknown="replay", honours_key=True, rates={}, regenerates=True),),
    ),
    "full-disk": DrillWorld(
        "the journal's disk fills while a worker buys, has room again, and the keys are forgotten",
        (
            WorldPart(
                on_unknown="replay",
                honours_key=True,
                disk=_small_disk,
                episode=WorldEpisode(
                    midway=_fill,
                    leave=_make_room,
                    opens=True,
                    rates=KEYS_FORGOTTEN,
                    mended_rates=KEYS_FORGOTTEN,
                ),
            ),
        ),
        lacking=_no_small_disk,
    ),
    "server": DrillWorld(
        "servers that replay, that ignore keys, that answer 409 conflict to a first POST",
        (
            WorldPart(
                "late, undecided and lost answers",
                share=0.4,
                on_unknown="replay",
                honours_key=True,
                scripts=(("paid_outcome_unknown", 1, 0.2), ("drop_after_create", 1, None)),
            ),
            WorldPart("keys ignored, policy hold", share=0.4, on_unknown="hold", honours_key=False),
            WorldPart(
                "409 conflict, no kills",
                share=0.2,
                kills=False,
                on_unknown="replay",
                honours_key=True,
                scripts=(("idempotency_conflict", 3, None),),
            ),
        ),
    ),
}

"""The worlds in which the drill can be held, as data, and what happens to them between workers.

A world is one or more parts, each a drill of its own. A part says where it differs from the plain
drill, and what, if anything, one worker meets between the others: its episode. An episode changes
the world before that worker and mends it after. What an episode changes is outside of the
package, a folder, a file, a key, a clock or the server, so that the package has to notice it.
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

from krea_dagster.drill.job import API_KEY, OTHER_API_KEY, Place
from krea_dagster.engine.policy import OnUnknown

#: What a Linux machine must let one do to be two hosts.
_NAMESPACES: Final = ("unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
_DISK_BYTES: Final = 64 * 1024 * 1024
#: What a full disk leaves: nothing, or enough for some commits more.
_ROOM_BYTES: Final = (0, 20_000, 60_000, 120_000)
#: Seconds by which a wall clock is set: by NTP, by hand, in the wrong zone's night.
_STEPS_S: Final = (3.0, 300.0, 30 * 3600.0, -30 * 3600.0)

#: A fault of the server, how many of the next requests it strikes, and what refines it.
Script = tuple[str, int, float | None]

#: No key is known any more to the server: what is bought again is charged again.
KEYS_FORGOTTEN: Final[Mapping[str, float]] = {"ignore_idempotency": 1.0}
#: After a day: no task is known any more, and no link works.
TASKS_FORGOTTEN: Final[Mapping[str, float]] = {
    **KEYS_FORGOTTEN,
    "read_404": 1.0,
    "no_batch": 1.0,
    "file_404": 1.0,
}


@dataclass(frozen=True)
class Host:
    """Where workers run: this machine, or by ``name`` a host of its own whose clock is ahead."""

    name: str = ""
    ahead_s: float = 0.0


def _nothing(_place: Place, _number: int) -> None:
    pass


def _nothing_to_mend(_place: Place, _number: int, *, refused: bool) -> None:
    pass


@dataclass(frozen=True)
class Episode:
    """What one worker, the odd one, meets between the others.

    ``enter`` changes the world before the odd worker and ``leave`` mends it after, and is told
    whether that worker refused: ended with an error before it asked for a purchase. ``earlier`` is
    called some workers before. All are told the place and the episode's number. Without
    ``amid_purchases`` all rows opened so far are stored when it begins; with it, a worker was
    killed just before while it bought. ``midway`` changes the world once purchases of the odd
    worker have reached the server, which keeps its answers back for a moment. ``rates`` are the
    server's faults for the odd worker, ``mended_rates`` those for the workers that then finish
    what is open. The odd worker buys with ``api_key``, has a clock that is ``ahead_s`` ahead, and
    with ``opens`` new rows to buy; it is killed at the edge ``killed_at``.
    """

    enter: Callable[[Place, int], None] = _nothing
    leave: Callable[..., None] = _nothing_to_mend
    earlier: Callable[[Place, int], None] | None = None
    midway: Callable[[Place, int], None] | None = None
    amid_purchases: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    mended_rates: Mapping[str, float] = field(default_factory=dict)
    api_key: str = API_KEY
    ahead_s: float = 0.0
    opens: bool = False
    killed_at: str = ""


@contextmanager
def _as_it_is(_place: Place) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Part:
    """One drill of a world: where it differs from the plain one. None is as the command says.

    ``share`` is what it takes of the world's requests and kills. ``kills`` false: nobody is killed
    and no fault strikes, so that nothing may be repeated, whether or not the server honours keys;
    then workers begin while others' purchases are on their way. ``scripts`` are faults that
    strike the first requests of each worker. ``steps_s`` are times that wall clocks are set to,
    as seconds ahead. ``unknown_is_right``: an outcome may stay unknown also under replay, because
    no clock said how old it was. ``adopts``: the journal may hold images that it has no
    purchase of. ``ground`` is what the whole drill stands on. ``wishes``: pictures are asked for
    again by the command, instead of requests by runs.
    """

    says: str = ""
    share: float = 1.0
    kills: bool = True
    on_unknown: OnUnknown | None = None
    honours_key: bool | None = None
    rates: Mapping[str, float] | None = None
    hosts: Sequence[Host] = (Host(),)
    workers: int | None = None
    scripts: Sequence[Script] = ()
    steps_s: Sequence[float] = ()
    episode: Episode | None = None
    unknown_is_right: bool = False
    adopts: bool = False
    ground: Callable[[Place], AbstractContextManager[None]] = _as_it_is
    wishes: bool = False


@dataclass(frozen=True)
class World:
    """A world by name. ``lacking`` says what this machine lacks for it, "" where it has all."""

    says: str
    parts: Sequence[Part]
    lacking: Callable[[], str] = str


# -- two hosts --------------------------------------------------------------------------------


def on_host(name: str, command: Sequence[str]) -> list[str]:
    """A command that runs on a host of its own: its name, its processes, this machine's files."""
    set_name = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return [*_NAMESPACES, "sh", "-c", set_name, name, *command]


def _no_namespaces() -> str:
    command = on_host("krea-drill", [sys.executable, "-c", "import os; assert os.getpid() == 1"])
    return "" if _succeeds(command) else f"needs Linux, root and {' '.join(_NAMESPACES)}"


def _succeeds(command: Sequence[str]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        done = subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - our own
    except OSError:
        return False
    return done.returncode == 0


# -- a backup ---------------------------------------------------------------------------------


def _copy_of(place: Place, number: int) -> Path:
    return place.folder / f"backup-{number}.db"


def _back_up(place: Place, number: int) -> None:
    """Copy the journal as SQLite's own backup does."""
    with (
        closing(sqlite3.connect(place.journal)) as journal,
        closing(sqlite3.connect(_copy_of(place, number))) as copy,
    ):
        journal.backup(copy)


def _restore(place: Place, number: int) -> None:
    """Put the copy in the journal's place, and the journal aside."""
    _move_journal(place.journal.parent, place.folder / f"newer-{number}")
    shutil.copyfile(_copy_of(place, number), place.journal)


def _put_newer_back(place: Place, number: int, *, refused: bool) -> None:
    """Follow the refusal: put the newer journal back. Otherwise the copy stays."""
    if refused:
        _move_journal(place.journal.parent, place.folder / f"refused-{number}")
        _move_journal(place.folder / f"newer-{number}", place.journal.parent)


def _move_journal(here: Path, there: Path) -> None:
    there.mkdir(exist_ok=True)
    for file in here.glob("journal.db*"):
        file.replace(there / file.name)


# -- an unmounted root ------------------------------------------------------------------------


def _unmount(place: Place, _number: int) -> None:
    """Leave the empty mount point in the place of the storage root."""
    place.storage.rename(place.folder / "unmounted")
    place.storage.mkdir()


def _mount(place: Place, number: int, *, refused: bool) -> None:  # noqa: ARG001 - it is mended either way
    """Put the root back. What was written to the mount point is under it, and seen by nobody."""
    place.storage.rename(place.folder / f"hidden-{number}")
    (place.folder / "unmounted").rename(place.storage)


# -- a full disk ------------------------------------------------------------------------------


@contextmanager
def _small_disk(place: Place) -> Iterator[None]:
    """Keep the journal on a disk of its own; afterwards it lies where it was seen."""
    disk = place.journal.parent
    disk.mkdir()
    _mount_tmpfs(disk)
    try:
        yield
    finally:
        shutil.copytree(disk, kept := place.folder / "kept", ignore=lambda *_: [_BALLAST])
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # noqa: S603, S607 - as above
        disk.rmdir()
        kept.rename(disk)


_BALLAST: Final = "ballast"


def _mount_tmpfs(disk: Path) -> None:
    options = f"size={_DISK_BYTES}"
    subprocess.run(  # noqa: S603 - our own folder
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],  # noqa: S607 - the system's
        check=True,
        capture_output=True,
    )


def _fill(place: Place, number: int) -> None:
    """Fill the disk but for a little."""
    disk = place.journal.parent
    room = _ROOM_BYTES[number % len(_ROOM_BYTES)]
    about = os.statvfs(disk)
    # Unbuffered, it writes what there is room for: a worker writes to the disk at the same time.
    with suppress(OSError), (disk / _BALLAST).open("wb", buffering=0) as ballast:
        ballast.write(bytes(max(0, about.f_bavail * about.f_frsize - room)))


def _make_room(place: Place, _number: int, *, refused: bool) -> None:  # noqa: ARG001 - either way
    (place.journal.parent / _BALLAST).unlink(missing_ok=True)


def _no_small_disk() -> str:
    mounts = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return "" if _succeeds(mounts) else "needs Linux, root and mount -t tmpfs"


# -- all of them ------------------------------------------------------------------------------

_AWAY: Final = Host("krea-drill-a"), Host("krea-drill-b", ahead_s=120.0)
_SLOW: Final[Sequence[Script]] = (("delay_create", 1_000_000, 0.6),)

#: Every world by its name; the plain one is the first.
WORLDS: Final[Mapping[str, World]] = {
    "plain": World("this machine and nothing odd", (Part(),)),
    "two-hosts": World(
        "workers on two hosts, whose clocks differ by two minutes, share the journal",
        (
            Part("killed", share=0.7, hosts=_AWAY, workers=2),
            Part(
                "nobody killed, keys ignored",
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
    "clock": World(
        "the wall clock is set by 3 s, 5 min, +30 h and -30 h while a worker works",
        (
            Part(
                "killed, also with intents of tomorrow",
                share=0.7,
                on_unknown="replay",
                honours_key=True,
                steps_s=_STEPS_S,
                unknown_is_right=True,
                episode=Episode(
                    ahead_s=30 * 3600.0,
                    opens=True,
                    killed_at="task exists, answer unread",
                    mended_rates=KEYS_FORGOTTEN,
                ),
            ),
            Part(
                "two workers, nobody killed, keys ignored",
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
    "backup": World(
        "the journal is replaced by a copy that is some workers old, and the keys are forgotten",
        (
            Part(
                on_unknown="replay",
                honours_key=True,
                adopts=True,
                episode=Episode(
                    enter=_restore,
                    leave=_put_newer_back,
                    earlier=_back_up,
                    rates=KEYS_FORGOTTEN,
                    mended_rates=KEYS_FORGOTTEN,
                ),
            ),
        ),
    ),
    "unmounted": World(
        "the storage root is an empty folder for one worker, a day after all was bought",
        (
            Part(
                on_unknown="replay",
                honours_key=True,
                episode=Episode(
                    enter=_unmount,
                    leave=_mount,
                    rates=TASKS_FORGOTTEN,
                    mended_rates=TASKS_FORGOTTEN,
                ),
            ),
        ),
    ),
    "foreign-key": World(
        "one worker, after one that was killed while it bought, has another account's key",
        (
            Part(
                on_unknown="replay",
                honours_key=True,
                episode=Episode(amid_purchases=True, opens=True, api_key=OTHER_API_KEY),
            ),
        ),
    ),
    "again": World(
        "`materialize --again` is killed and repeated: one wish, one picture",
        (Part(on_unknown="replay", honours_key=True, rates={}, wishes=True),),
    ),
    "full-disk": World(
        "the journal's disk fills while a worker buys, has room again, and the keys are forgotten",
        (
            Part(
                on_unknown="replay",
                honours_key=True,
                ground=_small_disk,
                episode=Episode(
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
    "server": World(
        "servers that replay, that ignore keys, that answer 409 conflict to a first POST",
        (
            Part(
                "late, undecided and lost answers",
                share=0.4,
                on_unknown="replay",
                honours_key=True,
                scripts=(("paid_outcome_unknown", 1, 0.2), ("drop_after_create", 1, None)),
            ),
            Part("keys ignored, policy hold", share=0.4, on_unknown="hold", honours_key=False),
            Part(
                "409 conflict, nobody killed",
                share=0.2,
                kills=False,
                on_unknown="replay",
                honours_key=True,
                scripts=(("idempotency_conflict", 3, None),),
            ),
        ),
    ),
}

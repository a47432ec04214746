"""Storage roots: which journal a root belongs to, and whether both have the same age.

A root contains a marker, a small file with its id, the id of its journal, and the token of the last
run that wrote into it. A token is written to the journal first. This detects, before anything is
requested, fetched or bought, a root that is empty, not mounted or of another journal, and a journal
or a root that was restored from a backup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection, func, insert, select, update

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.rows import rows_with
from krea_dagster.engine.journal.schema import about, files, requests, root_tokens, roots
from krea_dagster.engine.journal.sql import lock_transaction
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError

#: The marker's name under the root.
MARKER: Final = "krea-root.json"

#: How many of the newest and of the oldest files are checked when a run begins, in a folder and
#: behind a URL. If all are missing, or more than half of many, the root itself is missing.
_CHECKED_FILES: Final = (32, 8)
_MANY: Final = 10

#: PostgreSQL's advisory lock for entering a root, so that it is entered once.
_ENTERING: Final = 4_705_170_319

_ACCEPT: Final = "krea-dagster accept root"


@dataclass(frozen=True)
class RootMarker:
    """The content of a root's marker file."""

    root_id: str
    journal_id: str
    token: str

    @classmethod
    def read(cls, storage: Storage) -> RootMarker | None:
        """Read a root's marker, None if it has none. Raises ConfigError for a damaged one."""
        try:
            found = json.loads(storage.read(MARKER))
            return cls(*(str(found[name]) for name in ("root_id", "journal_id", "token")))
        except (FileNotFoundError, NotADirectoryError):
            storage.require_bucket()
            return None
        except OSError as error:
            raise StorageError(
                f"the storage root {storage.shown('')} cannot be read: {error}. Nothing was bought."
            ) from error
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{storage.shown(MARKER)} cannot be read. It names the journal that the storage "
                "root belongs to. Nothing was requested or bought. Restore it, or run "
                f"`{_ACCEPT}` if this is the right root."
            ) from None

    def write(self, storage: Storage) -> None:
        """Write the marker, durably."""
        storage.write(MARKER, lambda file: file.write(json.dumps(asdict(self)).encode()))


class RootLog(DatabaseLog):
    """The storage roots in a journal's database."""

    def check(self, storage: Storage) -> str | None:
        """Return the id of a root that may be used, None for one that is new to the journal.

        A copy counts as new if the original exists too. Raises ConfigError for a root that is not
        as this journal left it; the message says what to do.
        """
        marker = RootMarker.read(storage)
        with self._database.read() as connection:
            journal_id = connection.execute(select(about.c.journal_id)).scalar_one()
            known = {row.root_id: row for row in connection.execute(select(roots))}
            if marker is None:
                return self._without_marker(connection, storage, known.values())
            here = storage.shown("")
            if marker.journal_id != journal_id:
                raise ConfigError(
                    f"the storage root {here} belongs to another journal ({marker.journal_id}); "
                    f"that of {self._database.where} is {journal_id}. Its images would be bought "
                    "again. Nothing was requested or bought. Name the journal that belongs to it "
                    "(KREA_JOURNAL_URL), or another storage root (KREA_STORAGE); run "
                    f"`{_ACCEPT}` only if that journal is lost for good."
                )
            token = connection.execute(
                select(root_tokens).where(root_tokens.c.token == marker.token)
            ).first()
            if token is None or marker.root_id not in known:
                raise ConfigError(
                    f"the journal {self._database.where} is older than the storage root {here}: a "
                    "run that is not in it has written there. It was restored from a backup, and "
                    "does not know what was bought since. Nothing was requested or bought. "
                    "Restore a newer one. If there is none, wait until the tasks of earlier runs "
                    f"have ended (24 hours), and run `{_ACCEPT}`: images in the root are then "
                    "adopted without a known charge, and not bought again."
                )
            if _is_copy(storage, known[marker.root_id].location, marker.root_id):
                return None
            self._check_files(connection, storage, marker.root_id, since=token.number)
        return marker.root_id

    def _without_marker(self, connection: Connection, storage: Storage, known: Any) -> str | None:
        here = storage.shown("")
        for row in known:
            if row.location == here and not (count := _count(connection, row.root_id)):
                return str(row.root_id)  # another run is writing the marker, or was killed
            if row.location == here:
                raise ConfigError(
                    f"the storage root {here} is empty or not mounted: its marker {MARKER} is "
                    f"not there, and the journal {self._database.where} has {count} images in it. "
                    "Nothing was requested, fetched or bought. Mount it, or name the folder that "
                    f"it was moved to (KREA_STORAGE). If its images are lost, run `{_ACCEPT}`: "
                    "the next run then fetches the images whose links still work."
                )
        for row in known:
            if row.location == "":  # from before the journal had roots
                self._check_files(connection, storage, row.root_id)
                return str(row.root_id)
        if self._holds_images_of_others(connection, storage):
            raise ConfigError(
                f"{storage.shown('images')} contains images that were not bought with the journal "
                f"{self._database.where}: it would buy them again. Nothing was bought. Put their "
                "journal back (KREA_JOURNAL_URL), or move the images away to start empty; or run "
                f"`{_ACCEPT}`: images in the root are then adopted without a known charge."
            )
        return None

    def _holds_images_of_others(self, connection: Connection, storage: Storage) -> bool:
        """Return whether some of the first images were not stored by this journal."""
        names = islice(storage.names("images"), _CHECKED_FILES[1])
        keys = {Path(name).stem for name in names}
        if not keys:
            return False
        stored = select(func.count()).where(
            requests.c.request_key.in_(keys), requests.c.image_path.is_not(None)
        )
        return connection.execute(stored).scalar_one() < len(keys)

    def _check_files(
        self, connection: Connection, storage: Storage, root_id: str, since: int | None = None
    ) -> None:
        """Check that some of the expected files exist."""
        most = _CHECKED_FILES[storage.folder is None]
        expected = _files_of(connection, root_id, most)
        missing = _missing(storage, expected)
        all_gone = 2 < len(expected) == len(missing)
        if all_gone or len(missing) * 2 > len(expected) >= _MANY:
            raise ConfigError(
                f"{len(missing)} of {len(expected)} images that were checked under the storage "
                f"root {storage.shown('')} are missing, such as {missing[0].image_path}: it is "
                "not mounted completely, or was emptied. The journal "
                f"{self._database.where} has {_count(connection, root_id)} images in it. Nothing "
                f"was requested, fetched or bought. Put them back; if they are lost, run "
                f"`{_ACCEPT}`: the next run then fetches the images whose links still work."
            )
        if since is None:
            return
        later = connection.execute(
            select(func.min(root_tokens.c.at)).where(
                root_tokens.c.root_id == root_id, root_tokens.c.number > since
            )
        ).scalar()
        if later is None:
            return
        newer = [one for one in _files_of(connection, root_id, most) if one.at >= later]
        gone = _missing(storage, newer)
        if newer and len(gone) * 2 > len(newer):
            raise ConfigError(
                f"the storage root {storage.shown('')} is older than the journal "
                f"{self._database.where}: it was restored from a backup from before "
                f"{later:%Y-%m-%d %H:%M} UTC, and {len(gone)} of {len(newer)} images stored since "
                "then that were checked are missing. Nothing was requested, fetched or "
                f"bought. Put them back; if they are lost, run `{_ACCEPT}`: the next run then "
                "fetches the images whose links still work."
            )

    def id_of(self, storage: Storage) -> str:
        """Return the id of a root without a check, empty where no run has used it."""
        marker = RootMarker.read(storage)
        if marker is None:
            return ""
        query = select(roots.c.location).where(roots.c.root_id == marker.root_id)
        location = "".join(row.location for row in self._database.fetch(query))
        return "" if _is_copy(storage, location, marker.root_id) else marker.root_id

    def begin(self, storage: Storage, root_id: str | None) -> str:
        """Enter a checked root, write a new token into its marker, and return its id."""
        token, here = uuid4().hex, storage.shown("")
        at = datetime.now(timezone.utc)

        def write(connection: Connection) -> RootMarker:
            lock_transaction(connection, _ENTERING)
            # A root that another run has entered since the check has the location already.
            which = roots.c.root_id == root_id if root_id else roots.c.location == here
            known = connection.execute(select(roots).where(which)).first()
            name = uuid4().hex if known is None else str(known.root_id)
            if known is None:
                connection.execute(
                    insert(roots).values(root_id=name, location=here, adopts=False, first_at=at)
                )
            elif known.location != here:
                connection.execute(
                    update(roots).where(roots.c.root_id == name).values(location=here)
                )
            connection.execute(insert(root_tokens).values(token=token, root_id=name, at=at))
            journal_id = connection.execute(select(about.c.journal_id)).scalar_one()
            return RootMarker(name, str(journal_id), token)

        marker = self._database.write("enter a storage root in", write)
        try:
            marker.write(storage)
        except OSError as error:
            raise StorageError(
                f"the storage root {here} cannot be written to: {error}. Nothing was bought."
            ) from error
        return marker.root_id

    def accept(self, storage: Storage) -> str:
        """Accept a root as this journal's, as a person decided; return a text that says so.

        Missing images are noted as missing. Later runs adopt images that the journal does not know.
        """
        here = storage.shown("")
        marker = None
        with suppress(ConfigError):  # a damaged marker is written again
            marker = RootMarker.read(storage)
        at = datetime.now(timezone.utc)

        def write(connection: Connection) -> str:
            known = {row.root_id: row for row in connection.execute(select(roots))}
            chosen = marker.root_id if marker is not None else None
            if chosen in known and _is_copy(storage, known[chosen].location, str(chosen)):
                chosen = uuid4().hex
            if chosen is None:
                named = [row.root_id for row in known.values() if row.location in (here, "")]
                chosen = named[0] if named else uuid4().hex
            if chosen in known:
                connection.execute(
                    update(roots)
                    .where(roots.c.root_id == chosen)
                    .values(adopts=True, location=here)
                )
            else:
                connection.execute(
                    insert(roots).values(root_id=chosen, location=here, adopts=True, first_at=at)
                )
            return chosen

        root_id = self._database.write("accept a storage root in", write)
        with self._database.read() as connection:
            expected = _files_of(connection, root_id, None)
        gone = [one.request_key for one in _missing(storage, expected)]

        def note(connection: Connection) -> None:
            for key in gone:
                connection.execute(
                    update(files)
                    .where(files.c.request_key == key, files.c.root_id == root_id)
                    .values(missing_since=at)
                )

        self._database.write("note missing files in", note)
        self.begin(storage, root_id)
        return f"the storage root {here} is accepted; {len(gone)} of its images are missing"

    def adopts(self, root_id: str) -> bool:
        """Return whether a person has accepted a root as it is."""
        query = select(roots).where(roots.c.root_id == root_id, roots.c.adopts)
        return bool(self._database.fetch(query))

    def any_accepted(self) -> bool:
        """Return whether a person has accepted any root as it is."""
        return bool(self._database.fetch(select(roots).where(roots.c.adopts)))

    def elsewhere(self, request_keys: Sequence[str], root_id: str) -> dict[str, list[str]]:
        """Return the locations of the other roots that hold these images, by request key."""
        query = (
            select(files.c.request_key, roots.c.location)
            .join(roots, files.c.root_id == roots.c.root_id)
            .where(
                files.c.root_id != root_id,
                files.c.missing_since.is_(None),
                roots.c.location != "",
            )
        )
        found: dict[str, list[str]] = {}
        with self._database.read() as connection:
            for key, location in rows_with(connection, query, files.c.request_key, request_keys):
                found.setdefault(key, []).append(location)
        return found


def _missing(storage: Storage, expected: Sequence[Any]) -> list[Any]:
    """Return which of these files a root does not have."""
    sizes = storage.sizes_bytes([one.image_path for one in expected])
    return [one for one, size in zip(expected, sizes, strict=True) if size is None]


def _is_copy(storage: Storage, location: str, root_id: str) -> bool:
    """Return whether a root is a copy of another folder that still exists.

    One folder may have two paths (a mount, a link): then its marker is the same file.
    """
    here = storage.folder
    if here is None or location in ("", storage.shown("")):
        return False
    original = Path(location) / MARKER
    try:
        its, own = original.stat(), (here / MARKER).stat()
        if (its.st_ino, its.st_mtime_ns) == (own.st_ino, own.st_mtime_ns):
            return False
        return bool(json.loads(original.read_bytes()).get("root_id") == root_id)
    except (OSError, ValueError, AttributeError):
        return False


def _files_of(connection: Connection, root_id: str, most: int | None) -> list[Any]:
    """Return expected files of a root: ``most`` of the newest and of the oldest, or all."""
    query = (
        select(files.c.request_key, files.c.at, requests.c.image_path)
        .join(requests, files.c.request_key == requests.c.request_key)
        .where(files.c.root_id == root_id, files.c.missing_since.is_(None))
        .where(requests.c.image_path.is_not(None))
    )
    if most is None:
        return list(connection.execute(query))
    newest = connection.execute(query.order_by(files.c.at.desc()).limit(most)).all()
    oldest = connection.execute(query.order_by(files.c.at).limit(most)).all()
    return list({row.request_key: row for row in (*newest, *oldest)}.values())


def _count(connection: Connection, root_id: str) -> int:
    query = select(func.count()).select_from(files).where(files.c.root_id == root_id)
    return connection.execute(query).scalar_one()

"""The storage root: a local folder, or an object store through fsspec.

Files are written atomically: under another name first, then made durable, and then renamed (a
folder) or uploaded (an object store).

A store that does not answer is never mistaken for one without the file: methods that read or write
raise StorageUnavailable.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, cast

from krea_dagster import redact
from krea_dagster.engine.record import StoredImage
from krea_dagster.engine.storage import temp_files
from krea_dagster.errors import ConfigError, StorageUnavailable
from krea_dagster.file_systems import file_system_of, local_path

#: Errors about files, not about the network to a store.
_FILE_ERRORS: Final = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    NotImplementedError,
)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

#: Error numbers of a mounted folder whose host is not reachable.
_NETWORK: Final = frozenset(
    {
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
    }
)


class Storage:
    """The storage root: a folder or a URL for fsspec. Names under it use ``/``.

    Raises ConfigError if the root cannot be used.
    """

    def __init__(self, root: str) -> None:
        if not root:
            raise ConfigError("the storage root is empty; give a folder or a URL")
        self.folder = local_path(root)
        self._fs: Any = None
        self._remote: str | None = None
        if self.folder is None:
            self._connect(root)
        self._folders: set[str] = set()  # known to exist

    def _connect(self, root: str) -> None:
        try:
            self._fs, path = _without_listings(root)
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            said = redact.text(str(error), root)
            raise ConfigError(
                f"the storage root {redact.location(root)!r} (KREA_STORAGE) cannot be used: {said}"
            ) from redact.safe_cause(error, root)
        if "file" in _protocols(self._fs):
            self.folder = Path(path).absolute()
        else:
            self._remote = path.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({redact.location(self.locate(''))!r})"

    def locate(self, name: str) -> str:
        """Return the path or URL of a name."""
        if self.folder is not None:
            return str(self.folder / name)
        return str(self._fs.unstrip_protocol(self._full(name)))

    def shown(self, name: str) -> str:
        """Return the path or URL of a name for people, without user, password and query."""
        return redact.location(self.locate(name))

    def name_of(self, location: str) -> str:
        """Return the name under the root for an image's path or URL in a manifest.

        This also works if the root was moved after the manifest was written.
        """
        root = f"{self.locate('').rstrip('/')}/"
        if location.startswith(root):
            return location.removeprefix(root)
        _, found, rest = location.rpartition("/images/")
        return f"images/{rest}" if found else location.lstrip("/")

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, or None where there is none."""
        try:
            if self.folder is not None:
                # Not pathlib, which is ten times slower: this is called for every image.
                return os.stat(f"{self.folder}/{name}").st_size  # noqa: PTH116
            return cast("int", self._fs.info(self._full(name))["size"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error)

    def holds(self, image: StoredImage) -> bool:
        """Return whether an image's file exists with its full size."""
        return self.size_bytes(image.path) == image.bytes

    def ping(self) -> None:
        """Check that the store answers. Raises StorageUnavailable."""
        self.size_bytes("krea-root.json")

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises FileNotFoundError."""
        try:
            if self.folder is not None:
                return (self.folder / name).open("rb")
            return cast("BinaryIO", self._fs.open(self._full(name), "rb"))
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error)

    def has_files(self, folder: str) -> bool:
        """Return whether there is a file below a folder. Lists as little as possible."""
        if self.folder is not None:
            return next(self.names(folder), None) is not None
        return any(files for _, _, files in self._fs.walk(self._full(folder)))

    def names(self, folder: str) -> Iterator[str]:
        """Yield the names of all files below a folder, which may be missing."""
        if self.folder is None:
            for path in self._fs.find(self._full(folder)):
                yield cast("str", path).removeprefix(f"{self._remote}/")
            return
        for parent, folders, files in os.walk(self.folder / folder):
            folders.sort()
            for file in sorted(files):
                yield (Path(parent) / file).relative_to(self.folder).as_posix()

    def modified_at(self, name: str) -> datetime | None:
        """Return when a file was last written, UTC; None if that is not known."""
        try:
            if self.folder is not None:
                written_s = (self.folder / name).stat().st_mtime
                return datetime.fromtimestamp(written_s, timezone.utc)
            return cast("datetime", self._fs.modified(self._full(name)))
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            return None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield the path of a new file, which is removed afterwards unless it was published."""
        path, descriptor = self.create_temporary()
        os.close(descriptor)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def create_temporary(self) -> tuple[Path, int]:
        """Create an empty file, and return its path and a descriptor, which the caller closes.

        It is in the same file system as the root, so that publishing is a rename.
        """
        if self.folder is None:
            descriptor, name = tempfile.mkstemp(suffix=".part")
            return Path(name), descriptor
        folder = self.folder / temp_files.FOLDER
        path = folder / temp_files.new_name()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            if self._make(folder):
                temp_files.remove_abandoned(folder)
            with suppress(FileNotFoundError):  # the folder was removed meanwhile
                return path, os.open(path, flags, 0o644)
            folder.mkdir(parents=True, exist_ok=True)
            return path, os.open(path, flags, 0o644)
        except OSError as error:
            self.fail(error)

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished file its name, durably. An older file of that name is replaced."""
        try:
            if self.folder is None:
                self._fs.put_file(str(temporary), self._full(name))
            else:
                self._rename(temporary, self.folder / name)
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error)

    def _rename(self, temporary: Path, target: Path) -> None:
        sync_file(temporary)
        self._make(target.parent)
        try:
            temporary.replace(target)
        except FileNotFoundError:  # the folder was removed meanwhile
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)
        sync_folder(target.parent)

    def fail(self, error: Exception) -> NoReturn:
        """Raise the error, or StorageUnavailable if the store cannot be reached now."""
        number = getattr(error, "errno", None)
        is_about_file = isinstance(error, _FILE_ERRORS) or number in _FULL
        is_unavailable = number in _NETWORK if self.folder is not None else not is_about_file
        if not is_unavailable:
            raise error
        said = redact.text(str(error) or type(error).__name__, self.locate(""))
        raise StorageUnavailable(
            f"the storage root {self.shown('')} does not answer: {said}. Nothing more is bought "
            "until it does. What was paid for is in the journal, and the next run fetches it: run "
            "again within 24 hours, before the links expire."
        ) from redact.safe_cause(error, self.locate(""))

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file through ``write``, atomically."""
        with self.scratch() as temporary:
            with temporary.open("wb") as file:
                write(file)
            self.publish(temporary, name)

    def cache(self, name: str, data: bytes) -> None:
        """Write a file that can be made again, in a root that is a folder.

        Unlike ``write``, neither atomically nor durably: readers must recognize an incomplete file.
        """
        path = cast("Path", self.folder) / name
        try:
            path.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
        elif self._fs.exists(self._full(name)):
            self._fs.rm_file(self._full(name))

    def _make(self, folder: str | Path) -> bool:
        """Create a folder durably; return False if this object knows that it exists."""
        name = os.fspath(folder)
        if name in self._folders:
            return False
        missing = Path(name)
        parents = [parent for parent in (missing, *missing.parents) if not parent.exists()]
        missing.mkdir(parents=True, exist_ok=True)
        for made in parents:
            sync_folder(made.parent)
        self._folders.add(name)
        return True

    def _full(self, name: str) -> str:
        return f"{self._remote}/{name}" if name else str(self._remote)


def _without_listings(root: str) -> tuple[Any, str]:
    """Return the file system and the path of a root, without a cache of listings.

    A cached listing lacks what another host has stored since: its images would count as missing.
    """
    try:
        fs, path = file_system_of(root, use_listings_cache=False)
    except TypeError:  # a file system without that option
        fs, path = file_system_of(root)
    return fs, str(path)


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def sync_folder(folder: str | Path) -> None:
    """Make a rename durable: a name is content of the folder, not of the file."""
    sync_file(folder)


def sync_file(path: str | Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

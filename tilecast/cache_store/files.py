"""Files before SQL: what a path holds, by its first bytes, and whole-or-nothing writing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilecast.cache_store.foreign import SAMPLE_BYTES, described
from tilecast.cache_store.layout import EXPORT_ID, STORE_ID
from tilecast.errors import CacheError

SQLITE_MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "virtiofs", "vboxsf", "prl_fs", "afs", "coda", "ceph"}
    | {"lustre", "gpfs", "beegfs", "glusterfs", "orangefs", "pvfs2", "panfs", "wekafs", "gfs2", "ocfs2"}
)
"""File systems that several machines may mount; SQLite's WAL needs memory shared by all users of a file."""
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.encfs", "fuse.mergerfs", "fuse.bindfs"})
"""The file systems in user space that lie on a local one; all others (sshfs, s3fs, …) are taken for remote."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first 100 bytes of a SQLite file say (https://www.sqlite.org/fileformat.html#the_database_header).

    Sizes are in bytes; `expected_bytes` is 0 where the header does not know.
    """

    application_id: int
    user_version: int
    file_bytes: int
    expected_bytes: int

    @property
    def is_export(self) -> bool:
        """Whether the file is one that Tilecast exported."""
        return self.application_id == EXPORT_ID

    @property
    def is_store(self) -> bool:
        """Whether the file is a live store of Tilecast."""
        return self.application_id == STORE_ID


def sqlite_path(where: str | Path) -> Path | None:
    """Return the file that a path or `sqlite:///` URL names, None for a server's URL. Raises CacheError."""
    if isinstance(where, Path) or "://" not in where:
        return Path(where).expanduser()
    # Only a URL needs SQLAlchemy.
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(where)
    except ArgumentError as error:
        raise CacheError(f"{where}: is no SQLAlchemy URL; expected sqlite:///PATH or postgresql+DRIVER://…") from error
    if url.get_backend_name() != "sqlite":
        return None
    if url.query or not url.database:
        raise CacheError(f"{where}: expected sqlite:///PATH without options")
    return Path(url.database).expanduser()


def regular_size(path: Path) -> int | None:
    """Return the size of a regular file in bytes, None where there is nothing. Raises CacheError for all else."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: cannot be looked at ({reason(error)}); check the path and its permissions"
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{path}: is a directory, expected a file; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise CacheError(f"{path}: is not a regular file; name a file on disk")
    return status.st_size


def read_header(path: Path) -> Header:
    """Return the SQLite header of a file that must be there. Raises CacheError."""
    size = regular_size(path)
    if size is None:
        raise CacheError(f"{path}: does not exist; check the path, or make the file with `tilecast cache export`")
    if size == 0:
        raise CacheError(f"{path}: is empty; export it again")
    try:
        with path.open("rb") as file:
            data = file.read(SAMPLE_BYTES)
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error
    if not data.startswith(SQLITE_MAGIC):
        kind = described(data) or "is not a SQLite file, so no Tilecast table; export it again"
        raise CacheError(f"{path}: {kind}")
    data = data[:HEADER_BYTES]
    if len(data) < HEADER_BYTES:
        raise CacheError(f"{path}: is truncated to {size} bytes; export or copy it again")
    return _parsed_header(data, size)


def _parsed_header(data: bytes, size: int) -> Header:
    def number(offset: int, length: int = 4) -> int:
        return int.from_bytes(data[offset : offset + length], "big")

    page = 1 << 16 if number(16, 2) == 1 else number(16, 2)
    # The page count is only valid where the change counter agrees with "version-valid-for".
    pages = number(28) if number(24) == number(92) else 0
    return Header(application_id=number(68), user_version=number(60), file_bytes=size, expected_bytes=page * pages)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that any reader at any instant sees the old one or the whole new one. Raises CacheError.

    A process killed midway may leave `.NAME.PID.tmp` beside it, which nothing reads and anyone may delete.
    """
    target = Path(os.path.realpath(path))
    with _writing_beside(path, target) as temporary:
        _write_durably(temporary, data)
        temporary.replace(target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file at that takes the place of `path` at the end, whole or not at all.

    After an exception the old file stays and the new one is gone. Raises CacheError as `write_atomically` does.
    """
    target = Path(os.path.realpath(path))
    with _writing_beside(path, target) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)


def check_writable(path: Path) -> None:
    """Raise the CacheError that `write_atomically` would raise for the path or its folder; leaves nothing behind."""
    regular_size(path)
    with _writing_beside(path, Path(os.path.realpath(path))) as temporary:
        temporary.touch(exist_ok=False)
        temporary.unlink()


@contextlib.contextmanager
def _writing_beside(path: Path, target: Path) -> Iterator[Path]:
    """Give a name beside `target` for a file that is gone after any exception; translate errors."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: cannot be written ({reason(error)}); choose a path in a folder that exists and is writable"
        ) from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a folder; the file itself is synced by then.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def network_filesystem(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the type of the network file system that `path` lies on, None for a local one or if unknown."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    remote = kind in NETWORK_FILESYSTEMS or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
    return kind if remote else None


def reason(error: Exception) -> str:
    """Return one line that says why an operating-system call failed."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())

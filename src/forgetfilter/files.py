"""Write files and folders so that they appear under their name complete, or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from forgetfilter.errors import ConfigError, ForgetFilterError

HALF_MADE = re.compile(r"\.(.+)-[a-z0-9_]{8}\.tmp")
"""Names of temporary folders: that of the folder to be, and letters drawn at random."""
TEMPORARY = re.compile(rf"\..+\.\d+\.tmp|{HALF_MADE.pattern}")
"""Names of temporary files and folders, whose writing has not finished."""
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
"""Disk full, quota exceeded, file too large, broken, read-only, permission denied; name too long, links in a circle."""
LOCK = ".lock"
"""File that a process at work on a folder holds; a folder inside that has one of its own is another one's."""
TORCH_WRITES = ("iostream error", "inline_container.cc")
"""How torch.save says that a file could not be written to the end."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; the file then moves to `path` and replaces what was there."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name[:32]}.{os.getpid()}.tmp")  # no longer than the name itself may be
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk; some file systems cannot be asked to."""
    with suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        ConfigError: If a file stands in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: a file stands where a folder is to be. Give another one.") from error


def at_home(name: str | os.PathLike[str]) -> str:
    """A name in which ~/ at the beginning, the user's own folder, is spelt out."""
    given = os.fspath(name)
    return str(Path(given).expanduser()) if given.startswith("~/") else given


def require_writable(path: Path) -> None:
    """Raise what writing a file would raise, before the work that fills it."""
    make_folder(path.parent)
    with suppress(FileNotFoundError):
        path.stat()  # raises if the name is too long
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_text(path: Path, text: str) -> None:
    """Write a text file; half a character, which UTF-8 cannot hold, is written as JSON escapes it."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records to a file, one a line of JSON; what JSON does not know is written as text.

    Half a character, which UTF-8 cannot hold, is written as JSON escapes it.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; the folder then moves to `path` and replaces what was there."""
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for made in temporary.rglob("*"):
            (sync_folder if made.is_dir() else _sync)(made)
        sync_folder(temporary)
        if path.exists():  # move the old one away first, so that it is never half deleted under this name
            before = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
            path.rename(before / path.name)
            try:
                temporary.rename(path)
            except BaseException:
                (before / path.name).rename(path)
                before.rmdir()
                raise
            shutil.rmtree(before, ignore_errors=True)
        else:
            temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def scratch(folder: Path | None) -> IO[bytes]:
    """An open file without a name, to write and read: it is gone once it is closed, or the process is killed.

    Args:
        folder: A folder on the disk that it is to lie on, there already or not; None for the system's own.
    """
    there = folder and next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return tempfile.TemporaryFile(prefix=".scratch-", suffix=".tmp", dir=there)


def remove_temporaries(folder: Path) -> None:
    """Remove the half-written files of killed processes from a run's folder, which no process may be using.

    Folders inside that are runs of their own stay as they are: another process may be at work there.
    """
    for path in sorted(folder.rglob(".*.tmp")):
        inside = path.parents[: len(path.relative_to(folder).parts) - 1]
        if not TEMPORARY.fullmatch(path.name) or any((parent / LOCK).exists() for parent in inside):
            continue
        if path.is_dir():
            _put_back(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _put_back(temporary: Path) -> None:
    """Move a folder back that a kill has caught on its way out, before the new one had taken its place."""
    name = HALF_MADE.fullmatch(temporary.name)
    if name and (temporary / name[1]).is_dir() and not (temporary.parent / name[1]).exists():
        (temporary / name[1]).rename(temporary.parent / name[1])


def lock(path: Path, refused: type[ForgetFilterError], timeout: float = -1) -> AbstractContextManager[object]:
    """Lock by a file; the lock is held until the context given ends.

    Args:
        path: The file.
        refused: What is raised where the file system has no locks.
        timeout: Seconds to wait for another process; -1 for as long as it takes.

    Raises:
        filelock.Timeout: If another process holds it for longer.
    """
    try:
        return FileLock(path, timeout=timeout).acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or disk_trouble(error):
            raise
        raise refused(f"{path.parent}: this file system cannot lock files ({error}). Take another folder.") from error


def disk_trouble(error: BaseException) -> str | None:
    """A sentence about the disk problem that an exception or its cause reports; None if it reports none.

    Libraries that write files wrap the system's error in ones of their own, so their words are looked at, too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRORS:
            return f"{seen.filename or 'the output folder'}: {os.strerror(seen.errno or 0)}."
        for number in DISK_ERRORS:
            if os.strerror(number) in str(seen) or f"(os error {number})" in str(seen):
                return f"the output folder: {os.strerror(number)}."
        if any(words in str(seen) for words in TORCH_WRITES):
            return "the output folder: a checkpoint could not be written. Is the disk full?"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold, which tells what was made of it from all else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sha256(*paths: Path) -> str:
    """SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()

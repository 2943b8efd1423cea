"""Files and folders that appear under their name whole, or not at all."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\..+-[a-z0-9_]{8}\.tmp")
"""Names of what is not written to its end yet."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""No room, no more allowed, read-only, not permitted."""
TORCH_WRITES = ("iostream error", "inline_container.cc")
"""How torch.save says that a file could not be written to the end."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path given; it takes its own name once written, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill the folder given; it takes its own name once filled, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():  # aside first: it must not be half there under its name
            before = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
            path.rename(before / path.name)
            temporary.rename(path)
            shutil.rmtree(before, ignore_errors=True)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed left half-written in a run's folder; nobody may be at work on it."""
    for path in sorted(folder.rglob(".*.tmp")):
        if not TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def disk_trouble(error: BaseException) -> str | None:
    """What is wrong with the disk, in a sentence, if that is what an exception or its cause is about; else None.

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


def sha256(*paths: Path) -> str:
    """SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()

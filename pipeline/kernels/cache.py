"""Keeps compiled kernels in a directory of the user's own, a file each, so that later processes find their code there.

An entry's name is a digest of what was compiled and how. Inside, it lists the files that the compiler read besides, and
is right as long as these have the size and the time they had: neither the compiler nor its headers are looked for where
a kernel is found. Entries are written whole or not at all, and carry a digest of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".kernel"
_PARTIAL = ".partial"
_FORMAT = "1"  # of what `save` writes; another number is another name, so older entries aren't read
_DIGEST_BYTES = hashlib.sha256().digest_size
_MOST_BYTES = 256 * 2**20  # of all entries together: some thousand


@dataclass(frozen=True)
class Entry:
    """What is kept of a kernel: its machine code, what the compiler said of it, and the `FileState`s it depends on."""

    cubin: bytes
    report: dict[str, Any]
    files: tuple[FileState, ...]


@dataclass(frozen=True)
class FileState:
    """A file as it was: its path, its size, and when it was last written."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileState:
        """The file at `path` as it is now.

        Raises:
            OSError: there is none.
        """
        status = os.stat(path)
        return cls(str(path), status.st_size, status.st_mtime_ns)

    def holds(self) -> bool:
        """Whether the file is still so."""
        try:
            return FileState.of(self.path) == self
        except OSError:  # it has gone
            return False


def entry_path(directory: Path, *parts: str | bytes) -> Path:
    """The file for a kernel that `parts` describe: all that its code depends on and this installation knows itself."""
    digest = hashlib.sha256()
    for part in (_FORMAT, sys.prefix, *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return directory / f"{digest.hexdigest()}{SUFFIX}"


def load(path: Path) -> Entry | None:
    """The entry at `path`; None where there is none, it is damaged, or a file that it depends on has changed.

    Raises:
        OSError: it can't be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body = content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:_DIGEST_BYTES]:
        return None
    line, _, cubin = body.partition(b"\n")
    about = json.loads(line)
    files = tuple(FileState(*state) for state in about["files"])
    return Entry(cubin, about["report"], files) if all(file.holds() for file in files) else None


def save(path: Path, entry: Entry) -> None:
    """Write an entry, in the place of one that is there. The oldest ones go where all take more than 256 MiB.

    Raises:
        OSError: it can't be written.
    """
    import tempfile  # what only a kernel that was compiled needs

    states = [(file.path, file.size, file.mtime_ns) for file in entry.files]
    body = json.dumps({"report": entry.report, "files": states}).encode() + b"\n" + entry.cubin
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_PARTIAL)
    try:
        with open(fd, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(name, path)  # whole or not at all, also where several processes compile the same
    except BaseException:
        os.unlink(name)
        raise
    _remove_oldest(path.parent)


def kept_bytes(directory: Path) -> list[int]:
    """The sizes of the entries in a directory, which need not be there."""
    return [path.stat().st_size for path in directory.glob(f"*{SUFFIX}")]


def _remove_oldest(directory: Path) -> None:
    """Remove the entries that were written first, and what writers that were ended left, beyond _MOST_BYTES."""
    found = []
    for path in (*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*{_PARTIAL}")):
        try:
            found.append((path.stat(), path))
        except FileNotFoundError:  # another process has removed or renamed it
            continue
    excess = sum(status.st_size for status, _ in found) - _MOST_BYTES
    for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size


def own_directory(directory: Path) -> Path | None:
    """`directory`, made if missing, or None with a warning where others could plant machine code in it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        problem = str(error)
    else:
        if not stat.S_ISDIR(status.st_mode):
            problem = "it is a link"
        elif status.st_uid != os.geteuid():
            problem = f"it belongs to user {status.st_uid}"
        elif status.st_mode & 0o022:
            problem = f"others may write to it (mode {status.st_mode & 0o777:o})"
        else:
            return directory
    warnings.warn(
        f"kernels are compiled anew, because the cache {directory} can't be used: {problem}; remove it or set "
        f"PIPELINE_CACHE_DIR to a folder of your own",
        RuntimeWarning,
        stacklevel=3,
    )
    return None

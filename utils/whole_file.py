"""Files that are whole or not there, also after a crash of the machine."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there, synced to the disk, replaces `path`.

    If an error is raised, `path` stays as it was; one of the disk names it.
    """
    # A random name: process ids repeat in containers on several nodes.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        # A full disk names no file, and others the temporary one.
        if error.errno is not None and error.filename in (None, os.fspath(partial)):
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(OSError):  # the first error is the one that tells
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Return once the disk has what was written to a file, or which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Sync a folder where its file system can: some network and FUSE ones refuse to."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise

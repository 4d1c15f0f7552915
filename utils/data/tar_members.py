"""Offsets of the members of a tar file, and whether the file is complete."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from utils.errors import UserError

BLOCK = 512  # bytes of a header
TAIL_BYTES = 1 << 20  # looked at behind the end of an archive
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A file in an archive; `is_whole` unless it is a link or sparse."""

    name: str
    offset: int  # of its first byte
    size: int
    is_whole: bool


def tar_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """The files in an open archive; the position of `file` may be changed meanwhile.

    UserError, naming `path`, for one that is compressed, cut, damaged, or two joined into one.
    """
    if file.read(6).startswith(COMPRESSED):
        raise UserError(f"shard {path} is compressed, which hides where images lie; unpack it")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                is_file = member.isreg() or member.islnk() or member.issym()
                is_whole = member.isreg() and not member.issparse()
                if is_file:
                    yield Member(member.name, member.offset_data, member.size, is_whole)
            _check_end(file, archive.offset, path)
    except tarfile.TarError as error:
        raise UserError(f"shard {path} is cut, or no tar file: {error}") from None


def _check_end(file: BinaryIO, end: int, path: str) -> None:
    """Refuse an archive without its end, or with another behind it: tarfile tells neither."""
    file.seek(end)
    tail = file.read(TAIL_BYTES)
    if len(tail) < BLOCK:
        raise UserError(f"shard {path} is cut: it has no end of archive")
    if tail[:BLOCK].strip(b"\0"):
        raise UserError(f"shard {path} is damaged at byte {end:,}: there is no tar header")
    if tail.strip(b"\0"):
        raise UserError(f"shard {path} goes on behind its end, as two files joined; `tar -A` joins")

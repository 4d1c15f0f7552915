"""How images lie in an LMDB file, for those who write and those who read it.

    b"about"         json: version, count, class_names
    b"labels"        int64 little-endian [count]; absent without labels
    b"<number>"      bytes of an image file, number with nine digits
    b"<number>.name" its path below the folder it came from

Nothing heavy is imported: the writers answer `--help` at once.
"""

from typing import Any

from utils.errors import UserError

VERSION = 1


def key_of(index: int) -> bytes:
    """The key of an image's bytes."""
    return b"%09d" % index


def lmdb_package() -> Any:
    """The package lmdb; UserError where it is not installed."""
    try:
        import lmdb
    except ImportError:
        raise UserError("LMDB files need the package lmdb: pip install lmdb") from None
    return lmdb

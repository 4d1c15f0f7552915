"""Folders that are written to: made, or refused in one line that names the key and the cause."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError


def make_folder(folder: str | Path, key: str = "output_dir") -> Path:
    """Make a folder and those above it; UserError that begins with `key` where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(path, error, key) from None
    return path


def check_folder(folder: str | Path, key: str = "output_dir", *, writable: bool = True) -> None:
    """UserError where `make_folder` would surely fail; nothing is made.

    writable: false asks only that no file stands in the way. A file system that takes no folders
    shows itself not before one is made.
    """
    path = Path(folder).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if writable and not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise refused(path, error, key) from None


def refused(path: Path, error: OSError, key: str = "output_dir") -> UserError:
    """What the system said against a folder, in one line."""
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{key}: {str(path)[:60]}... is too long: {len(str(path))} characters")
    if _is_there(path):
        return UserError(f"{key}: {path} is there but cannot be written to: {error.strerror}")
    return UserError(f"{key}: cannot make {path}: {_cause(path, error)}")


def _is_there(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # below a folder that may not be looked into
        return False


def _cause(path: Path, error: OSError) -> str:
    try:
        places = (path, *path.parents)
        file = next((place for place in places if place.exists() and not place.is_dir()), None)
    except OSError:  # a folder that may not be looked into
        file = None
    if file is not None:
        return "it is a file" if file == path else f"{file} is a file"
    if error.errno == errno.ENOENT:  # the parents were made, or are there
        return f"{path.parent} takes no folders"
    return error.strerror or type(error).__name__


def keeps_records(config: Mapping[str, Any]) -> bool:
    """Whether a command has a run folder: it trains or judges. What measures or draws has none."""
    return bool({"recipe", "probes"} & config.keys())


def check_run_folder(config: Mapping[str, Any]) -> None:
    """UserError, before anything runs, for an `output_dir` that cannot be made."""
    kind = (config.get("launcher") or {}).get("kind")
    # Without a run folder nothing need be written: a table is printed. A job's logs are.
    writes = keeps_records(config) or kind == "slurm"
    if folder := config.get("output_dir"):
        check_folder(folder, writable=writes)

"""Download weights given as http addresses, before jobs start on nodes without a network."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils.download import Unavailable, download
from utils.errors import UserError
from utils.only_one import only_one

KEY = "weights"
# The beginning of a file's SHA-256 in torch.hub's names, as in `deit_..._224-b5f2ef4d.pth`. Eight
# decimal digits are a date or a number of steps more often than one.
CHECKSUM = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8,64})\.[^-]*$")


def with_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every http address below a key `weights` replaced by a downloaded file.

    A file is downloaded once, by one of the processes that ask for it, into torch.hub's folder.
    Raises UserError, in one line with the steps by hand, for an address that gives none.
    """
    return _replaced(config, lambda address: str(_file_of(address)))


def without_downloads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of networks that are built for their shapes alone, which needs no download.

    An http address below a key `weights` becomes its file where that is here already, else None;
    `pretrained: true`, which is timm's word for its own weights, becomes false. Raises UserError
    for an address that names no file.
    """
    return _replaced(_without_pretrained(config), _file_if_here)


def _replaced(value: Any, place: Callable[[str], str | None], *, inside: bool = False) -> Any:
    """inside: below a key `weights`, where every text is a place of some."""
    if isinstance(value, Mapping):
        return {
            key: _replaced(part, place, inside=inside or key == KEY) for key, part in value.items()
        }
    if isinstance(value, list):
        return [_replaced(part, place, inside=inside) for part in value]
    return place(value) if inside and is_address(value) else value


def _without_pretrained(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: False if key == "pretrained" and part is True else _without_pretrained(part)
            for key, part in value.items()
        }
    return [_without_pretrained(part) for part in value] if isinstance(value, list) else value


def _file_if_here(address: str) -> str | None:
    file = str(_place_of(address))
    return file if os.path.isfile(file) else None


def is_address(value: Any) -> bool:
    """Whether weights are given as an http address, in place of a file."""
    return isinstance(value, str) and value.startswith(("https://", "http://"))


def _file_of(address: str) -> Path:
    file = _place_of(address)
    try:
        if file.is_file():
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with only_one(file.with_name(f".{file.name}.lock")):
            if not file.is_file():
                _bring(address, file)
    except Unavailable as error:
        raise UserError(
            f"cannot download {address}: {error}; run this again to go on, or put the file at "
            f"{file} by hand"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot keep {address} at {file}: {error.strerror or error}; TORCH_HOME says where "
            "downloads go"
        ) from None
    return file


def _place_of(address: str) -> Path:
    """Where a download is kept: by its whole address, as many a file is called `model.pth`."""
    import torch  # a launcher without such weights does without

    found = urlsplit(address)
    parts = [part for part in found.path.split("/") if part not in ("", ".", "..")]
    if not found.netloc or not parts:
        raise UserError(f"{address} names no file")
    if found.query:  # in a folder's name, as the file's ending says how to read it
        parts.insert(-1, hashlib.sha256(found.query.encode()).hexdigest()[:16])
    return Path(torch.hub.get_dir(), "checkpoints", found.netloc, *parts)


def _bring(address: str, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    download(address, part, file.name)
    told = CHECKSUM.search(file.name)
    if told and not _sha256(part).startswith(told[1]):
        part.unlink()
        raise Unavailable(
            f"what came has another SHA-256 than its name tells ({told[1]}) and was removed"
        )
    part.replace(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

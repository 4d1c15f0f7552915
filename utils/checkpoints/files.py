"""Read and verify a checkpoint's folder, without executing anything its files contain.

A folder has checkpoint.json: format version, step, world size, size and hash of each file. Beside
it lie, in format 2, index.json (`utils/checkpoints/index.py`) and <rank>.safetensors
(`utils/checkpoints/shards.py`); in format 1, which is read by torch's restricted loader and no
longer written, <part>.pt with whole tensors.
"""

import json
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from utils import layout
from utils.checkpoints.index import INDEX, Stored, filled, index_fault, pack, stored_in, unpack
from utils.checkpoints.shards import hash_file, read_into
from utils.errors import UserError

DESCRIPTION = "checkpoint.json"
FORMAT = 2
READABLE = (1, 2)


class Parts(Mapping[str, Any]):
    """The parts of a checkpoint by name, read from `folder` when asked for.

    `parts[name]` is whole, on the CPU. To read no more than this rank needs, take `outline(name)`,
    which has a `Stored` in each tensor's place, and give `read` the tensors to fill.
    Raises UserError with one line for what cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        self._whole: dict[str, Tensor] = {}  # of format 1, mapped into memory
        self._old = self.description["format"] == 1
        if self._old:
            names = [name.removesuffix(".pt") for name in self.description["files"]]
            self._content: dict[str, Any] = dict.fromkeys(names)
        else:
            index = _read_index(self.folder, self.description)
            self._content, self._tensors = index["content"], index["tensors"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, name: str) -> Any:
        tree = self.outline(name)
        targets = {one.name: torch.empty(one.shape, dtype=one.dtype) for one in stored_in(tree)}
        self.read(targets)
        return filled(tree, targets)

    def outline(self, name: str) -> Any:
        """A part with a `Stored` in each tensor's place."""
        if not self._old:
            return unpack(self._content[name], self._tensors)
        if name not in self._content:
            raise KeyError(name)
        value = _load_old(self.folder / f"{name}.pt")
        tensors: dict[str, Tensor] = {}
        content = pack(value, name, tensors)
        self._whole |= tensors
        described = {
            key: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
            for key, t in tensors.items()
        }
        return unpack(content, described)

    @torch.no_grad()
    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole ones or shards, by the names of their `Stored`; no communication."""
        if self._old:
            for name, target in targets.items():
                target.copy_(layout.shard_like(self._whole[name], target))
            return
        try:
            read_into(self.folder, self._tensors, dict(targets))
        except CheckpointException as error:
            raise UserError(f"checkpoint {self.folder} cannot be read: {reason(error)}") from None

    def pieces(self, part: str, files: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """What of a part's tensors lies in `files`: key and piece, one after another."""
        tree = self.outline(part)
        stored = {one.name: key for key, one in tree.items() if isinstance(one, Stored)}
        if self._old:
            if f"{part}.pt" in files:
                yield from ((key, self._whole[name]) for name, key in stored.items())
            return
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name, key in stored.items():
            for file, place, _, _ in self._tensors[name]["pieces"]:
                by_file.setdefault(file, []).append((key, place))
        for file in by_file.keys() & files:
            with safe_open(self.folder / file, framework="pt") as opened:
                yield from ((key, opened.get_tensor(place)) for key, place in by_file[file])


def read_description(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a folder; raises UserError with one line if it is not to be used."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        version, files = description["format"], description["files"]
        good = all(
            Path(name).name == name and isinstance(expected["bytes"], int) and expected["sha256"]
            for name, expected in files.items()
        )
    except PermissionError as error:
        raise UserError(f"cannot read {folder / DESCRIPTION}: {error.strerror}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, version = False, FORMAT
    if not good:
        raise UserError(f"checkpoint {folder}: {DESCRIPTION} is missing or damaged")
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(f"checkpoint {folder} has format {version}, this version reads {known}")
    return description


def folder_fault(folder: Path) -> str:
    """Nothing if a checkpoint's description may be used, else one line about what is wrong."""
    try:
        description = read_description(folder)
    except UserError as error:
        return str(error)
    if description.get("step") != int(folder.name):
        return f"checkpoint {folder} says it is of step {description.get('step')}"
    return ""


def file_fault(path: Path, expected: Mapping[str, Any]) -> str:
    """Nothing if a file is the one that was written, else one line about what is wrong."""
    try:
        size = path.stat().st_size if path.exists() else 0
        if size != expected["bytes"]:
            return f"checkpoint {path} is truncated: {size} of {expected['bytes']} bytes"
        if hash_file(path) != expected["sha256"]:
            return f"checkpoint {path} is damaged: its bytes are not those that were written"
    except OSError as error:
        return f"checkpoint {path} cannot be read: {error.strerror}"
    return ""


def weights_fault(folder: Path, weights: Collection[str], files: Collection[str]) -> str:
    """Nothing if the weights, keys of the part `recipe`, are finite in these files, else one line.

    What cannot be read is no business of this: the loading tells of it, on every rank.
    """
    if not weights:
        return ""
    try:
        for key, piece in Parts(folder).pieces("recipe", files):
            if key in weights and not piece.isfinite().all():
                return f"checkpoint {folder} holds weights that are not finite ({key})"
    except (ValueError, SafetensorError, OSError, KeyError, AttributeError):
        pass
    return ""


def reason(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks, the first that failed and how many."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items())
        where = f" on rank {rank}" if rank or len(error.failures) > 1 else ""
        more = f" and {len(error.failures) - 1} more" if len(error.failures) > 1 else ""
        return f"{reason(first)}{where}{more}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = (str(error).splitlines() or [""])[0] or type(error).__name__
    return re.sub(r"^.*I/O error: (.*) \(os error \d+\)$", r"\1", said)  # as safetensors says it


def _read_index(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
        fault = index_fault(index, description["files"])
    except (OSError, ValueError, RecursionError) as error:
        fault = reason(error)
    if fault:
        raise UserError(f"checkpoint {folder / INDEX} cannot be used: {fault}")
    return index


def _load_old(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        told = "it asks for code to be run" if isinstance(error, pickle.UnpicklingError) else ""
        raise UserError(f"checkpoint {path} cannot be read: {told or reason(error)}") from None

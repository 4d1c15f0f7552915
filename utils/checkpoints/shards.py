"""How `torch.distributed.checkpoint` stores tensors: safetensors files, no pickle.

torch's own storage describes its files in a pickle, which whoever can write to the folder can make
execute anything. Here nothing that is read is a pickle: a rank's shards are one safetensors file,
and an index in JSON says what is where (`utils/checkpoints/index.py`). torch plans who writes and
who reads which piece, so a checkpoint is read on any number of processes and in any sharding.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from utils.whole_file import sync

# A process that saves or reads by itself is meant to.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

# The umask can only be read by setting it: done on import, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


class Written(NamedTuple):
    """Where a piece of a tensor lies, and the file it lies in."""

    file: str
    key: str
    offsets: list[int]
    sizes: list[int]
    bytes: int
    sha256: str


class ShardWriter(StorageWriter):
    """Writes each rank's pieces as `<rank>.safetensors` into `folder`, synced to the disk.

    On rank 0, `finished(tensors, files)` is called once all ranks have written: the tensors' part
    of the index, and size and hash of each file. What it raises fails the save on every rank.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[], None],
        finished: Callable[[dict[str, Any], dict[str, Any]], None],
    ) -> None:
        self.folder, self._prepare, self._finished = folder, prepare, finished

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, on rank 0, and number the files."""
        self._prepare()
        return [replace(plan, storage_data=f"{rank:05d}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        name = f"{plan.storage_data}.safetensors"
        tensors: dict[str, Tensor] = {}
        places, storages = [], set()
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage()
            # safetensors refuses tensors that share memory, and would write all of a view's.
            if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            name_taken = item.index.fqn in tensors
            key = f"{item.index.fqn}#{len(tensors)}" if name_taken else item.index.fqn
            tensors[key] = tensor
            places.append((item.index, key, item.tensor_data.chunk))
        results = []
        if tensors:
            size, digest = _write(self.folder / name, tensors)
            results = [
                WriteResult(
                    index,
                    tensors[key].nbytes,
                    Written(name, key, list(chunk.offsets), list(chunk.sizes), size, digest),
                )
                for index, key, chunk in places
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hand the index over, on rank 0."""
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for result in (result for one_rank in results for result in one_rank):
            stored, place = metadata.state_dict_metadata[result.index.fqn], result.storage_data
            assert isinstance(stored, TensorStorageMetadata)
            entry = tensors.setdefault(
                result.index.fqn,
                {
                    "dtype": str(stored.properties.dtype).removeprefix("torch."),
                    "shape": list(stored.size),
                    "pieces": [],
                },
            )
            entry["pieces"].append([place.file, place.key, place.offsets, place.sizes])
            files[place.file] = {"bytes": place.bytes, "sha256": place.sha256}
        self._finished(tensors, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """The folder is given to the constructor."""
        return False


class ShardReader(StorageReader):
    """Reads what `ShardWriter` wrote, by the index."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any]) -> None:
        self.folder, self._tensors = folder, tensors
        self._places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's words."""
        found: dict[str, TensorStorageMetadata] = {}
        self._places = {}
        for name, entry in self._tensors.items():
            chunks = []
            for file, key, offsets, sizes in entry["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self._places[MetadataIndex(name, offsets)] = (file, key)
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            found[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(state_dict_metadata=dict(found), storage_data=self._places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, **_: Any) -> None:
        """The index is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the pieces this rank needs, file by file."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            file, key = self._places[item.storage_index]
            by_file.setdefault(file, []).append((key, item))
        for file, wanted in by_file.items():
            with safe_open(self.folder / file, framework="pt") as stored:
                for key, item in wanted:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_piece(stored, key, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """The folder is given to the constructor."""
        return False


def read_into(folder: Path, tensors: Mapping[str, Any], targets: dict[str, Tensor]) -> None:
    """Fill `targets` (name -> Tensor or DTensor) in place, each rank with what it holds.

    No communication. Raises CheckpointException for what cannot be read.
    """
    if targets:
        dcp.load(dict(targets), storage_reader=ShardReader(folder, tensors), no_dist=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a value durably; returns size and hash of the file."""
    path.write_text(json.dumps(value))
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def set_usual_mode(path: Path) -> None:
    """Give a file the usual permissions (umask); safetensors makes files private to the user."""
    os.chmod(path, 0o666 & ~_UMASK)


def _write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    path.parent.mkdir(parents=True, exist_ok=True)  # another node may not have seen it yet
    try:
        save_file(tensors, path)
        set_usual_mode(path)
    except Exception as error:
        # An error of safetensors cannot travel between ranks, and a full disk is an OSError.
        raise OSError(str(error).splitlines()[0]) from None
    sync(path)
    return path.stat().st_size, hash_file(path)


def _piece(stored: Any, key: str, item: Any) -> Tensor:
    if not item.lengths:
        return stored.get_tensor(key)
    ends = zip(item.storage_offsets, item.lengths, strict=True)
    return stored.get_slice(key)[tuple(slice(start, start + length) for start, length in ends)]

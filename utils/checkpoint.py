"""Checkpoints as folders that exist whole or not at all, and exported weights.

    checkpoints/<step>/checkpoint.json   format version, step, world size, config fingerprint, size
    and hash of each file
                       <part>.pt         plain tensors, dicts and numbers, read back with
                       `weights_only=True`
    checkpoints/last                     the name of the folder to resume from

A folder is written under another name, synced to the disk and renamed; `last` moves after that, and
only then are old folders removed. What a part holds is `utils/state.py`'s business: whole tensors
today, independent of how many processes wrote them; a part that torch.distributed.checkpoint writes
as a folder of shards fits beside them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UserError

FORMAT = 1
_DESCRIPTION = "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run.

    `every` steps one is due (0: only at the end); the newest `keep_last` stay, and those at
    multiples of `keep_every` (0: none) stay for good. `fingerprint` names the config, to tell a
    resumed run that it changed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int = 0,
        keep_last: int = 3,
        keep_every: int = 0,
        fingerprint: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.every, self.keep_last, self.keep_every = every, max(keep_last, 1), keep_every
        self.fingerprint = fingerprint

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        return self.every > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending; sound or not."""
        return sorted(
            int(path.name)
            for path in self.folder.glob("*")
            if path.name.isdigit() and path.is_dir()
        )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, parts: Mapping[str, Any], *, replace: bool = True) -> str:
        """Write a checkpoint from rank 0's `parts`; every rank must call this.

        With `replace=False` one of this step that is there already stays as it is.
        Returns nothing, or one line if the disk did not take it: then the earlier checkpoints are
        untouched.
        """
        problem = ""
        if distributed.is_main() and (replace or step not in self.steps()):
            try:
                self._write(step, parts)
            except (
                OSError,
                RuntimeError,
            ) as error:  # torch's zip writer turns an OSError into a RuntimeError
                shutil.rmtree(self._temporary(step), ignore_errors=True)
                reason = (
                    error.strerror
                    if isinstance(error, OSError) and error.strerror
                    else _reason(error)
                )
                kept = (
                    f"the one of step {self.steps()[-1]} stays"
                    if self.steps()
                    else "there is no earlier one"
                )
                problem = (
                    f"checkpoint of step {step} not written to {self.folder} ({reason}): {kept}"
                )
        return distributed.broadcast_object(problem)

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any], list[str]] | None:
        """The checkpoint to resume from: (step, parts, description, notes), or None without any.

        `notes` names, a line each, the damaged ones passed over. Raises UserError if all are
        damaged. Every rank must call this.
        """
        chosen, notes = distributed.broadcast_object(
            self._choose() if distributed.is_main() else None
        )
        if chosen is None:
            if notes:
                raise UserError(
                    f"no sound checkpoint in {self.folder}: {'; '.join(notes)}; "
                    "use another output_dir to start anew"
                )
            return None
        description = json.loads((self.path(chosen) / _DESCRIPTION).read_text())
        parts = {
            name.removesuffix(".pt"): torch.load(
                self.path(chosen) / name, map_location="cpu", weights_only=True, mmap=True
            )
            for name in description["files"]
        }
        return (
            chosen,
            parts,
            description,
            [f"{note}; resuming from step {chosen}" for note in notes],
        )

    def fault(self, step: int) -> str:
        """Nothing if the step's checkpoint is sound, else one line about what is wrong."""
        folder = self.path(step)
        try:
            description = json.loads((folder / _DESCRIPTION).read_text())
            version, files = description["format"], description["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"checkpoint {folder}: {_DESCRIPTION} is missing or damaged"
        if version != FORMAT:
            return f"checkpoint {folder} has format {version}, this version reads {FORMAT}"
        for name, expected in files.items():
            path = folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected["bytes"]:
                return f"checkpoint {path} is truncated: {size} of {expected['bytes']} bytes"
            if _hash(path) != expected["sha256"]:
                return f"checkpoint {path} is damaged: its bytes are not those that were written"
        return ""

    def _choose(self) -> tuple[int | None, list[str]]:
        for replaced in self.folder.glob(".replaced-*"):  # killed between its two renames
            if not self.path(int(replaced.name.split("-")[1])).exists():
                os.rename(replaced, self.path(int(replaced.name.split("-")[1])))
        for leftover in self.folder.glob(".*"):  # a save or a removal that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        pointer = self.folder / "last"
        name = pointer.read_text().strip() if pointer.exists() else ""
        steps = self.steps()
        first = int(name) if name.isdigit() else (steps[-1] if steps else 0)
        # `last` first, then what is older, newest first, then what is newer.
        order = sorted((s for s in steps if s <= first), reverse=True) + [
            s for s in steps if s > first
        ]
        notes: list[str] = []
        for step in order:
            fault = self.fault(step)
            if not fault:
                return step, notes
            notes.append(fault)
        return None, notes

    def _write(self, step: int, parts: Mapping[str, Any]) -> None:
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for name, value in parts.items():
            path = temporary / f"{name}.pt"
            with open(path, "wb") as file:
                torch.save(value, file)
                _sync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
        description = {
            "format": FORMAT,
            "step": step,
            "world_size": distributed.world_size(),
            "fingerprint": self.fingerprint,
            "torch": torch.__version__,
            "files": files,
        }
        write_text(temporary / _DESCRIPTION, json.dumps(description, indent=1) + "\n")
        replaced = self.folder / f".replaced-{step}"
        if self.path(step).exists():
            os.rename(self.path(step), replaced)
        os.rename(temporary, self.path(step))
        _sync_folder(self.folder)
        write_text(self.folder / "last", f"{step}\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)

    def _prune(self, step: int) -> None:
        # Newer folders (of a run that was set back to an earlier step) do not count: they will be
        # overwritten.
        periodic = [
            s
            for s in self.steps()
            if s <= step and not (self.keep_every and s % self.keep_every == 0)
        ]
        for old in periodic[: -self.keep_last]:
            _remove(self.path(old))

    def _temporary(self, step: int) -> Path:
        return self.folder / f".writing-{step}"


def export_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors with `metadata` (strings), atomically; rank 0 only."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    save_file(
        {name: value.contiguous().clone() for name, value in weights.items()},
        temporary,
        dict(metadata),
    )
    with open(temporary, "rb") as file:
        _sync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        _sync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _remove(folder: Path) -> None:
    # Renamed first, so that a removal that is killed leaves no half folder under a checkpoint's
    # name.
    if folder.exists():
        doomed = folder.with_name(f".removing-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    cause = error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0] or type(error).__name__

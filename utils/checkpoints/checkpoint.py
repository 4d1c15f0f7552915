"""Checkpoints as folders that exist whole or not at all.

    checkpoints/<step>/     see `utils/checkpoints/files.py`
    checkpoints/last        the name of the folder to resume from

A save copies this rank's tensors to the CPU and returns; a thread lets
`torch.distributed.checkpoint` write them, each rank its shards. The folder is written under another
name, synced to the disk and renamed once every rank has written; `last` moves after that, and only
then are old folders removed.
"""

import os
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from utils import distributed, layout
from utils.checkpoints.files import (
    DESCRIPTION,
    FORMAT,
    Parts,
    file_fault,
    folder_fault,
    read_description,
    reason,
    weights_fault,
)
from utils.checkpoints.index import INDEX, pack
from utils.checkpoints.shards import ShardWriter, write_json
from utils.errors import UserError
from utils.ranges import check_count
from utils.whole_file import sync_folder, write_text

SETTLED_WITHIN_S = 300  # more is needed only where a save waits for a rank that has died


class NotSaved(UserError):
    """The disk did not take a checkpoint; the line says which, and what is left."""


class Checkpoints:
    """The checkpoints of one run.

    `every` steps one is due (0: only at the end); the newest `keep_last` stay, and those at
    multiples of `keep_every` (0: none) stay for good. `fingerprint` is kept in each
    one's description, for the caller to compare; `plan` is numbers that depend on the processes,
    and `plan_before` those of the checkpoint that was loaded, if it knows them. Raises UserError
    for numbers that mean nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int = 0,
        keep_last: int = 3,
        keep_every: int = 0,
        fingerprint: str = "",
        plan: Mapping[str, int] | None = None,
    ) -> None:
        least = {"every": (every, 0), "keep_last": (keep_last, 1), "keep_every": (keep_every, 0)}
        for key, (value, smallest) in least.items():
            check_count(f"checkpoint.{key}", value, smallest)
        self.folder = Path(folder)
        self.every, self.keep_last, self.keep_every = every, keep_last, keep_every
        self.fingerprint = fingerprint
        self.plan, self.plan_before = dict(plan or {}), dict[str, int]()
        self.newest: int | None = None  # the step last saved or loaded
        self.seconds_before = 0.0  # what the run took before the checkpoint that was loaded
        self._began = time.perf_counter()
        self._saving: tuple[int, futures.Future[Any]] | None = None
        self._news: list[str] = []
        self._group: dist.ProcessGroup | None = None

    @property
    def seconds(self) -> float:
        """What the run has taken: since this object was made, and before what it resumed from."""
        return self.seconds_before + time.perf_counter() - self._began

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        return self.every > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending; sound or not."""
        return sorted(
            int(path.name)
            for path in self.folder.glob("*")
            if path.name.isdecimal() and path.is_dir()
        )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, parts: Mapping[str, Any], *, replace: bool = True) -> str:
        """Write a checkpoint and wait for it; see `start` and `wait`."""
        self.start(step, parts, replace=replace)
        return self.wait()

    def start(self, step: int, parts: Mapping[str, Any], *, replace: bool = True) -> None:
        """Begin to write `parts`, once an earlier save is through; every rank must call this.

        Returns as soon as the tensors are copied: they may change then. Tensors that are not
        sharded, and the plain values, are rank 0's. With `replace=False` a checkpoint of this step
        that is there already stays as it is.
        """
        self.wait()
        there = distributed.is_main() and not replace and step in self.steps()
        if distributed.broadcast_object(there):
            self.newest = step
            return
        tensors: dict[str, Tensor] = {}
        content = {name: pack(value, name, tensors) for name, value in parts.items()}
        writer = ShardWriter(
            self._temporary(step),
            prepare=lambda: _make_anew(self._temporary(step)),
            finished=lambda index, files: self._commit(step, content, index, files),
        )
        if self._group is None and distributed.world_size() > 1:
            # Its own, as the thread talks while the training does.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        future = dcp.async_save(
            cast(dict[str, Any], layout.written_here(tensors)),
            storage_writer=writer,
            process_group=self._group,
        )
        self._saving = step, cast("futures.Future[Any]", future)

    def wait(self) -> str:
        """Wait for the save that was started, if any; every rank must call this.

        Returns nothing, or one line if the disk did not take it: then the earlier checkpoints are
        untouched.
        """
        if self._saving is None:
            return ""
        (step, future), self._saving = self._saving, None
        error = future.exception()
        problem = ""
        if distributed.is_main() and error is not None:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
            # A save that failed at `last` has left its folder too.
            steps = [s for s in self.steps() if s != step] or self.steps()
            kept = f"the one of step {steps[-1]} stays" if steps else "there is no earlier one"
            problem = f"checkpoint of step {step} not written to {self.folder} ({reason(error)})"
            problem = f"{problem}: {kept}"
            self._news += [problem] if problem not in self._news else []
        problem = distributed.broadcast_object(problem)
        self.newest = self.newest if problem else step
        return problem

    def settle(self) -> None:
        """Let a save that was started end, on this rank alone: for a run that ends by an error.

        The next run of the folder must not meet a checkpoint half written.
        """
        if self._saving is not None:
            futures.wait([self._saving[1]], SETTLED_WITHIN_S)

    def news(self) -> str:
        """Rank 0: of every save that failed since the last call, a line."""
        told, self._news = "\n".join(self._news), []
        return told

    def load(self, weights: Collection[str] = ()) -> tuple[int, Parts, list[str]] | None:
        """The checkpoint to resume from: (step, parts, notes), or None without any.

        `notes` names, a line each, the unsound ones passed over: damaged, or with NaN or infinity
        in the tensors of the part `recipe` that `weights` names. Raises UserError if all are.
        Every rank must call this.
        """
        step, notes = self.soundest(weights)
        if step is not None:
            parts = Parts(self.path(step))
            self.newest = step
            spent = parts.description.get("seconds")  # a number, unless another version wrote it
            self.seconds_before = float(spent) if isinstance(spent, int | float) else 0.0
            self.plan_before = _numbers(parts.description.get("plan"))
            told = [f"{note}; resuming from step {step}" for note in notes]
            return step, parts, told
        if notes:
            raise UserError(
                f"no sound checkpoint in {self.folder}: {'; '.join(notes)}; "
                "use another output_dir to start anew"
            )
        return None

    def soundest(self, weights: Collection[str] = ()) -> tuple[int | None, list[str]]:
        """The step that `load` resumes from, and what is wrong with those passed over.

        Every rank must call this.
        """
        order = distributed.on_main(self._order)
        notes: list[str] = []
        for step in order:
            if not (fault := self._shared_fault(step, weights)):
                return step, notes
            notes.append(fault)
        return None, notes

    def _shared_fault(self, step: int, weights: Collection[str]) -> str:
        # Nothing if it is sound, its weights too, else one line; each rank reads some of the files.
        path = self.path(step)
        fault = distributed.on_main(lambda: folder_fault(path))
        if not fault:
            files = read_description(path)["files"]
            mine = list(files)[distributed.rank() :: distributed.world_size()]
            faults = (file_fault(path / name, files[name]) for name in mine)
            own = next((one for one in faults if one), "") or weights_fault(path, weights, mine)
            fault = next((one for one in distributed.gather_objects(own) if one), "")
        return fault

    def _order(self) -> list[int]:
        # `last` first, then what is older, newest first, then what is newer.
        for replaced in self.folder.glob(".replaced-*"):  # killed between its two renames
            original = self.folder / replaced.name.removeprefix(".replaced-")
            if not original.exists():
                os.rename(replaced, original)
        for leftover in self.folder.glob(".*"):  # a save or a removal that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        pointer = self.folder / "last"
        name = pointer.read_text().strip() if pointer.exists() else ""
        steps = self.steps()
        first = int(name) if name.isdecimal() else (steps[-1] if steps else 0)
        return sorted((s for s in steps if s <= first), reverse=True) + [
            s for s in steps if s > first
        ]

    def _commit(
        self, step: int, content: dict[str, Any], tensors: dict[str, Any], files: dict[str, Any]
    ) -> None:
        # On rank 0, in the thread that saves, when every rank has written its file.
        temporary = self._temporary(step)
        for name, expected in files.items():
            size = (temporary / name).stat().st_size if (temporary / name).exists() else 0
            if size != expected["bytes"]:
                raise OSError(f"{name} is not here: do all nodes share {self.folder}?")
        files[INDEX] = write_json(temporary / INDEX, {"content": content, "tensors": tensors})
        description = {
            "format": FORMAT,
            "step": step,
            "world_size": distributed.world_size(),
            "fingerprint": self.fingerprint,
            "plan": self.plan,
            "seconds": round(self.seconds, 1),
            "torch": torch.__version__,
            "files": files,
        }
        write_json(temporary / DESCRIPTION, description)
        sync_folder(temporary)
        replaced = self.folder / f".replaced-{step}"
        if self.path(step).exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a save that failed after its renames
            os.rename(self.path(step), replaced)
        os.rename(temporary, self.path(step))
        sync_folder(self.folder)
        self._point_to(step)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)

    def _point_to(self, step: int) -> None:
        last = self.folder / "last"
        try:
            write_text(last, f"{step}\n")
        except OSError as error:  # which may name a temporary file, or none
            raise OSError(error.errno, f"{last}: {error.strerror}") from error

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


def _remove(folder: Path) -> None:
    # Renamed first, so that a removal that is killed leaves no half folder under a checkpoint's
    # name.
    if folder.exists():
        doomed = folder.with_name(f".removing-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _numbers(plan: Any) -> dict[str, int]:
    # What another version wrote may have none, or be of another kind.
    entries = plan.items() if isinstance(plan, dict) else ()
    return {key: value for key, value in entries if isinstance(value, int)}

"""The checkpoints of a probe that trains heads: weights, optimiser, and what they belong to.

The layout is that of DINOv2's files: `model` holds the heads by their names, `iteration` the number
of the last step done, counted from 0; a text file names the newest file of weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.progress import say
from utils import distributed
from utils.errors import UserError, as_user_error
from utils.whole_file import whole_file, write_text
from vit.weights import read_pickle

OWNER = "probe"  # the key of the net and the settings that the heads belong to


class StoredHeads(Protocol):
    """Heads that are stored under published names."""

    def published_state(self) -> dict[str, Tensor]:
        """All parameters by name."""
        ...

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load them by name; UserError if they are of other heads."""
        ...


class ProbeFiles:
    """The files `<running>.pth`, `<final>.pth` and `<pointer>` of one probe in its folder.

    `owner` names what the heads depend on: the net, by `net_fingerprint`, the step it was trained
    to, and the protocol. Files of another net are replaced; files with other settings are refused.
    """

    def __init__(
        self,
        folder: Path,
        owner: Mapping[str, object],
        *,
        running: str,
        final: str,
        pointer: str = "last_checkpoint",
    ) -> None:
        self.folder, self.owner = Path(folder), json.loads(json.dumps(owner))
        self.running, self.final, self.pointer = running, final, pointer
        self.unread: set[str] = set()  # images that the training could not read, over all starts

    def save(
        self, name: str, heads: StoredHeads, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Write a file, whole or not at all, and then the pointer to it; only rank 0 writes."""
        if not distributed.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.pth"
        content = {
            # These are views; without a copy each would be written with its whole storage.
            "model": {
                key: value.detach().to("cpu", copy=True)
                for key, value in heads.published_state().items()
            },
            "optimizer": optimizer.state_dict(),
            "iteration": step,
            "unread": sorted(self.unread),
            OWNER: self.owner,
        }
        with whole_file(path) as partial:
            torch.save(content, partial)
        write_text(self.folder / self.pointer, path.name)

    def resume(self, heads: StoredHeads, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the newest file; returns the first step still to do, None if there is no file.

        UserError for a damaged file and for one with other settings. Every rank must call this.
        """
        # Settings as rank 0 has and saves them: a repr may hold an address that differs by rank.
        path, self.owner = distributed.broadcast_object(
            (self._newest(), self.owner) if distributed.is_main() else None
        )
        if path is None:
            return None
        saved = _read(path)
        owner = saved.get(OWNER)
        if not isinstance(owner, Mapping):
            raise UserError(
                f"{path} was not written by this probe; use another output_dir, resume=false, or "
                "classifier=FILE to judge it"
            )
        if any(owner.get(key) != self.owner[key] for key in ("net", "step")):
            if distributed.is_main():
                say(f"{path} is of another net: the probe starts anew")
            return None
        differ = _differences(owner.get("protocol", {}), self.owner["protocol"])
        if differ:
            raise UserError(
                f"{path} is of other settings ({'; '.join(differ)}); use another output_dir or "
                "resume=false"
            )
        _load(path, heads, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        self.unread.update(saved.get("unread", ()))  # files of older versions lack it
        return int(saved["iteration"]) + 1

    def _newest(self) -> Path | None:
        pointer = self.folder / self.pointer
        name = pointer.read_text().strip() if pointer.is_file() else ""
        # Only our own two names, so that the pointer cannot lead to any other file.
        known = (f"{self.running}.pth", f"{self.final}.pth")
        return self.folder / name if name in known and (self.folder / name).is_file() else None


def load_classifier(path: str | Path, heads: StoredHeads, num_steps: int) -> int:
    """Load heads from a file of ours or of DINOv2; returns the first step still to do.

    A file without `iteration` counts as fully trained.
    """
    saved = _read(Path(path))
    model = saved.get("model", saved)
    if not isinstance(model, Mapping):
        raise UserError(f"{path}: 'model' holds no named weights")
    _load(path, heads, model)
    return min(int(saved.get("iteration", num_steps)) + 1, num_steps)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file of heads")
    with as_user_error():
        return read_pickle(path)


def _load(path: str | Path, heads: StoredHeads, state: Mapping[str, Tensor]) -> None:
    try:
        heads.load_published(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _differences(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [
        f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]

"""What tar shards will hold before they are written, and how far the writing has come.

The plan lies beside the shards until all of a split are there; then _info.json tells them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.packing import Packed
from utils.errors import UserError
from utils.whole_file import write_text

if TYPE_CHECKING:
    from utils.data.images import ImageFolder

VERSION = 1  # to be raised with every change of what is written
INFO = "_info.json"
HEADER, BLOCK, END = 512, 512, 1024  # bytes of a tar file
# What timm calls a split.
NAMES = {"val": "validation"}


class Samples:
    """Images in the order of writing, and the key of each: its path without the ending.

    A dot ends a key, so those within a name become underscores. UserError for two with one key.
    """

    def __init__(self, images: "ImageFolder", order: Sequence[int]) -> None:
        self.images, self.order = images, order
        self.names = [os.path.relpath(images.path(i), images.root) for i in range(len(images))]
        first: dict[str, str] = {}
        for name in self.names:
            earlier = first.setdefault(self.key(name), name)
            if earlier is not name:
                raise UserError(
                    f"{earlier} and {name} of {images.root} would have one key, "
                    f"{self.key(name)}, in shards; rename one of them"
                )

    def key(self, name: str) -> str:
        """Path of the sample in its shard, to which endings are added."""
        folder, base = os.path.split(os.path.splitext(name)[0])
        return os.path.join(folder, base.replace(".", "_"))

    def members(self, packed: Packed) -> Iterator[tuple[str, bytes]]:
        """Names and contents of what an image becomes."""
        ending = os.path.splitext(packed.name)[1].lower()
        key, label = self.key(packed.name), self.images.label(packed.number)
        assert packed.data is not None
        # timm looks for .jpg alone.
        yield key + {".jpeg": ".jpg"}.get(ending, ending), packed.data
        if label is not None:
            yield f"{key}.cls", str(label).encode()

    def fingerprint(self, shard_mb: float) -> str:
        """Of what decides which image comes into which shard and with which label."""
        labels = None if self.images.labels is None else self.images.labels.tolist()
        told = json.dumps([VERSION, shard_mb, self.names, labels, list(self.order)])
        return hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()

    def starts(self, shard_mb: float) -> list[int]:
        """Where in the order each shard begins."""
        starts, size = [0], END
        label = 0 if self.images.labels is None else HEADER + BLOCK
        for place, number in enumerate(self.order):
            own = HEADER + label + -(-os.path.getsize(self.images.path(number)) // BLOCK) * BLOCK
            if size + own > shard_mb * 1e6 and place > starts[-1]:
                starts.append(place)
                size = END
            size += own
        return starts


class Plan:
    """Which images each shard gets, and the lengths of those written.

    UserError where the folder holds shards of the split that are not this writing's.
    """

    def __init__(self, folder: Path, split: str, samples: Samples, shard_mb: float) -> None:
        from utils.data.shard_files import plan_file

        self.path, self.info, self.split = plan_file(folder, split), folder / INFO, split
        self.samples = samples
        fingerprint = samples.fingerprint(shard_mb)
        there = sorted(file.name for file in folder.glob(f"{split}-*.tar"))
        found = _read(self.path)
        if found is not None and found["fingerprint"] != fingerprint:
            raise UserError(
                f"{folder} holds an unfinished writing of {split} with other images or settings; "
                f"remove its shards and {self.path}, or choose another --output"
            )
        finished = self._splits().get(NAMES.get(split, split), {})
        same = finished.get("fingerprint") == fingerprint and there == finished["filenames"]
        self.is_finished = found is None and same
        if found is None and there and not self.is_finished:
            raise UserError(
                f"{folder / there[0]} exists; remove the shards of {split} or choose another "
                "--output"
            )
        lengths = found["lengths"] if found else {}
        if self.is_finished:
            lengths = dict(zip(there, finished["shard_lengths"], strict=True))
        self.lengths: dict[str, int] = {n: lengths[n] for n in there if n in lengths}
        self._fingerprint = fingerprint
        self._starts = found["starts"] if found else samples.starts(shard_mb)

    def parts(self) -> Iterator[Sequence[int]]:
        """The images of each shard."""
        for start, end in zip(self._starts, [*self._starts[1:], None], strict=True):
            yield self.samples.order[start:end]

    def num_done(self) -> int:
        """Images of the shards that are written."""
        return sum(self.lengths.values())

    def save(self) -> None:
        """Keep the plan where the shards are."""
        content = {
            "fingerprint": self._fingerprint,
            "starts": self._starts,
            "lengths": self.lengths,
        }
        write_text(self.path, json.dumps(content))

    def finish(self) -> None:
        """Tell the split in _info.json, as timm reads it, and drop the plan."""
        name = NAMES.get(self.split, self.split)
        splits = self._splits() | {
            name: {
                "name": name,
                "num_samples": self.num_done(),
                "filenames": list(self.lengths),
                "shard_lengths": list(self.lengths.values()),
                "fingerprint": self._fingerprint,
            }
        }
        content = {**(_read(self.info) or {}), "splits": splits}
        write_text(self.info, json.dumps(content, indent=2) + "\n")
        self.path.unlink()
        self.is_finished = True

    def _splits(self) -> dict[str, Any]:
        return (_read(self.info) or {}).get("splits", {})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; remove it and the shards beside it")
    return content

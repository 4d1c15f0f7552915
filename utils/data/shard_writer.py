"""A tree of images as tar shards of the WebDataset layout, for any reader of these.

What experiments/make_shards.py runs. DIR/train and DIR/val become

    OUTPUT/train-000000.tar, ...      <class>/<name>.jpg with <class>/<name>.cls, in shuffled order
    OUTPUT/val-000000.tar, ...        the same in order
    OUTPUT/classes.txt                `class id,name` for each class, in label order
    OUTPUT/_info.json                 names and lengths of the shards, as timm reads them
    OUTPUT/.train-000000.*.index.npz  where each image lies, for `utils.data.shards`

A shard appears when it is whole. A writing that was stopped leaves a plan, and the same command
goes on with the shards that are not there yet.
"""

import csv
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.command import as_command
from utils.console import say
from utils.data.packing import (
    SPLITS,
    Packed,
    WriterParser,
    packed_files,
    split_tree,
    tell_written,
    unwritable,
)
from utils.data.shard_plan import Plan, Samples
from utils.errors import UserError
from utils.progress import RateLines
from utils.whole_file import whole_file, write_text

SHARD_MB = 1000.0


class Writing:
    """The images of a folder on their way into OUTPUT/<split>-<number>.tar.

    classes: as of `ImageFolder`. shard_mb: size of a shard in 10^6 bytes, which only an image of
    its own exceeds, tar's padding and headers for long names aside. seed: of the order, None for
    the folder's own. UserError for shards that are there already or of another writing, and for
    images that would have one key.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        output: str | os.PathLike,
        *,
        split: str = "train",
        classes: Sequence[str] | None = None,
        shard_mb: float = SHARD_MB,
        seed: int | None = 0,
    ) -> None:
        import numpy as np

        from utils.data.images import ImageFolder

        self.images, self.split = ImageFolder(folder, classes=classes), split
        self.target = Path(output).expanduser().absolute()
        order: Sequence[int] = range(len(self.images))
        if seed is not None:
            order = np.random.RandomState(seed).permutation(len(order)).tolist()
        self.samples = Samples(self.images, order)
        self.plan = Plan(self.target, split, self.samples, shard_mb)

    def run(
        self,
        *,
        check: str = "header",
        num_threads: int = 8,
        skip_damaged: bool = False,
        shown: bool = False,
    ) -> dict[Path, int]:
        """Write the shards that are not there yet; images by shard.

        The index of offsets is stored too, so that a training finds it. check, num_threads: as of
        `packing.packed_files`. skip_damaged: leave bad images out and name them. UserError for a
        bad image otherwise, for a shard of nothing else, and for a full disk.
        """
        from utils.data.shard_index import shard_index

        try:
            if not self.plan.is_finished:
                self.target.mkdir(parents=True, exist_ok=True)
                self.plan.save()
                self._write_classes()
                self._write_shards(check, num_threads, skip_damaged, shown)
                self.plan.finish()
                shard_index([os.fspath(self.target / name) for name in self.plan.lengths])
        except OSError as error:
            raise unwritable(self.target, error) from None
        return {self.target / name: length for name, length in self.plan.lengths.items()}

    def _write_shards(self, check: str, num_threads: int, skip_damaged: bool, shown: bool) -> None:
        for leftover in self.target.glob(f".{self.split}-*.tar.*.partial"):
            leftover.unlink()  # of a writing that was killed
        left = len(self.images) - self.plan.num_done()
        progress = RateLines(self.split, left, shown=shown)
        skipped = _say_skipped if skip_damaged else None
        for number, part in enumerate(self.plan.parts()):
            file = self.target / f"{self.split}-{number:06d}.tar"
            if file.name in self.plan.lengths:
                continue
            files = packed_files(
                self.images, part, check=check, num_threads=num_threads, skipped=skipped
            )
            self.plan.lengths[file.name] = _write_shard(file, files, self.samples, progress)
            self.plan.save()

    def _write_classes(self) -> None:
        """classes.txt, with the names that a labels.txt of an ImageNet tree has."""
        from utils.data.imagenet import read_names
        from utils.data.shards import CLASS_FILE

        if self.images.labels is None:
            return
        names, text = read_names(Path(self.images.root).parent), io.StringIO()
        rows = [[n, names[n]] if n in names else [n] for n in self.images.class_names]
        csv.writer(text, lineterminator="\n").writerows(rows)
        file = self.target / CLASS_FILE
        if file.exists() and file.read_text(encoding="utf-8") != text.getvalue():
            raise UserError(
                f"{file} has other classes than {self.images.root}; choose another --output or "
                "remove it"
            )
        write_text(file, text.getvalue())


def write_splits(
    folder: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    whole: bool = False,
    seed: int = 0,
    shard_mb: float = SHARD_MB,
    **keywords: Any,
) -> dict[Path, int]:
    """The shards of DIR/train, shuffled by `seed`, and of DIR/val, with the classes of train.

    whole: `folder` itself holds the images, all of which become train. Other keywords as of
    `Writing.run`.
    """
    target = folder if output is None else output
    if whole:
        writings = [Writing(folder, target, seed=seed, shard_mb=shard_mb)]
    else:
        root, classes = split_tree(folder)
        writings = [
            Writing(
                root / split,
                target,
                split=split,
                classes=classes or None,
                shard_mb=shard_mb,
                seed=own_seed,
            )
            for split, own_seed in zip(SPLITS, (seed, None), strict=True)
        ]
    return {file: count for one in writings for file, count in one.run(**keywords).items()}


def _write_shard(file: Path, files: Iterator[Packed], samples: Samples, progress: RateLines) -> int:
    """Write one shard, which appears when it is whole; how many images it has."""
    length = 0
    with whole_file(file) as partial:
        with tarfile.open(partial, mode="w") as archive:
            for packed in files:
                progress.add()
                if packed.data is None:
                    continue
                length += 1
                for name, data in samples.members(packed):
                    member = tarfile.TarInfo(name)  # of no time and no owner
                    member.size, member.mode = len(data), 0o444
                    archive.addfile(member, io.BytesIO(data))
        if not length:
            raise UserError(f"none of the images that {file} was to hold can be read")
    return length


def _say_skipped(message: str) -> None:
    say(f"left out: {message}")


@as_command()
def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """The command line; a mistake is one line and exit code 2."""
    parser = WriterParser(description or __doc__)
    parser.add_argument(
        "--whole", action="store_true", help="DIR itself holds the images, all to train on"
    )
    parser.add_argument(
        "--shard-mb", type=float, default=SHARD_MB, help="size of a shard, in 10^6 bytes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of train")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave bad images out instead of stopping"
    )
    asked = parser.read(argv)
    if not asked.shard_mb > 0 or not 0 <= asked.seed < 2**32:
        raise UserError("--shard-mb must be above 0, and --seed at least 0 and below 2^32")
    written = write_splits(
        asked.dir,
        output=asked.output,
        whole=asked.whole,
        seed=asked.seed,
        shard_mb=asked.shard_mb,
        check=asked.check,
        num_threads=asked.num_threads,
        skip_damaged=asked.skip_damaged,
        shown=True,
    )
    tell_written(written)

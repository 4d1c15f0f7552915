"""Writes LMDB files of `utils.data.lmdb`: of a folder, or of a tree of images, two at once.

The tree's DIR/train and DIR/val become DIR/train.lmdb and DIR/val.lmdb: what
experiments/make_lmdb.py runs, and what DHVT's and EViT's `folder2lmdb.py` did. Files hold encoded
images as they lie on disk, without pickles.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.command import Parser, as_command
from utils.data.lmdb_layout import VERSION, key_of, lmdb_package
from utils.data.packing import (
    SPLITS,
    Packed,
    WriterParser,
    packed_files,
    split_tree,
    tell_written,
    unwritable,
)
from utils.errors import UserError
from utils.progress import RateLines
from utils.whole_file import whole_file

if TYPE_CHECKING:
    from utils.data.images import ImageFolder

BATCH = 1000  # images per transaction
# The most a file may grow to: the data and room for its tree; pages hold 4 KiB, so a small image
# wastes some.
MAP_SLACK = 1.2
MAP_PER_IMAGE = 8192


def write_splits(
    folder: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    check: str = "header",
    num_threads: int = 8,
    shown: bool = False,
) -> dict[Path, int]:
    """Write train.lmdb and val.lmdb, into `output` or the folder itself; images by file.

    Val has the classes of train. Keywords as of `write_lmdb`. UserError for what is
    missing, damaged, or there already; files that are whole by then stay.
    """
    root, classes = split_tree(folder)
    target = root if output is None else Path(output).expanduser()
    files = {split: target / f"{split}.lmdb" for split in SPLITS}
    there = [str(file) for file in files.values() if file.exists()]
    if there:  # found out before hours of copying, not after
        raise UserError(f"{' and '.join(there)} exists; remove it or choose another --output")
    return {
        file: write_lmdb(
            root / split,
            file,
            classes=classes or None,
            check=check,
            num_threads=num_threads,
            shown=shown,
        )
        for split, file in files.items()
    }


def write_lmdb(
    folder: str | os.PathLike,
    file: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    check: str = "none",
    num_threads: int = 8,
    shown: bool = False,
) -> int:
    """Copy the images of a folder into one file; returns how many.

    classes: as of `ImageFolder`. check, num_threads: as of `packing.packed_files`. shown: with
    lines of progress. The file appears when it is whole. UserError where it exists already, where
    the folder holds no images or a bad one, and where the disk is full.
    """
    from utils.data.images import ImageFolder  # late, as in `packing`

    lmdb = lmdb_package()
    images, target = ImageFolder(folder, classes=classes), Path(file).expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists; choose another file or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(os.path.getsize(images.path(index)) for index in range(len(images)))
        map_size = int(MAP_SLACK * size) + MAP_PER_IMAGE * len(images) + 2**24
        files = packed_files(images, range(len(images)), check=check, num_threads=num_threads)
        with (
            whole_file(target) as partial,
            lmdb.open(
                os.fspath(partial), subdir=False, map_size=map_size, lock=False
            ) as environment,
        ):
            _fill(environment, images, files, RateLines(target.name, len(images), shown=shown))
            environment.sync(True)
    except lmdb.Error as error:
        raise UserError(f"cannot write {target}: {error}") from None
    except OSError as error:
        raise unwritable(target, error) from None
    return len(images)


def _fill(
    environment: Any, images: "ImageFolder", files: Iterator[Packed], progress: RateLines
) -> None:
    """Copy images, labels and what is told about them into an empty environment."""
    while batch := list(islice(files, BATCH)):
        with environment.begin(write=True) as transaction:
            for number, name, data in batch:
                transaction.put(key_of(number), data)
                transaction.put(key_of(number) + b".name", os.fsencode(name))
                progress.add()
    about = {"version": VERSION, "count": len(images), "class_names": images.class_names}
    with environment.begin(write=True) as transaction:
        transaction.put(b"about", json.dumps(about).encode())
        if images.labels is not None:
            transaction.put(b"labels", images.labels.astype("<i8").tobytes())


@as_command()
def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """The command line of a tree; a mistake is one line and exit code 2."""
    asked = WriterParser(description or __doc__).read(argv)
    written = write_splits(
        asked.dir,
        output=asked.output,
        check=asked.check,
        num_threads=asked.num_threads,
        shown=True,
    )
    tell_written(written)


@as_command()
def main_of_folder(argv: Sequence[str] | None = None) -> None:
    """The command line of one folder, `python -m utils.data.lmdb FOLDER FILE`."""
    parser = Parser(prog="python -m utils.data.lmdb", description="Pack a folder of images.")
    parser.add_argument("folder", metavar="FOLDER", help="of images, sub-folders are classes")
    parser.add_argument("file", metavar="FILE", help="to write")
    asked = parser.parse_args(argv)
    count = write_lmdb(asked.folder, asked.file, check="header", shown=True)
    print(f"{count:,} images in {asked.file}")

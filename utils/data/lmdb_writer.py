"""A tree of images as two LMDB files: DIR/train and DIR/val become DIR/train.lmdb and DIR/val.lmdb.

What experiments/make_lmdb.py runs, and what DHVT's and EViT's `folder2lmdb.py` did. Files are those
of `utils.data.lmdb`: encoded images as they lie on disk, without pickles.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from utils.errors import UserError

SPLITS = ("train", "val")


def write_splits(
    folder: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    check: str = "header",
    num_threads: int = 8,
    shown: bool = False,
) -> dict[Path, int]:
    """Write train.lmdb and val.lmdb, into `output` or the folder itself; images by file.

    Val has the classes of train. Keywords as of `utils.data.lmdb.write_lmdb`. UserError for what is
    missing, damaged, or there already; files that are whole by then stay.
    """
    from utils.data.images import class_folders, existing_folder
    from utils.data.lmdb import write_lmdb

    root = Path(existing_folder(folder, hint="--dir FOLDER"))
    lacking = [split for split in SPLITS if not (root / split).is_dir()]
    if lacking:
        raise UserError(f"{root} lacks {' and '.join(lacking)}; it holds train/ and val/")
    target = root if output is None else Path(output).expanduser()
    files = {split: target / f"{split}.lmdb" for split in SPLITS}
    there = [str(file) for file in files.values() if file.exists()]
    if there:  # found out before hours of copying, not after
        raise UserError(f"{' and '.join(there)} exists; remove it or choose another --output")
    classes = class_folders(os.fspath(root / "train"))
    foreign = sorted(set(class_folders(os.fspath(root / "val"))) - set(classes))
    if foreign:
        raise UserError(f"{root / 'val'} has classes that train has not: {', '.join(foreign[:5])}")
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """The command line; a mistake is one line and exit code 2."""
    parser = _Parser(description=description or __doc__, allow_abbrev=False)
    parser.add_argument(
        "--dir", required=True, help="folder with train/ and val/, a folder a class"
    )
    parser.add_argument("--output", help="folder of the files (default: the same)")
    parser.add_argument(
        "--verify", action="store_true", help="decode every image to its end, not its header alone"
    )
    parser.add_argument("--num-threads", type=int, default=8, help="images read at a time")
    try:
        asked = parser.parse_args(argv)
        if asked.num_threads < 1:
            raise UserError(f"--num-threads is {asked.num_threads}; it must be at least 1")
        written = write_splits(
            asked.dir,
            output=asked.output,
            check="pixels" if asked.verify else "header",
            num_threads=asked.num_threads,
            shown=sys.stderr.isatty() or sys.stdout.isatty(),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for file, count in written.items():
        print(f"{file}: {count:,} images, {file.stat().st_size / 1e6:.1f} MB")

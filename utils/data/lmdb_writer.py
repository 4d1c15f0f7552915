"""A tree of images as two LMDB files: DIR/train and DIR/val become DIR/train.lmdb and DIR/val.lmdb.

What experiments/make_lmdb.py runs, and what DHVT's and EViT's `folder2lmdb.py` did. Files are those
of `utils.data.lmdb`: encoded images as they lie on disk, without pickles.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.console import output_taken
from utils.data.packing import SPLITS, Parser, run_command, split_tree
from utils.errors import UserError


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
    from utils.data.lmdb import write_lmdb

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


@output_taken()
def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """The command line; a mistake is one line and exit code 2."""

    def work() -> Iterator[str]:
        asked = Parser(description or __doc__).read(argv)
        written = write_splits(
            asked.dir,
            output=asked.output,
            check=asked.check,
            num_threads=asked.num_threads,
            shown=True,
        )
        for file, count in written.items():
            yield f"{file}: {count:,} images, {file.stat().st_size / 1e6:.1f} MB"

    run_command(work)

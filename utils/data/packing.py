"""What the writers of packed images share: the tree they read, its files in order, the command.

Nothing heavy is imported before there is work, so that `--help` answers at once.
"""

import argparse
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.command import Parser
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.data.images import ImageFolder

SPLITS = ("train", "val")
CHECKS = ("none", "header", "pixels")
AHEAD = 8  # images read ahead of the writer, per thread


class Packed(NamedTuple):
    """An image file on its way: number in its folder, path below it, bytes (None: left out)."""

    number: int
    name: str
    data: bytes | None


def split_tree(folder: str | os.PathLike) -> tuple[Path, list[str]]:
    """The folder of train/ and val/ and the classes of train, which val may not exceed.

    UserError for what is missing or contradicts itself, before hours of copying and not after.
    """
    from utils.data.images import class_folders, existing_folder

    root = Path(existing_folder(folder, hint="--dir FOLDER"))
    lacking = [split for split in SPLITS if not (root / split).is_dir()]
    if lacking:
        raise UserError(
            f"{root} must hold the folders train and val; it lacks {' and '.join(lacking)}"
        )
    classes = class_folders(os.fspath(root / "train"))
    foreign = sorted(set(class_folders(os.fspath(root / "val"))) - set(classes))
    if foreign:
        raise UserError(f"{root / 'val'} has classes that train has not: {', '.join(foreign[:5])}")
    return root, classes


def packed_files(
    images: "ImageFolder",
    order: Iterable[int],
    *,
    check: str = "none",
    num_threads: int = 8,
    skipped: Callable[[str], None] | None = None,
) -> Iterator[Packed]:
    """The files of a folder's images in the given order, `num_threads` of them read at a time.

    check: `header`, every file must begin like an image; `pixels`, it must decode to its end;
    `none`. `ImageError` for one that does not, unless `skipped` takes the message.
    """
    from utils.data.images import ImageError

    if check not in CHECKS:
        raise UserError(f"unknown check {check!r} of images; known: {', '.join(CHECKS)}")

    def read(number: int) -> Packed:
        path = images.path(number)
        name = os.path.relpath(path, images.root)
        try:
            data = images.read_bytes(number)
            if check != "none":
                _check(data, path, whole=check == "pixels")
        except ImageError as error:
            if skipped is None:
                raise
            skipped(str(error))
            return Packed(number, name, None)
        return Packed(number, name, data)

    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[Packed]] = deque()
        try:
            for number in order:
                waiting.append(pool.submit(read, number))
                if len(waiting) >= AHEAD * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class WriterParser(Parser):
    """The flags of every writer."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument(
            "--dir", required=True, help="folder with train/ and val/, a folder a class"
        )
        self.add_argument("--output", help="folder of the files (default: the same)")
        self.add_argument(
            "--verify",
            action="store_true",
            help="decode every image to its end, not its header alone",
        )
        self.add_argument("--num-threads", type=int, default=8, help="images read at a time")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The words read, and `check` for what --verify asks."""
        asked = self.parse_args(argv)
        if asked.num_threads < 1:
            raise UserError(f"--num-threads is {asked.num_threads}; it must be at least 1")
        asked.check = "pixels" if asked.verify else "header"
        return asked


def unwritable(target: object, error: OSError) -> UserError:
    """What a full or forbidden disk is told as."""
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"cannot write {target}: {error.strerror or type(error).__name__}{where}")


def _check(data: bytes, path: str, *, whole: bool) -> None:
    """`ImageError` for what is no image, or, with `whole`, for one that does not decode."""
    from PIL import Image

    from utils.data.images import ImageError, read_image

    if whole:
        read_image(io.BytesIO(data), name=path)
        return
    try:
        with Image.open(io.BytesIO(data)):
            pass
    except Exception:  # damaged files make decoders raise almost anything; this says it in words
        read_image(io.BytesIO(data), name=path)
        raise ImageError(path, "damaged") from None


def tell_written(written: Mapping[Path, int]) -> None:
    """Print each file that a writer left, with its images and size."""
    for file, count in written.items():
        print(f"{file}: {count:,} images, {file.stat().st_size / 1e6:.1f} MB")

"""Images on disk: what a data set is, how one file becomes RGB pixels, and any folder of images."""

import io
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    ".gif",
)


class ImageDataset(Protocol):
    """Images by index, either all with a class or all without. Cheap to copy to a worker."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image; raises `ImageError` naming the file where that fails."""
        ...

    def label(self, index: int) -> int | None:
        """Class index, or None in a data set without labels."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """All class indices, int64 [N], or None."""
        ...

    def path(self, index: int) -> str:
        """The file an image comes from, for messages."""
        ...


class ImageError(UserError):
    """An image cannot be read; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read image {path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return ImageError, (self.path, self.reason)


def read_image(
    file: str | os.PathLike | BinaryIO, *, name: str = "", exif_orientation: bool = False
) -> Image.Image:
    """Decode a path or an open binary file to RGB; `ImageError` for what is no whole image.

    Pillow's guard against decompression bombs stays on. As in torchvision, the orientation in EXIF
    data is not applied unless asked for. Of an animation, the first frame counts.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if exif_orientation else image)
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except IsADirectoryError:
        raise ImageError(name, "is a folder") from None
    except UnidentifiedImageError:
        raise ImageError(name, _why_unknown(file)) from None
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"too many pixels ({error})") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise ImageError(name, f"damaged ({type(error).__name__}: {error})") from None


def read_file(path: str) -> bytes:
    """The bytes of an image file; `ImageError` names it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except IsADirectoryError:
        raise ImageError(path, "is a folder") from None
    except OSError as error:
        raise ImageError(path, error.strerror or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB; 16-bit grey is scaled to 8 bits, CMYK and palettes are converted.

    Departs from torchvision: transparent pixels are laid on white, because dropping the alpha
    channel uncovers whatever colour the file happens to hold there; and 16-bit grey is scaled,
    because Pillow's own conversion cuts it off at 255.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these hold 16 bits
        raise ValueError("32-bit pixels have no defined range; store 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; store 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class ImageFiles:
    """Base of data sets whose images are files; subclasses define `path` and `labels`."""

    labels: np.ndarray | None = None
    exif_orientation = False

    def path(self, index: int) -> str:
        """File of an image."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image."""
        return read_image(self.path(index), exif_orientation=self.exif_orientation)

    def read_bytes(self, index: int) -> bytes:
        """The image file as stored; `ImageError` names it."""
        return read_file(self.path(index))

    def label(self, index: int) -> int | None:
        """Class index, or None without labels."""
        return None if self.labels is None else int(self.labels[index])


class ImageFolder(ImageFiles):
    """Any folder of images, nested as deep as you like, in a fixed order.

    The class of an image is the sub-folder of `root` it lies in, however deep; classes are numbered
    in the order of their sorted names, empty ones included, or as `classes` says. There are no
    labels with `labels=False`, or where all images lie directly in `root`. Order: class, folder,
    file name, as torchvision's. Hidden files and folders are left out. Raises UserError for a
    folder that is missing or holds no image, and where it is unclear what the classes are.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        *,
        labels: bool = True,
        classes: Sequence[str] | None = None,
        exif_orientation: bool = False,
    ) -> None:
        self.root = existing_folder(root)
        self.exif_orientation = exif_orientation
        files = sorted(_walk(self.root, ""), key=lambda file: folder_order(file.path))
        if not files:
            raise UserError(
                f"no image in {self.root} or below it; looked for {' '.join(EXTENSIONS)}"
            )
        # One array of bytes instead of a list of strings: no growth in forked workers.
        self._files = np.array([os.fsencode(file.path) for file in files])
        self.class_names: list[str] = []
        if labels and any(file.folder for file in files):
            self.class_names = list(classes) if classes is not None else class_folders(self.root)
            self.labels = _folder_labels(self.root, files, self.class_names)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
        return f"{type(self).__name__}({self.root}: {len(self):,} images, {classes})"

    def path(self, index: int) -> str:
        """File of an image."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))


class Subset:
    """The images of `dataset` at `indices`, in that order, as a data set of its own."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.class_names = dataset.class_names
        self.labels = None if dataset.labels is None else dataset.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"{len(self):,} images of {self.dataset!r}"

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image."""
        return self.dataset.read(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        """Class index, or None without labels."""
        return self.dataset.label(int(self.indices[index]))

    def path(self, index: int) -> str:
        """File of an image."""
        return self.dataset.path(int(self.indices[index]))


def folder(
    root: str | os.PathLike | None,
    *,
    split: str = "train",
    val_root: str | os.PathLike | None = None,
    val_fraction: float = 0.1,
    labels: bool = True,
) -> ImageDataset:
    """The train or val part of any folder of images.

    Val is the folder `val_root`, read with the classes of `root`; without one it is a part of each
    class of `root`, and train is the others (`part_of`). UserError for a `root` whose folders are
    the splits themselves, as they would pass for classes.
    """
    if split not in ("train", "val"):
        raise UserError(f"no split {split!r} in a folder of images; there are train and val")
    images = ImageFolder(root, labels=labels)
    refuse_splits(images.root, images.class_names)
    if val_root is not None:
        if split == "train":
            return images
        return ImageFolder(val_root, labels=labels, classes=images.class_names or None)
    return part_of(images, split, val_fraction)


def part_of(images: ImageDataset, split: str, val_fraction: float) -> Subset:
    """Val is every n-th image of each class, n = round(1 / val_fraction), and train the others."""
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"val_fraction is {val_fraction}; it must lie above 0 and at most at 0.5")
    is_val = _every_nth(images.labels, len(images), round(1 / val_fraction))
    if not is_val.any():
        more = "" if val_fraction == 0.5 else "raise it, or "
        raise UserError(
            f"{images!r}: too few to set data.val_fraction={val_fraction:g} of a class apart; "
            f"{more}give other images to judge on, as data.val_root=FOLDER or data.val_shards=FILES"
        )
    return Subset(images, np.flatnonzero(is_val if split == "val" else ~is_val))


def existing_folder(root: str | os.PathLike | None, hint: str = "data.root=FOLDER") -> str:
    """`root` as an absolute path; UserError, with `hint`, if it is not given or is no folder."""
    if root is None or not os.fspath(root):
        raise UserError(f"no folder of images was given; say where they are: {hint}")
    path = os.path.abspath(os.path.expanduser(os.fspath(root)))
    if not os.path.isdir(path):
        what = "is a file, not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"the folder of images {path} {what}")
    return path


def folder_order(path: str) -> tuple[str, str, str]:
    """Sort key of an image's path: class, folder, file name, as in torchvision."""
    folder, name = os.path.split(path)
    return folder.split(os.sep, 1)[0], folder, name


def class_folders(root: str) -> list[str]:
    """Names of the sub-folders of `root`, sorted, hidden ones left out."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and entry.name[0] != ".")


def refuse_splits(root: str, folders: Sequence[str]) -> None:
    """UserError for a folder of images whose own folders, sorted, are those of splits."""
    judged = [name for name in ("val", "validation", "test") if name in folders]
    if "train" in folders and judged and set(folders) == {"train", *judged}:
        raise UserError(
            f"{root} holds {' and '.join(folders)}, which are splits and no classes; "
            f"say data.root={root}/train data.val_root={root}/{judged[0]}"
        )


class _File(NamedTuple):
    folder: str  # relative to the root, "" for the root itself
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.name)

    @property
    def top(self) -> str:
        return self.folder.split(os.sep, 1)[0]


def _walk(root: str, relative: str, above: frozenset = frozenset()) -> Iterator[_File]:
    here = os.path.join(root, relative)
    try:
        status = os.stat(here)
        with os.scandir(here) as found:
            entries = list(found)
    except OSError as error:
        raise UserError(f"cannot list the folder {here}: {error.strerror}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            below = os.path.join(relative, entry.name)
            yield from _walk(root, below, above | {identity})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield _File(relative, entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if it is named as an image, reading it will tell
        return False


def _folder_labels(root: str, files: list[_File], class_names: list[str]) -> np.ndarray:
    number = {name: index for index, name in enumerate(class_names)}
    for file in files:
        if not file.folder:
            raise UserError(
                f"{os.path.join(root, file.name)} lies beside folders that hold images, so it has "
                "no class; move it into one of them, or use labels=false"
            )
        if file.top not in number:
            raise UserError(
                f"{os.path.join(root, file.top)} is not one of the {len(number)} known classes "
                f"({', '.join(class_names[:5])}, ...)"
            )
    return np.array([number[file.top] for file in files], dtype=np.int64)


def _every_nth(labels: np.ndarray | None, count: int, n: int) -> np.ndarray:
    labels = np.zeros(count, dtype=np.int64) if labels is None else labels
    chosen = np.zeros(count, dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[n - 1 :: n]] = True
    return chosen


def _why_unknown(file: object) -> str:
    size = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else None
    if size == 0 or (isinstance(file, str | os.PathLike) and os.path.getsize(file) == 0):
        return "empty file"
    return "not an image, or of a format Pillow does not know"

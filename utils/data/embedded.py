"""The data that need no download: what scikit-learn carries, written once as trees of image files.

    ROOT/digits/        1,797 handwritten digits (UCI, "Optical Recognition of Handwritten Digits")
                        as an ImageNet tree of 32 x 32 JPEG files, labels.txt; 1,438 train, 359 val
    ROOT/photographs/   two photographs and their attribution
    ROOT/segmentation/  VOCdevkit/VOC2012: digits pasted onto parts of the photographs, with masks:
                        0 background, d + 1 for the digit d, 255 its border; train 240, val 80

ROOT is $OCTIC_DATA/embedded, else ./data/embedded. The trees are read by the ordinary readers.
"""

import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from utils.data.imagenet import ImageNetTree, relative_path
from utils.data.images import ImageDataset, ImageFolder, Subset
from utils.errors import UserError
from utils.only_one import only_one

VERSION = 1  # to be raised with every change of what is written
STAMP = "complete.txt"
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGE_SIZE = 32
SCENE_SIZE = 128
SCENES = {"train": 240, "val": 80}
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
VOID = 255


def digits(root: str | os.PathLike | None = None, *, split: str = "train") -> ImageNetTree:
    """The split train or val of the digits, written below `root` first if they are not there."""
    return ImageNetTree(ensure_embedded(root) / "digits", split=split)


def photographs(root: str | os.PathLike | None = None, *, copies: int = 1) -> ImageDataset:
    """The two photographs, without labels, one after the other `copies` times.

    Copies make an epoch long enough to time a training. Raises UserError for fewer than one.
    """
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise UserError(f"copies must be a whole number of at least 1, got {copies!r}")
    images = ImageFolder(ensure_embedded(root) / "photographs", labels=False)
    return images if copies == 1 else Subset(images, np.tile(np.arange(len(images)), copies))


def segmentation_root(root: str | os.PathLike | None = None) -> Path:
    """The folder that holds VOCdevkit/VOC2012, as torchvision's VOCSegmentation expects it."""
    return ensure_embedded(root) / "segmentation"


def ensure_embedded(root: str | os.PathLike | None = None) -> Path:
    """The root folder, complete; any number of processes may call this at once.

    What is there is kept if it is complete and of this version. Else one process writes everything
    beside it and puts it in place by a rename, while the others wait. UserError if that fails.
    """
    if root is None:
        root = Path(os.environ.get("OCTIC_DATA") or "data") / "embedded"
    root = Path(root).expanduser().absolute()
    if _is_complete(root):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with only_one(f"{root}.lock"):
            if not _is_complete(root):
                _replace(root)
    except OSError as error:
        raise UserError(
            f"cannot write the embedded images to {root}: {error.strerror or error}; set "
            "OCTIC_DATA to a folder that can be written"
        ) from None
    return root


def _is_complete(root: Path) -> bool:
    """Whether the stamp is there, of this version, and no file has gone since."""
    try:
        version, count = map(int, (root / STAMP).read_text().split())
    except (OSError, ValueError):
        return False
    return version == VERSION and _count_files(root) >= count


def _count_files(root: Path) -> int:
    """Images and lists below `root`; whatever else people put there does not count."""
    kinds = (".JPEG", ".jpg", ".png", ".txt")
    names = (name for _, _, found in os.walk(root) for name in found)
    return sum(name.endswith(kinds) and name != STAMP for name in names)


def _replace(root: Path) -> None:
    # Under the lock: a folder of a writer that was killed is nobody's any more.
    for stale in root.parent.glob(f".{root.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    if root.exists() and not (root / STAMP).exists() and any(root.iterdir()):
        raise UserError(
            f"{root} holds files, but no {STAMP} of the embedded images; it is not touched, so "
            "move it away or set OCTIC_DATA to another folder"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".partial", dir=root.parent))
    try:
        partial.chmod(0o755)
        _write(partial)
        (partial / STAMP).write_text(f"{VERSION} {_count_files(partial)}\n")
        if root.exists():
            root.rename(partial.with_name(f".{root.name}.old.partial"))
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(partial.with_name(f".{root.name}.old.partial"), ignore_errors=True)


def _write(root: Path) -> None:
    from sklearn.datasets import load_digits  # takes a second, needed once

    bunch = load_digits()
    strokes = (bunch.images * (255 / 16)).round().astype(np.uint8)  # [1797 8 8], 0 where empty
    in_val = _stratified(bunch.target)
    _write_digits(root / "digits", strokes, bunch.target, in_val)
    _write_photographs(root / "photographs")
    _write_scenes(root, strokes, bunch.target, in_val)


def _stratified(targets: np.ndarray, fraction: float = 0.2) -> np.ndarray:
    """A fixed fifth of every class, as a boolean mask [N]."""
    random = np.random.RandomState(0)
    chosen = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == target))
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def _write_digits(root: Path, strokes: np.ndarray, targets: np.ndarray, in_val: np.ndarray) -> None:
    for number, (stroke, target) in enumerate(zip(strokes, targets, strict=True), start=1):
        split = "val" if in_val[number - 1] else "train"
        path = root / relative_path(split, f"digit{target}", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(stroke).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(path, "JPEG", quality=95, subsampling=0)
    lines = (f"digit{digit},{name}\n" for digit, name in enumerate(CLASS_NAMES))
    (root / "labels.txt").write_text("".join(lines))


def _write_photographs(root: Path) -> None:
    root.mkdir()
    for name in (*PHOTOGRAPHS, "README.txt"):
        (root / name).write_bytes(files("sklearn.datasets.images").joinpath(name).read_bytes())


def _write_scenes(root: Path, strokes: np.ndarray, targets: np.ndarray, in_val: np.ndarray) -> None:
    voc = root / "segmentation" / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    sources = [Image.open(root / "photographs" / name).convert("RGB") for name in PHOTOGRAPHS]
    number = 0
    for split, count in SCENES.items():
        members = np.flatnonzero(in_val == (split == "val"))
        random = np.random.RandomState(1 if split == "val" else 2)
        names = []
        for _ in range(count):
            number += 1
            names.append(f"2012_{number:06d}")
            scene = _crop(sources[random.randint(len(sources))], split, random)
            mask = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=np.uint8)
            for member in random.choice(members, random.randint(1, 4), replace=False):
                scene = _paste(scene, mask, strokes[member], int(targets[member]), random)
            scene.save(voc / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
            picture = Image.fromarray(mask)
            picture.putpalette(voc_palette())
            picture.save(voc / "SegmentationClass" / f"{names[-1]}.png")
        lists = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        lists.write_text("".join(f"{name}\n" for name in names))


def _crop(photograph: Image.Image, split: str, random: np.random.RandomState) -> Image.Image:
    """A random part of a photograph: of its left two thirds for train, of the rest for val."""
    border = photograph.width * 2 // 3
    low, high = (0, border) if split == "train" else (border, photograph.width)
    side = random.randint(SCENE_SIZE, min(high - low, photograph.height) + 1)
    left = random.randint(low, high - side + 1)
    top = random.randint(0, photograph.height - side + 1)
    box = (left, top, left + side, top + side)
    return photograph.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC, box=box)


def _paste(
    scene: Image.Image,
    mask: np.ndarray,
    stroke: np.ndarray,
    digit: int,
    random: np.random.RandomState,
) -> Image.Image:
    """The scene with a digit of random size, place, colour; `mask` gets its pixels and border."""
    side = random.randint(40, 73)
    left, top = random.randint(0, SCENE_SIZE - side + 1, size=2)
    small = Image.fromarray(stroke).resize((side, side), Image.Resampling.BICUBIC)
    alpha = Image.new("L", scene.size)
    alpha.paste(small, (left, top))
    colour = tuple(random.randint(0, 256, size=3).tolist())
    inside = alpha.point(lambda value: 255 * (value >= 128))
    grown = inside.filter(ImageFilter.MaxFilter(3))
    mask[np.asarray(grown) > 0] = VOID
    mask[np.asarray(inside) > 0] = digit + 1
    return Image.composite(Image.new("RGB", scene.size, colour), scene, alpha)


def voc_palette() -> list[int]:
    """VOC's 256 colours: bit k, from the top, of (r, g, b) is bit 3k + (0, 1, 2) of the index."""
    index = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.int64)
    for k in range(8):
        colours |= (index >> (3 * k + np.arange(3)) & 1) << (7 - k)
    return colours.flatten().tolist()

"""Images with a label per pixel: ADE20K, VOC 2012 with SBD, and the embedded scenes.

    ROOT/ADEChallengeData2016/{images,annotations}/{training,validation}/<stem>.{jpg,png}
    ROOT/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
    ROOT/benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}        SBD, for VOC's trainaug

A root may also be the folder ADEChallengeData2016 or VOC2012 itself, or hold VOC below original/
and SBD below aug/, as capi's downloads do.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from utils.data import download as downloads
from utils.data import embedded
from utils.data.images import ImageError, read_image
from utils.errors import UserError

ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_SPLITS = ("training", "validation")
VOC_SPLITS = ("train", "val", "trainval", "trainaug", "trainaug_noval")
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
VOID = 255
UNLABELLED = 0  # of ADE20K: whatever is none of the 150 classes


class SegmentationDataset(Protocol):
    """Images and masks by index. Readers are cheap to copy to a worker."""

    name: str
    class_names: list[str]  # class_names[label], for every label a mask may hold but 255
    ignore_labels: tuple[int, ...]  # labels whose pixels count nowhere

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image; raises `ImageError` naming the file where that fails."""
        ...

    def read_mask(self, index: int) -> np.ndarray:
        """Labels as stored, uint8 [H W]; raises `ImageError` naming the file."""
        ...

    def path(self, index: int) -> str:
        """The file an image comes from, for messages."""
        ...


class MaskedSubset:
    """Images of a data set with their masks, by their indices in it."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.name, self.class_names = dataset.name, dataset.class_names
        self.ignore_labels = dataset.ignore_labels

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"{len(self):,} images of {self.dataset!r}"

    def read(self, index: int) -> Image.Image:
        """Decoded image."""
        return self.dataset.read(self.indices[index])

    def read_mask(self, index: int) -> np.ndarray:
        """Labels as stored, uint8 [H W]."""
        return self.dataset.read_mask(self.indices[index])

    def path(self, index: int) -> str:
        """Where the image comes from."""
        return self.dataset.path(self.indices[index])


class Pair(NamedTuple):
    """The files of one image, relative to the folder of the data set."""

    image: str
    mask: str


class MaskedImages:
    """Files in pairs: an image, and a picture (mode L or P) or SBD's .mat file of labels."""

    def __init__(
        self,
        root: str | os.PathLike,
        pairs: Sequence[Pair],
        *,
        name: str,
        class_names: Sequence[str],
        ignore_labels: Sequence[int],
    ) -> None:
        self.root = Path(root)
        self.name = name
        self.class_names = list(class_names)
        self.ignore_labels = tuple(ignore_labels)
        # Two arrays of bytes instead of lists of strings: no growth in forked workers.
        self._images = np.array([os.fsencode(pair.image) for pair in pairs])
        self._masks = np.array([os.fsencode(pair.mask) for pair in pairs])

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return f"{self.name}({self.root}: {len(self):,} images, {len(self.class_names)} labels)"

    def read(self, index: int) -> Image.Image:
        """Decoded RGB image; the orientation in EXIF data is not applied."""
        return read_image(self.path(index))

    def read_mask(self, index: int) -> np.ndarray:
        """Labels as stored, uint8 [H W]; `ImageError` for a wrong size or an unknown label."""
        path = self.mask_path(index)
        mask = _read_mat(path) if path.endswith(".mat") else _read_picture(path)
        self._check(mask, path, self.path(index))
        return mask

    def path(self, index: int) -> str:
        """File of an image."""
        return os.path.join(self.root, os.fsdecode(self._images[index]))

    def mask_path(self, index: int) -> str:
        """File of a mask."""
        return os.path.join(self.root, os.fsdecode(self._masks[index]))

    def _check(self, mask: np.ndarray, path: str, image_path: str) -> None:
        try:
            with Image.open(image_path) as image:  # reads the header alone
                width, height = image.size
        except Exception:  # damaged files make decoders raise almost anything; read() tells
            return
        if mask.shape != (height, width):
            sizes = f"{mask.shape[1]} x {mask.shape[0]}, its image {image_path} {width} x {height}"
            raise ImageError(path, f"the mask is {sizes} pixels (width x height)")
        found = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256))
        unknown = [n for n in found if n >= len(self.class_names) and n not in self.ignore_labels]
        if unknown:
            raise ImageError(
                path,
                f"the mask holds label {unknown[0]}; {self.name} has 0 to "
                f"{len(self.class_names) - 1} and {VOID}",
            )


def ade20k(
    root: str | os.PathLike | None, *, split: str = "training", download: bool = False
) -> MaskedImages:
    """A split of ADE20K (Zhou et al. 2017, the scene parsing challenge), in the order of its names.

    Labels 1 to 150 as stored; 0 is everything else and is ignored, with 255. Class names are read
    from the archive's objectInfo150.txt, else they are numbers. Every image needs its mask and
    every mask its image. `download` brings the archive (0.9 GB) where it is missing.
    """
    _check_split(split, ADE20K_SPLITS, "ADE20K")
    root = _given(root, "ADE20K")
    places = (ADE20K_FOLDER, ".")
    folder = _folder("ADE20K", "ade20k", root, places, f"images/{split}", download)
    return MaskedImages(
        folder,
        _paired(folder, split),
        name="ADE20K",
        class_names=["unlabelled", *_ade20k_names(folder)],
        ignore_labels=(UNLABELLED, VOID),
    )


def voc2012(
    root: str | os.PathLike | None, *, split: str = "train", download: bool = False
) -> MaskedImages:
    """A split of VOC 2012 (Everingham et al. 2012), in the order of its list; 255 is ignored.

    train, val and trainval are VOC's. trainaug is VOC train, then SBD train, then SBD val
    (Hariharan et al. 2011) as the published code joins them: images of VOC val are among them and
    images of VOC train come twice, so figures on val are too good. trainaug_noval is each image of
    VOC train and of SBD once, without those of VOC val. `download` brings what is missing of the
    two archives (VOC 2.0 GB; SBD 1.4 GB, for the trainaug splits alone).
    """
    _check_split(split, VOC_SPLITS, "VOC2012")
    root = _given(root, "VOC2012")
    places = ("original/VOCdevkit/VOC2012", "VOCdevkit/VOC2012", ".")
    marker = "ImageSets/Segmentation"
    voc = _folder("VOC2012", "voc2012", root, places, marker, download)
    if split.startswith("trainaug"):
        sbd_places = ("aug/benchmark_RELEASE/dataset", "benchmark_RELEASE/dataset")
        sbd = _folder("SBD (for trainaug)", "sbd", root, sbd_places, "cls", download)
        pairs = _with_sbd(voc, sbd, leak=split == "trainaug")
    else:
        pairs = _voc_pairs(_names(voc / marker / f"{split}.txt"))
    return MaskedImages(voc, pairs, name="VOC2012", class_names=VOC_CLASSES, ignore_labels=(VOID,))


def scenes(*, split: str = "train", root: str | os.PathLike | None = None) -> MaskedImages:
    """The embedded scenes (digits pasted onto photographs), split train or val; no download.

    Written once below `root`, by default $OCTIC_DATA/embedded, else ./data/embedded.
    """
    _check_split(split, ("train", "val"), "the embedded scenes")
    voc = embedded.segmentation_root(root) / "VOCdevkit" / "VOC2012"
    return MaskedImages(
        voc,
        _voc_pairs(_names(voc / "ImageSets" / "Segmentation" / f"{split}.txt")),
        name="scenes",
        class_names=["background", *embedded.CLASS_NAMES],
        ignore_labels=(VOID,),
    )


def _read_picture(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P"):
                raise ImageError(
                    path, f"a mask has indices (mode L or P), this one is of mode {picture.mode}"
                )
            return np.array(picture)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise ImageError(path, f"damaged mask ({type(error).__name__}: {error})") from None


def _read_mat(path: str) -> np.ndarray:
    from scipy.io import loadmat  # comes with scikit-learn; only SBD needs it

    try:
        return np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0], dtype=np.uint8)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except Exception as error:
        raise ImageError(path, f"no mask of SBD ({type(error).__name__}: {error})") from None


def _paired(folder: Path, split: str) -> list[Pair]:
    images = _stems(folder / "images" / split, ".jpg")
    masks = _stems(folder / "annotations" / split, ".png")
    if images != masks:
        stem = min(images ^ masks)
        kinds = ("image", "mask") if stem in images else ("mask", "image")
        raise UserError(
            f"ADE20K in {folder}, split {split}: the {kinds[0]} {stem} has no {kinds[1]} "
            f"({len(images ^ masks)} of {len(images | masks)} are alone); unpack the archive anew"
        )
    if not images:
        raise UserError(f"no .jpg image in {folder / 'images' / split}")
    return [
        Pair(f"images/{split}/{stem}.jpg", f"annotations/{split}/{stem}.png")
        for stem in sorted(images)
    ]


def _stems(folder: Path, suffix: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from None
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def _ade20k_names(folder: Path) -> list[str]:
    """The first name of each class: the table's last column holds synonyms between commas."""
    numbers = [f"class {number}" for number in range(1, 151)]
    try:
        rows = (folder / "objectInfo150.txt").read_text(errors="replace").splitlines()[1:]
    except OSError:
        return numbers
    named = {row.split()[0]: row.split("\t")[-1].split(",")[0].strip() for row in rows if row}
    return [named.get(str(number)) or numbers[number - 1] for number in range(1, 151)]


def _voc_pairs(names: Iterable[str]) -> list[Pair]:
    return [Pair(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]


def _with_sbd(voc: Path, sbd: Path, *, leak: bool) -> list[Pair]:
    lists = voc / "ImageSets" / "Segmentation"
    train = _names(lists / "train.txt")
    extra = [*_names(sbd / "train.txt"), *_names(sbd / "val.txt")]
    if not leak:
        known = {*train, *_names(lists / "val.txt")}
        extra = [name for name in dict.fromkeys(extra) if name not in known]
    base = os.path.relpath(sbd, voc)
    pairs = [Pair(f"{base}/img/{name}.jpg", f"{base}/cls/{name}.mat") for name in extra]
    return [*_voc_pairs(train), *pairs]


def _names(path: Path) -> list[str]:
    try:
        names = path.read_text().split()
    except OSError as error:
        raise UserError(f"cannot read the list of images {path}: {error.strerror}") from None
    if not names:
        raise UserError(f"the list of images {path} is empty")
    return names


def _folder(
    name: str, archive: str, root: Path, places: Sequence[str], marker: str, download: bool
) -> Path:
    """The one of `places` below `root` that holds `marker`, its archive downloaded if asked for."""
    found = _find(root, places, marker)
    if found is None and download:
        downloads.bring(archive, root)
        found = _find(root, places, marker)
    if found is None:
        raise UserError(
            f"{name} is not in {root}: there is no {downloads.ARCHIVES[archive].folder}/{marker}; "
            f"bring it with `python -m utils.data.download {archive} {root}`, or give download=true"
        )
    return found


def _find(root: Path, places: Sequence[str], marker: str) -> Path | None:
    return next((root / place for place in places if (root / place / marker).is_dir()), None)


def _given(root: str | os.PathLike | None, name: str) -> Path:
    if root is None or not os.fspath(root):
        raise UserError(f"no folder of {name} was given; say where it is: root=FOLDER")
    return Path(root).expanduser().absolute()


def _check_split(split: str, known: Sequence[str], name: str) -> None:
    if split not in known:
        raise UserError(f"no split {split!r} in {name}; there are {', '.join(known)}")

"""DomainNet: 345 classes of things in six domains, as folders of images.

    ROOT/train/<class>/..., ROOT/val/<class>/...                      of one domain
    ROOT/<domain>/train/<class>/..., ROOT/<domain>/val/<class>/...    of several

Source: Peng et al. 2019, "Moment Matching for Multi-Source Domain Adaptation".
"""

import os
from pathlib import Path

from utils.data.images import ImageFolder, class_folders, existing_folder
from utils.errors import UserError
from utils.nearest import nearest

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
NUM_CLASSES = 345


def domainnet(
    root: str | os.PathLike | None,
    *,
    domain: str = "clipart",
    split: str = "train",
    check_size: bool = True,
) -> ImageFolder:
    """The split train or val of a domain; val has the classes of train.

    check_size: refuse another number of classes than 345, a domain that is not whole. UserError for
    what is missing or unknown.
    """
    if domain not in DOMAINS:
        known = ", ".join(DOMAINS)
        raise UserError(f"DomainNet has no domain {domain!r}{nearest(domain, DOMAINS)} ({known})")
    if split not in ("train", "val"):
        raise UserError(f"DomainNet has no split {split!r}; there are train and val")
    folder = _folder(Path(existing_folder(root)), domain)
    classes = class_folders(os.fspath(folder / "train"))
    if check_size and len(classes) != NUM_CLASSES:
        raise UserError(
            f"{folder / 'train'} has {len(classes)} classes, DomainNet {NUM_CLASSES}; "
            "check_size=false takes what there is, and backbone.num_classes says how many"
        )
    return ImageFolder(folder / split, classes=classes)


def _folder(root: Path, domain: str) -> Path:
    """The folder of train/ and val/: that of the domain, or the root itself."""
    own = root / domain
    folder = own if (own / "train").is_dir() else root
    lacking = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if lacking:
        raise UserError(
            f"{folder} lacks {' and '.join(lacking)}; a domain is read from ROOT/{domain}/train "
            f"and ROOT/{domain}/val, or from ROOT/train and ROOT/val"
        )
    return folder

"""iNaturalist 2018 and 2019 as their competitions hand them out: COCO-style json beside the images.

    ROOT/train2018.json, ROOT/val2018.json    images, annotations, categories
    ROOT/categories.json                      optional: the names and ranks of 2018's categories
    ROOT/train_val2018/<group>/<category>/<name>.jpg, as the json's file_name says

The folder of the group may be missing, as after DeiT's preparation.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.images import ImageFiles, existing_folder
from utils.errors import UserError

YEARS = (2018, 2019)
RANKS = ("name", "genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
# What the entries of each list must have.
NEEDED = {
    "images": {"id", "file_name"},
    "annotations": {"image_id", "category_id"},
    "categories": {"id"},
}


class INaturalist(ImageFiles):
    """Training or validation images of a year, with one rank of the taxonomy as classes.

    category: `name` is the species, a class for each category id in their order; a coarser rank
    has its names sorted. Departs from DeiT, which numbers classes as they first come in train.json.
    UserError for what is missing or contradicts itself.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        *,
        year: int = 2018,
        split: str = "train",
        category: str = "name",
    ) -> None:
        if year not in YEARS:
            raise UserError(f"iNaturalist {year} is not offered; there are {YEARS}")
        if split not in ("train", "val"):
            raise UserError(f"iNaturalist has no split {split!r} with labels; use train or val")
        if category not in RANKS:
            raise UserError(f"unknown rank {category!r}; known: {', '.join(RANKS)}")
        self.root, self.year, self.split = existing_folder(root), year, split
        where = Path(self.root, f"{split}{year}.json")
        content = _load(where)
        for key, needed in NEEDED.items():
            entries = content.get(key) if isinstance(content, dict) else None
            if not entries:
                raise UserError(f"{where} lists no {key}")
            _check_entries(entries, needed, f"{where}: {key}")
        categories = self._categories(content, category)
        class_of, self.class_names = _classes(categories, category, where)
        category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        images = content["images"]
        without = [i["file_name"] for i in images if category_of.get(i["id"]) not in class_of]
        if without:
            raise UserError(f"{where}: {len(without)} images without category, as {without[0]}")
        names = [image["file_name"] for image in images]
        if not Path(self.root, names[0]).exists() and Path(self.root, _short(names[0])).exists():
            names = [_short(name) for name in names]
        # One array of bytes instead of a list of strings: no growth in forked workers.
        self._files = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(
            [class_of[category_of[image["id"]]] for image in images], dtype=np.int64
        )

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return (
            f"INaturalist({self.root}, {self.year} {self.split}: {len(self):,} images, "
            f"{len(self.class_names):,} classes)"
        )

    def path(self, index: int) -> str:
        """File of an image."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))

    def _categories(self, content: dict[str, Any], rank: str) -> list[dict[str, Any]]:
        """The json's categories, or those of categories.json where the json's lack the rank.

        2018's have numbers for names. 2019's have all, and beside them may lie the other year's.
        """
        own, path = content["categories"], Path(self.root, "categories.json")
        if not path.is_file() or all(_is_told(entry.get(rank)) for entry in own):
            return own
        found = _load(path)
        listed = found.get("categories", []) if isinstance(found, dict) else found
        _check_entries(listed, NEEDED["categories"], str(path))
        known = {entry["id"] for entry in listed}
        lacking = [entry["id"] for entry in own if entry["id"] not in known]
        if lacking:
            raise UserError(f"{path} lacks {len(lacking)} categories of {self.year}")
        return listed


def _classes(
    categories: list[dict[str, Any]], rank: str, where: Path
) -> tuple[dict[int, int], list[str]]:
    """Class index of each category id, and the names of the classes."""
    ordered = sorted(categories, key=lambda entry: entry["id"])
    lacking = [entry["id"] for entry in ordered if rank not in entry]
    if lacking:
        raise UserError(
            f"{where}: category {lacking[0]} has no {rank}; put categories.json beside it"
        )
    if rank == "name":
        return (
            {entry["id"]: index for index, entry in enumerate(ordered)},
            [str(entry["name"]) for entry in ordered],
        )
    names = sorted({str(entry[rank]) for entry in ordered})
    number = {name: index for index, name in enumerate(names)}
    return {entry["id"]: number[str(entry[rank])] for entry in ordered}, names


def _is_told(name: object) -> bool:
    """Whether a category is told by a name, which a number is not."""
    return name is not None and not str(name).isdecimal()


def _check_entries(entries: Any, needed: set[str], where: str) -> None:
    """UserError for a list of anything but mappings that have the keys that are read."""
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        lacking = sorted(needed - entry.keys()) if isinstance(entry, dict) else sorted(needed)
        if lacking:
            raise UserError(f"{where}, entry {number}, has no {' and no '.join(lacking)}")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {path}; data.root is the folder that holds it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable json: {error}") from None


def _short(name: str) -> str:
    """`train_val2018/Aves/2761/x.jpg` without the folder of the group."""
    parts = name.split("/")
    return "/".join([parts[0], *parts[2:]]) if len(parts) == 4 else name

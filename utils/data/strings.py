"""Data sets named by a string, as in DINOv2: `ImageNet:split=TRAIN:root=DIR:extra=DIR`.

Added to theirs: `Shards:split=TRAIN:root=DIR`, tar shards.
"""

from utils.data.imagenet import ImageNetTree
from utils.data.imagenet22k import ImageNet22k
from utils.data.images import ImageDataset
from utils.data.shards import shards
from utils.errors import UserError

KEYS = {
    "ImageNet": ("split", "root", "extra"),
    "ImageNet22k": ("root", "extra"),
    "Shards": ("split", "root"),
}
GRAMMAR = {**KEYS, "ImageNet22k": ("split", "root", "extra")}  # what DINOv2 parses, if not builds
SPLITS = ("TRAIN", "VAL", "TEST")
SHAPE = "Name:key=value:key=value"


def parse_dataset(string: str) -> ImageDataset:
    """The data set a string names; UserError if the string is wrong or lacks what must be given."""
    name, values = split_string(string)
    _check_keys(string, name)
    needed = KEYS[name] if name == "ImageNet22k" else ("split", "root")
    missing = [key for key in needed if key not in values]
    if missing:
        raise UserError(f"data set string {string!r} lacks {', '.join(missing)}")
    if name == "ImageNet22k":
        return ImageNet22k(values["root"], extra=values["extra"])
    split = values["split"].lower()
    if name == "Shards":
        return shards(values["root"], split=split)
    return ImageNetTree(values["root"], split=split, extra=values.get("extra"))


def split_string(string: str) -> tuple[str, dict[str, str]]:
    """Name and values of a data set string, of which no value can hold `:` or `=`.

    As in DINOv2, of a key given twice the last value counts, and a data set without splits may be
    given one; `parse_dataset` refuses to build either.
    """
    name, *pairs = string.split(":")
    if name not in KEYS:
        raise _wrong(string, f"unknown data set {name!r}; known: {', '.join(KEYS)}")
    values: dict[str, str] = {}
    for pair in pairs:
        key, *value = pair.split("=")
        if len(value) != 1:
            raise _wrong(string, f"{pair!r} is not key=value (values hold no ':' and no '=')")
        if key not in GRAMMAR[name]:
            raise _unknown_key(string, name, key)
        values[key] = value[0]
    if "split" in KEYS[name] and values.get("split", "TRAIN") not in SPLITS:
        raise _wrong(string, f"unknown split {values['split']!r}; known: {', '.join(SPLITS)}")
    return name, values


def _check_keys(string: str, name: str) -> None:
    """UserError for a key that comes twice, or that this data set has no use for."""
    keys = [pair.partition("=")[0] for pair in string.split(":")[1:]]
    for key in keys:
        if key not in KEYS[name]:
            raise _unknown_key(string, name, key)
        if keys.count(key) > 1:
            raise _wrong(string, f"{key} is given twice")


def _unknown_key(string: str, name: str, key: str) -> UserError:
    return _wrong(string, f"unknown key {key!r}; {name} has {', '.join(KEYS[name])}")


def _wrong(string: str, why: str) -> UserError:
    return UserError(f"data set string {string!r}: {why} ({SHAPE})")

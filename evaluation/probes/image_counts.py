"""How many images the figures of a probe are from, and how many could not be read."""

from collections.abc import Mapping, Sized

from evaluation.features.dataset import FeatureSet
from evaluation.progress import say
from utils import distributed


def count_images(
    data: Mapping[str, Sized], left_out: Mapping[str, int], probe: str
) -> dict[str, int]:
    """The counts of a protocol: `train_images`, `val_images` (those read) and `left_out`, of all.

    data: the data sets by split. left_out: images without an outcome, by split. If there are any,
    a line says so.
    """
    total = sum(left_out.values())
    if total and distributed.is_main():
        noun = "image that cannot be read is" if total == 1 else "images that cannot be read are"
        say(f"{probe}: {total} {noun} left out")
    read = {f"{split}_images": len(data[split]) - left_out.get(split, 0) for split in data}
    return {**read, "left_out": total}


def count_missing(dataset: Sized, part: FeatureSet) -> int:
    """Images of `dataset` without a row on any rank; every rank must call this."""
    return len(dataset) - sum(distributed.gather_objects(len(part.labels)))

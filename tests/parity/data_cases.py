"""Runners of the cases about data: ImageNet metadata, samplers, data set strings, transforms."""

import hashlib
import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.parity.harness import Runner, check, load, strip
from utils.data import samplers
from utils.data.imagenet import ImageNetTree, write_extra
from utils.data.imagenet22k import ImageNet22k
from utils.data.strings import split_string
from utils.data.transforms import evaluation_transform, training_transform
from utils.errors import UserError

# Published constructor arguments -> ours.
RENAMED = {
    "start": "rank",
    "step": "world_size",
    "num_replicas": "world_size",
    "use_new_shuffle_tensor_slice": "new",
    "num_repeats": "repeats",
    "hflip_prob": "hflip_probability",
}
PUBLISHED_CLASSES = {
    "ShardedInfiniteSampler": "sharded_infinite",
    "InfiniteSampler": "infinite",
    "EpochSampler": "epoch",
    "RASampler": "repeated_augmentation",
    "DistributedSampler": "distributed",  # torch's, without repeated augmentation
}
SHUFFLED = ("repeated_augmentation", "distributed")  # where the published class is not told


def imagenet_extra(case: dict[str, Any], folder: Path) -> None:
    """Written byte for byte; read back, and read without metadata, in the stored order.

    Where the published code cuts names to the length of other rows of labels.txt, ours are whole,
    and equal after that cut.
    """
    expected = case["expected"]
    with tempfile.TemporaryDirectory() as temporary:
        root, extra = Path(temporary, "root"), Path(temporary, "extra")
        for name in case["args"]["files_in_tree"]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / "labels.txt").write_text(case["args"]["labels_txt"], encoding="utf-8")
        write_extra(root, extra, splits=("train", "val"))
        assert {path.name for path in extra.iterdir()} == set(case["files"])
        for name, stored in case["files"].items():
            if (extra / name).read_bytes() != (folder / stored).read_bytes():
                ours, theirs = np.load(extra / name), np.load(folder / stored)
                assert theirs.dtype.itemsize < ours.dtype.itemsize and "ids" not in name, name
                assert np.array_equal(ours.astype(theirs.dtype), theirs), name
        classes = {split: {pair[0] for pair in found} for split, found in expected["find"].items()}
        for split, targets in expected["targets"].items():
            # Without metadata val has the class numbers of train, where the metadata have its own.
            for source in (extra, None) if classes["TRAIN"] == classes[split] else (extra,):
                images = ImageNetTree(root, split=split.lower(), extra=source)
                paths = [os.path.relpath(images.path(i), root) for i in range(len(images))]
                check("targets", images.labels.tolist(), targets, 0, "exact")
                check("relpaths", paths, expected["relpaths"][split], 0, "exact")
                stored = np.load(folder / case["files"][f"class-names-{split}.npy"])
                names = np.array(images.class_names).astype(stored.dtype).tolist()
                named = [list(pair) for pair in zip(images.class_ids, names, strict=True)]
                check("find", named, expected["find"][split], 0, "exact")


def imagenet_test_split(case: dict[str, Any], folder: Path) -> None:
    """Only the entries file, whatever is on disk."""
    expected = case["expected"]["test"]
    with tempfile.TemporaryDirectory() as temporary:
        written = write_extra(temporary, temporary, splits=("test",))
        assert [os.path.basename(path) for path in written] == expected["files_written"]
        data = Path(written[0]).read_bytes()
        assert len(data) == expected["file_bytes"]
        assert hashlib.sha256(data).hexdigest() == expected["sha256"]
        images = ImageNetTree(temporary, split="test", extra=temporary)
        assert len(images) == expected["length"]
        assert images.label(0) == expected["target_of_first"]
        assert images.labels is expected["targets"]
        assert os.path.relpath(images.path(0), temporary) == expected["relpath_of_first"]


def evaluation_samplers(case: dict[str, Any], folder: Path) -> None:
    """The first indices of every sampler."""
    for config, stored in zip(case["args"]["configs"], case["expected"]["indices"], strict=True):
        config = dict(config)
        ours = _indices(config.pop("sampler"), config.pop("sample_count"), config)
        check(str(config), ours, stored, 0, "exact")


def recipes_samplers(case: dict[str, Any], folder: Path) -> None:
    """The first indices of every sampler; length of the sampler with repeated augmentation."""
    stored = load(case, folder)
    for number, item in enumerate(case["args"]["items"]):
        item = dict(item)
        name = PUBLISHED_CLASSES[item.pop("class")]
        sample_count = item.pop("sample_count", None) or item.pop("dataset_len")
        ours = torch.tensor(_indices(name, sample_count, item), dtype=torch.int64)
        check(f"{number} {name}", ours, stored[f"out.{number}.indices"], 0, "exact")
        if f"out.{number}.len" in stored:
            check("len", torch.tensor([len(ours)]), stored[f"out.{number}.len"], 0, "exact")


def _indices(name: str, sample_count: int, arguments: dict[str, Any]) -> list[int]:
    take = arguments.pop("take", None)
    arguments = {RENAMED.get(key, key): value for key, value in arguments.items()}
    arguments.setdefault("shuffle", name in SHUFFLED)
    leading = [arguments.pop("size")] if "size" in arguments else []
    order = getattr(samplers, name)(*leading, sample_count, **arguments)
    return [int(index) for index in islice(order, take)]


def dataset_strings(case: dict[str, Any], folder: Path) -> None:
    """Class and values of the valid strings; one clear line for the others."""
    strings, parsed = case["args"]["strings"], case["expected"]["parsed"]
    for string, stored in zip(strings, parsed, strict=True):
        if "error" in stored:
            with pytest.raises(UserError) as error:
                split_string(string)
            assert "\n" not in str(error.value) and repr(string) in str(error.value)
        else:
            check(string, split_string(string), (stored["class"], stored["kwargs"]), 0, "exact")


def eval_transform(case: dict[str, Any], folder: Path) -> None:
    """The crop exactly (one grey level on 0.1 % of the pixels), the normalised tensor closely."""
    stored, stride = load(case, folder), case["args"]["stride"]
    transform = evaluation_transform(**case["args"]["kwargs"])
    image = Image.open(folder / case["files"]["png"]).convert("RGB")
    crop = v2.Compose(transform.transforms[:-2])(image)
    difference = np.abs(np.asarray(crop, np.int64) - stored["out.crop_u8"].numpy().astype(np.int64))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    tolerance = {key: case["tolerance"][key] for key in ("atol", "rtol")}
    ours = transform(image)
    strided = ours[:, ::stride, ::stride]
    if difference.max() == 0:
        check("normalized", strided, stored["out.normalized_strided"], tolerance, "close")
        check("mean", ours.mean((1, 2)), stored["out.channel_mean"], tolerance, "close")
        check("std", ours.std((1, 2)), stored["out.channel_std"], tolerance, "close")
    else:  # one grey level after normalising
        check(
            "normalized", strided, stored["out.normalized_strided"], 1.01 / 255 / 0.224, "absolute"
        )


def train_transform(case: dict[str, Any], folder: Path) -> None:
    """The same crops and flips from the same seeds."""
    stored, stride = load(case, folder), case["args"]["stride"]
    kwargs = {RENAMED.get(key, key): value for key, value in case["args"]["kwargs"].items()}
    transform = training_transform(**kwargs)
    image = Image.open(folder / case["files"]["png"]).convert("RGB")
    for seed in case["args"]["seeds"]:
        torch.manual_seed(seed)
        ours = transform(image)[:, ::stride, ::stride]
        check(f"seed {seed}", ours, stored[f"out.seed{seed}_strided"], case["tolerance"], "close")


def imagenet22k(case: dict[str, Any], folder: Path) -> None:
    """Raw bytes, images and classes out of tar files."""
    tensors, expected = load(case, folder), case["expected"]
    with tempfile.TemporaryDirectory() as temporary:
        for prefix in ("in.tar/", "in.npy/"):
            for name, value in strip(tensors, prefix).items():
                Path(temporary, name).write_bytes(value.numpy().tobytes())
        images = ImageNet22k(temporary, extra=temporary)
        check("targets", images.labels.tolist(), expected["targets"], 0, "exact")
        check("find", images.class_ids, expected["find"], 0, "exact")
        for index in range(len(images)):
            data = torch.frombuffer(bytearray(images.read_bytes(index)), dtype=torch.uint8)
            check("bytes", data, tensors[f"out.bytes{index}"], 0, "exact")
            pixels = torch.from_numpy(np.array(images.read(index)))
            check("image", pixels, tensors[f"out.image{index}"], 0, "exact")
            check(
                "id",
                images.class_ids[images.label(index)],
                expected["class_ids"][index],
                0,
                "exact",
            )


RUNNERS: dict[tuple[str, str], Runner] = {
    ("evaluation", "imagenet_extra"): imagenet_extra,
    ("evaluation", "imagenet_test_split"): imagenet_test_split,
    ("evaluation", "samplers"): evaluation_samplers,
    ("evaluation", "dataset_strings"): dataset_strings,
    ("evaluation", "eval_transform"): eval_transform,
    ("evaluation", "train_transform"): train_transform,
    ("evaluation", "imagenet22k"): imagenet22k,
    ("recipes", "samplers"): recipes_samplers,
}

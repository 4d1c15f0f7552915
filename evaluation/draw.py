"""Draw one picture of one net; experiments/draw.py runs this.

The picture of a config is a function below with keywords; it is called on every rank with the net,
the data node and a folder, and returns the paths that it wrote.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.data import make_data
from evaluation.image_size import image_size_of
from evaluation.nets import chosen_backbone, make_net, warn_if_random
from evaluation.pictures.attention import draw_attention
from evaluation.pictures.neighbours import draw_neighbours
from evaluation.pictures.pca import draw_pca_maps, patch_maps
from evaluation.pictures.published_pca import write_published_pca
from evaluation.pictures.segmentation import draw_segmentation
from evaluation.pictures.token_mask import draw_masks, draw_overview, stages
from evaluation.progress import say
from evaluation.sample import sample_images, spread
from evaluation.segmentation.dumps import read_predictions
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.probe import SegmentationProbe
from utils import distributed
from utils.config.build import build, plain
from utils.data.images import ImageDataset, Subset
from utils.data.segmentation import MaskedSubset, SegmentationDataset
from utils.data.segmentation_transforms import squash_image, squash_mask, squash_to_tensor
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from utils.folders import check_folder
from utils.joining import session
from utils.ranges import check_count, check_sizes, check_word
from utils.symmetry import SYMMETRIES
from vit.backbone import Backbone

STYLES = ("ours", "capi")
Data = Mapping[str, Any]


def draw(config: Mapping[str, Any]) -> list[Path]:
    """Build the net, load its weights strictly, draw the config's picture into `output_dir`.

    Reads the keys of configs/draw.yaml; every rank must call this, and the first one writes.
    """
    config = dict(plain(config))
    check_folder(config["output_dir"])
    with session(config["device"]) as device:
        config["backbone"] = chosen_backbone(config)
        picture = build({**config["picture"], "_partial_": True})
        net = make_net(config["backbone"], config["weights"], seed=config["seed"]).to(device)
        warn_if_random(config["backbone"], config["weights"], flag="--weights", doing="drawing")
        paths = picture(net=net, data=config["data"], folder=Path(config["output_dir"]))
        if distributed.is_main():
            say(f"written: {', '.join(str(path) for path in paths)}")
        distributed.barrier()
    return paths


def main_only(picture: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """Decorate a picture to be drawn on the first rank only; other ranks get no paths."""

    @functools.wraps(picture)
    def drawn(**keywords: Any) -> list[Path]:
        return picture(**keywords) if distributed.is_main() else []

    return drawn


@main_only
def draw_pca(
    *,
    net: Backbone,
    data: Data,
    folder: Path,
    style: str = "ours",
    num_images: int = 4,
    image_size: int | None = None,
    element: str = "r",
    whiten: bool = True,
) -> list[Path]:
    """PCA maps of validation images: `pca.png`, or with style="capi" the files of capi.

    capi takes every (N // num_images)-th image, squashed to a square; its index names the files.
    """
    check_word("style", style, STYLES)
    check_word("element", element, SYMMETRIES)
    dataset = make_data(data, "val")
    size = _side(net, image_size)
    if style == "ours":
        images = sample_images(dataset, size=size, count=num_images)
        return [draw_pca_maps(net, images, folder / "pca.png", element=element)]
    if num_images < 1:
        raise UserError(f"num_images is {num_images}; it must be at least 1")
    names = range(0, len(dataset), max(1, len(dataset) // num_images))
    images = torch.stack([squash_to_tensor(dataset.read(index), size) for index in names])
    return write_published_pca(images, patch_maps(net, images), folder, names=names, whiten=whiten)


@main_only
def draw_attention_maps(
    *,
    net: Backbone,
    data: Data,
    folder: Path,
    block: int = -1,
    query: str = "class",
    rollout: bool = False,
    num_images: int = 4,
    image_size: int | None = None,
    element: str = "r",
) -> list[Path]:
    """`attention.png` and `attention_heads.png` of validation images."""
    check_word("element", element, SYMMETRIES)
    size = _side(net, image_size)
    images = sample_images(make_data(data, "val"), size=size, count=num_images)
    return draw_attention(
        net, images, folder, element=element, block=block, query=query, rollout=rollout
    )


@main_only
def draw_token_masks(
    *,
    net: Backbone,
    data: Data,
    folder: Path,
    num_images: int = 4,
    image_size: int | None = None,
) -> list[Path]:
    """The patches of validation images that a net keeps: `token_mask.png`, `img_*.jpg`."""
    size = _side(net, image_size)
    images = sample_images(make_data(data, "val"), size=size, count=num_images)
    kept = stages(net, images)
    overview = draw_overview(images, kept, folder / "token_mask.png")
    return [overview, *draw_masks(images, kept, folder)]


@main_only
def draw_nearest(
    *,
    net: Backbone,
    data: Data,
    folder: Path,
    num_queries: int = 8,
    k: int = 7,
    num_train: int | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> list[Path]:
    """`neighbours.png`: validation images and their nearest training images."""
    check_count("num_queries", num_queries, 1)
    check_count("k", k, 1)
    if num_train is not None:
        check_count("num_train", num_train, 1)
    train, val = (make_data(data, split) for split in ("train", "val"))
    size = _side(net, image_size)
    path = draw_neighbours(
        net,
        _thinned(train, num_train),
        val,
        folder / "neighbours.png",
        transform=evaluation_transform(resize_size=size, crop_size=size),
        num_queries=num_queries,
        k=k,
        batch_size=batch_size,
        num_workers=num_workers,
        shown=True,
    )
    return [path]


def draw_segmentations(
    *,
    net: Backbone,
    data: Data,
    folder: Path,
    train: SegmentationDataset,
    test: SegmentationDataset,
    predictions: str | None = None,
    num_images: int = 6,
    num_train: int = 240,
    num_neighbors: int = 10,
    distance: str = "cosine",
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> list[Path]:
    """`segmentation.png`: test images, their masks, and those of a kNN on patches.

    The kNN uses `num_train` images spread over `train`. `predictions` replaces it: a `preds_*.pth`
    that a segmentation probe wrote for all images of `test` (dump_predictions=true). `data` is not
    read. Every rank must call this.
    """
    check_count("num_images", num_images, 1)
    check_count("num_train", num_train, 1)
    shown = _some(test, num_images)
    if predictions is not None:
        found = read_predictions(predictions, len(test))[torch.tensor(shown.indices)]
    else:
        probe = SegmentationProbe(
            train=_some(train, num_train),
            test=shown,
            classifiers=["knn"],
            knn=PatchKnn(num_neighbors=[num_neighbors], distances=[distance]),
            resolution=_side(net, image_size),
            batch_size=batch_size,
            num_workers=num_workers,
            dump_predictions=True,
        )
        probe(net, {}, folder)
        distributed.barrier()
        if distributed.is_main():
            found = read_predictions(folder / "preds_knn.pth", len(shown))
    if not distributed.is_main():
        return []
    size = found.shape[-1]
    path = draw_segmentation(
        [squash_image(shown.read(index), size) for index in range(len(shown))],
        [squash_mask(shown.read_mask(index), size) for index in range(len(shown))],
        list(found.numpy()),
        folder / "segmentation.png",
        class_names=test.class_names,
        ignore=test.ignore_labels,
    )
    return [path]


def _some(dataset: SegmentationDataset, count: int) -> MaskedSubset:
    return MaskedSubset(dataset, spread(len(dataset), count))


def _thinned(dataset: ImageDataset, count: int | None) -> ImageDataset:
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, spread(len(dataset), count))


def _side(net: Backbone, image_size: int | None) -> int:
    """Pixels a side: those asked for, else those the net is built for."""
    check_sizes(image_size=image_size)
    return image_size or image_size_of(net)

"""What a protocol says of the net's passes is what happened: precision, images, evaluation mode."""

from functools import partial

import pytest
import torch

from evaluation.probes.accuracy import AccuracyProbe
from evaluation.probes.attentive import AttentiveProbe
from evaluation.probes.knn import KnnProbe
from evaluation.probes.linear import LinearProbe
from evaluation.probes.logreg import LogregProbe
from evaluation.segmentation.dense_linear import PixelLinearProbe
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.probe import SegmentationProbe
from tests.evaluation.segmentation.toys import ToyMasks
from tests.evaluation.toys import Damaged, ToyImages, ToyNet
from utils.data.transforms import deit_evaluation_transform, evaluation_transform

SIZES = {"resize_size": 16, "crop_size": 12}
SHORT = {"epochs": 1, "epoch_length": 2, "global_batch_size": 8, "batch_size": 8}
MASKS = {"train": ToyMasks(12, seed=1), "test": ToyMasks(3, seed=2)}
ON_IMAGES = {
    "knn": partial(KnnProbe, ks=(3,), **SIZES),
    "logreg": partial(LogregProbe, Cs=[1.0], max_iter=3, **SIZES),
    "linear": partial(LinearProbe, learning_rates=(0.1,), **SHORT, **SIZES),
    "attentive": partial(
        AttentiveProbe, learning_rates=(0.1,), weight_decays=(0.0,), **SHORT, **SIZES
    ),
    "accuracy": partial(AccuracyProbe, input_size=12, eval_crop_ratio=0.75),
}
ON_MASKS = {
    "segmentation": partial(
        SegmentationProbe, classifiers=["knn"], knn=PatchKnn(num_neighbors=[1]),
        resolution=16, **MASKS,
    ),
    "pixel linear": partial(
        PixelLinearProbe, crop_size=16, image_size=16, stride=16, num_steps=2, warmup_steps=0,
        effective_batch_size=2, num_workers=0, num_overlays=0, **MASKS,
    ),
}  # fmt: skip


class Watched(ToyNet):
    """Notes the images of its passes, and their autocast and mode; a classifier too."""

    num_classes = 6

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []
        self.passes: set[tuple[torch.dtype | None, bool]] = set()

    def features(self, images, layers=(-1,)):
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.passes.add((cast, self.training))
        self.images += images
        return super().features(images, layers)

    def forward(self, images):
        return self.features(images)[0].cls


def watched(probe, folder):
    net = Watched().train()
    probe(net, {"train": ToyImages(24, 0), "val": ToyImages(9, 1)}, folder)
    return net


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make", [*ON_IMAGES.values(), *ON_MASKS.values()], ids=[*ON_IMAGES, *ON_MASKS]
)
def test_every_pass_is_in_the_precision_asked_for(make, precision, tmp_path):
    """Those of training images as well, and never with the net's dropout."""
    probe = make(precision=precision)
    cast = {"fp32": None, "bf16": torch.bfloat16}[precision]
    assert watched(probe, tmp_path).passes == {(cast, False)}
    assert probe.protocol["precision"] == precision


@pytest.mark.parametrize("name", ON_IMAGES)
def test_the_net_sees_images_of_the_sizes_asked_for(name, tmp_path):
    images = watched(ON_IMAGES[name](), tmp_path).images
    assert {image.shape for image in images} == {(3, 12, 12)}
    transform = evaluation_transform(**SIZES)
    if name == "accuracy":
        transform = deit_evaluation_transform(
            input_size=12, eval_crop_ratio=0.75, resize_small=True
        )
    seen = torch.stack(images)

    def is_shown(dataset, index):
        return bool((seen == transform(dataset.read(index))).flatten(1).all(1).any())

    assert all(is_shown(ToyImages(9, 1), index) for index in range(9))
    cropped_at_random = name in ("linear", "attentive")
    if name != "accuracy":
        assert is_shown(ToyImages(24, 0), 0) != cropped_at_random


@pytest.mark.parametrize("name", ON_IMAGES)
def test_images_that_were_left_out_are_counted(name, tmp_path, capsys):
    """Those of a training of heads as well, also by a start that finds the heads trained."""
    images = {"train": Damaged(24, 0), "val": Damaged(9, 1)}
    counts, said = {"train_images": 20, "val_images": 8, "left_out": 5}, "5 images that cannot"
    if name == "accuracy":
        counts, said = {"val_images": 8, "left_out": 1}, "1 image that cannot be read is left out"
    trained = "sampler" in ON_IMAGES[name]().protocol
    whole_pass = {"epoch_length": 6} if trained else {}
    for _ in range(1 + trained):
        probe = ON_IMAGES[name](on_error="skip", **whole_pass)
        probe(Watched().eval(), images, tmp_path)
        assert counts.items() <= probe.protocol.items()
        assert said in capsys.readouterr().out
    whole = {split: ToyImages(len(part), 2) for split, part in images.items()}
    probe(Watched().eval(), whole, tmp_path / "whole")
    assert probe.protocol["left_out"] == 0 and "left out" not in capsys.readouterr().out

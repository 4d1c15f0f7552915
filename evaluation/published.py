"""Figures that the authors of a checkpoint state for it, to stand beside ours."""

from typing import NamedTuple


class Published(NamedTuple):
    """Percent top-1 and top-5, batch-averaged loss; None where it is not stated."""

    acc1: float
    acc5: float | None = None
    loss: float | None = None
    source: str = "octic-vits"

    def __str__(self) -> str:
        stated = [f"Acc@1 {self.acc1}"]
        stated += [f"Acc@5 {self.acc5:.3f}"] if self.acc5 is not None else []
        stated += [f"loss {self.loss}"] if self.loss is not None else []
        return f"published: {' '.join(stated)} ({self.source}, ImageNet-1k val)"


IMAGENET_VAL = 50_000

# DeiT III on ImageNet-1k at 224, as released with octic-vits.
PUBLISHED = {
    "hybrid_deit_huge_patch14": Published(84.996, 96.390, 0.799),
    "d8_inv_early_deit_huge_patch14": Published(84.7),
    "hybrid_deit_large_patch16": Published(84.5),
    "d8_inv_early_deit_large_patch16": Published(84.0),
}


def published_figure(
    model_name: str, *, exported_by_us: bool, num_images: int, num_classes: int
) -> Published | None:
    """The stated figure, if this is a released model, not trained here, on ImageNet's val set."""
    if exported_by_us or (num_images, num_classes) != (IMAGENET_VAL, 1000):
        return None
    return PUBLISHED.get(model_name)

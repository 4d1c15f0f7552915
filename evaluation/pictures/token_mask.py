"""Which patches a net that drops tokens still looks at, stage by stage.

The net says it by `kept_patches(images)`: for each stage booleans [B h w], whether a patch is still
a token of its own. A fused token is no patch and is not shown.

Letters: B images, h w grid of patches, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from evaluation.features.dataset import evaluating
from evaluation.image_size import image_size_of
from evaluation.pictures.figures import grid, save, visible
from evaluation.progress import say, track
from utils import distributed
from utils.data.images import ImageDataset
from utils.data.transforms import deit_evaluation_transform
from utils.errors import UserError
from utils.folders import make_folder
from utils.ranges import check_count

SHOWN = 8  # rows of the overview


@runtime_checkable
class DropsTokens(Protocol):
    """A net that tells which patches it kept."""

    def kept_patches(self, images: Tensor) -> list[Tensor]:
        """Booleans [B h w] after each stage that drops tokens."""
        ...


def masked(images: Tensor, kept: Tensor) -> Tensor:
    """Images [B C H W] of which only the patches `kept` [B h w] are left; the others are 0."""
    height, width = images.shape[-2] // kept.shape[1], images.shape[-1] // kept.shape[2]
    pixels = kept.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    return images * pixels[:, None].to(images.dtype)


@torch.no_grad()
def stages(net: Any, images: Tensor) -> list[Tensor]:
    """Kept patches [B h w] after each stage; UserError for a net that drops none."""
    inner = _dropping(net)
    with evaluating(net) as device:
        found = [kept.cpu() for kept in inner.kept_patches(images.to(device))]
    if not found:
        raise UserError("the net keeps every patch: no keep rate below 1 is in force")
    return found


def _dropping(net: Any) -> DropsTokens:
    inner = net if isinstance(net, DropsTokens) else getattr(net, "net", net)
    if not isinstance(inner, DropsTokens):
        raise UserError(
            f"{type(inner).__name__} does not tell which patches it keeps (kept_patches); "
            "EViT does: --model deit_small_patch16_shrink_base"
        )
    return inner


def draw_masks(
    images: Tensor, kept: Sequence[Tensor], folder: Path, *, first: int = 0
) -> list[Path]:
    """`img_<i>_a.jpg` of normalised images [B 3 H W], and `img_<i>_l<j>.jpg` after stage j.

    Patches that are not among those `kept` [B h w] of each stage are black; stages count from 0, as
    published. `first` is the number of the first image.
    """
    make_folder(folder)
    shown = visible(images).movedim(-1, 1)
    views = {"a": shown}
    views |= {f"l{j}": masked(shown, masks) for j, masks in enumerate(kept)}
    paths = []
    for name, pictures in views.items():
        for number, picture in enumerate(pictures, start=first):
            paths.append(folder / f"img_{number}_{name}.jpg")
            pixels = (picture.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(paths[-1], quality=95)
    return paths


def draw_overview(images: Tensor, kept: Sequence[Tensor], path: Path) -> Path:
    """One picture: a row for each image [B 3 H W], what is left of it [B h w] after each stage."""
    shown = visible(images).movedim(-1, 1)
    figure, axes = grid(len(images), 1 + len(kept))
    for column, masks in enumerate([None, *kept]):
        pictures = shown if masks is None else masked(shown, masks)
        share = "" if masks is None else f": {100 * float(masks.float().mean()):.0f} %"
        title = "image" if masks is None else f"stage {column}{share}"
        axes[0][column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row][column].imshow(picture.movedim(0, -1).numpy())
    return save(figure, path)


class TokenMaskProbe:
    """Mask pictures of the first validation images, as a probe: of a file, or during a training.

    num_images: how many. input_size: None is the net's own. The figures are the shares of the
    patches that are kept, in percent, per stage.
    """

    splits = ("val",)

    def __init__(
        self,
        *,
        num_images: int = 128,
        input_size: int | None = None,
        eval_crop_ratio: float = 0.875,
        batch_size: int = 32,
        transform: Callable | None = None,
    ) -> None:
        check_count("num_images", num_images, 1)
        check_count("batch_size", batch_size, 1)
        self.num_images, self.input_size = num_images, input_size
        self.eval_crop_ratio, self.batch_size = eval_crop_ratio, batch_size
        self.transform = transform

    def check(self, net: Any) -> None:
        """UserError for a net that drops no tokens."""
        _dropping(net)

    def __call__(
        self, net: Any, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Kept shares, and pictures in `output_dir`/token_mask; every rank must call this."""
        dataset, folder = data["val"], Path(output_dir) / "token_mask"
        transform = self.transform or deit_evaluation_transform(
            input_size=self.input_size or image_size_of(net),
            eval_crop_ratio=self.eval_crop_ratio,
            resize_small=True,
        )
        count = min(self.num_images, len(dataset))
        starts = range(0, count, self.batch_size)
        shares: list[Tensor] = []
        main = distributed.is_main()
        for start in track(starts, total=len(starts), label="mask pictures", shown=main):
            indices = range(start, min(start + self.batch_size, count))
            images = torch.stack([transform(dataset.read(index)) for index in indices])
            kept = stages(net, images)
            shares.append(torch.stack([m.float().mean(dim=(1, 2)) for m in kept], dim=1))
            if main:
                draw_masks(images, kept, folder, first=start)
            if main and not start:
                shown = [masks[:SHOWN] for masks in kept]
                draw_overview(images[:SHOWN], shown, folder / "token_mask.png")
        if main:
            say(f"written: {folder}/img_*.jpg of {count} images, {folder / 'token_mask.png'}")
        means = 100 * torch.cat(shares).mean(dim=0)
        return {f"kept_{number}": float(share) for number, share in enumerate(means, start=1)}

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {"probe": "token_mask", "num_images": self.num_images}

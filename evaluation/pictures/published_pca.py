"""PCA maps in capi's form: its numbers, its file names, its sizes.

Per image six components, and ten of one PCA over all images; both scaled by the deviation of the
first component, each component's sign the one of positive skewness. Darcet et al. 2025, "Cluster
and Predict Latent Patches for Improved Masked Image Modeling".
Letters: B images, h w grid of patches, D channels, K components.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from evaluation.pictures.figures import visible
from evaluation.pictures.pca import SHOWN_RANGE, principal_scores, signed
from utils.folders import make_folder

SEPARATE, JOINT = 6, 10  # components of a PCA per image, and of one over all images
SIZE, MARGIN = 224, 5  # pixels of a picture in a row, and around it
SIGNS = [(a, b, c) for b, a, c in itertools.product((-1, 1), repeat=3)]
"""The sign choices of `all_flips_0` to `all_flips_7`, in the order of numpy's meshgrid."""


def separate_components(features: Tensor, *, whiten: bool = True) -> Tensor:
    """Components of a PCA for each image [B h w D]: [B h w K], K = 6 or what there is."""
    return torch.stack([_separate(image, whiten) for image in features])


def joint_components(features: Tensor, *, whiten: bool = True) -> Tensor:
    """Components of one PCA over all images [B h w D]: [B h w K], K = 10 or what there is."""
    scores = principal_scores(features.flatten(0, -2), JOINT, whiten=whiten)
    return _scaled(signed(scores)).unflatten(0, features.shape[:-1])


def to_rgb(components: Tensor) -> np.ndarray:
    """Three components [... 3] as uint8 colours: -2.3 is 0, 2.3 is 255."""
    colours = (components.double() / SHOWN_RANGE + 1) / 2 * 255
    return colours.clamp(0, 255).numpy().astype(np.uint8)


def to_heat(component: Tensor) -> np.ndarray:
    """One component [...] as uint8 colours [... 3] from blue (-2.3) to red (2.3)."""
    shown = (component.double() / SHOWN_RANGE + 1) / 2
    return colormaps["coolwarm"](shown.numpy(), bytes=True)[..., :3]


def flips(components: Tensor) -> Iterator[np.ndarray]:
    """The eight colour maps of three components [h w 3], one for each choice of signs."""
    for signs in SIGNS:
        yield to_rgb(components[..., :3] * torch.tensor(signs))


def write_published_pca(
    images: Tensor,
    features: Tensor,
    folder: Path,
    *,
    names: Sequence[int] | None = None,
    whiten: bool = True,
) -> list[Path]:
    """Write capi's artefacts of images [B 3 H H] and their maps [B h w D]; gives the rows' paths.

    `folder`/artifacts/ gets `{name:07d}_pca_{sep,joint}.png` (image, colours, a heat map for each
    component), its cells as `.unwrapped_0_{j}.png` and the eight choices of signs as
    `all_flips_{k}.png`. `names`: the images' numbers, 0 onwards by default.
    """
    folder = Path(folder) / "artifacts"
    make_folder(folder)
    found = {
        "sep": separate_components(features, whiten=whiten),
        "joint": joint_components(features, whiten=whiten),
    }
    paths = []
    for index, image in enumerate(visible(images)):
        photograph = _enlarged((image * 255).round().byte().numpy(), Image.Resampling.BICUBIC)
        for kind, components in found.items():
            stem = f"{names[index] if names else index:07d}_pca_{kind}"
            paths.append(_write_row(folder, stem, photograph, components[index]))
    return paths


def _write_row(folder: Path, stem: str, photograph: np.ndarray, components: Tensor) -> Path:
    maps = [to_rgb(components[..., :3]), *(to_heat(part) for part in components.unbind(-1))]
    cells = [photograph, *(_enlarged(part) for part in maps)]
    for position, cell in enumerate(cells):
        Image.fromarray(cell).save(folder / f"{stem}.unwrapped_0_{position}.png")
    for position, cell in enumerate(flips(components)):
        Image.fromarray(_enlarged(cell)).save(folder / f"{stem}all_flips_{position}.png")
    margin = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    row = np.concatenate([np.pad(cell, margin, constant_values=255) for cell in cells], axis=1)
    path = folder / f"{stem}.png"
    Image.fromarray(row).save(path)
    return path


def _separate(image: Tensor, whiten: bool) -> Tensor:
    scores = principal_scores(image.flatten(0, 1), SEPARATE, whiten=whiten)
    return signed(_scaled(scores)).unflatten(0, image.shape[:-1])


def _scaled(scores: Tensor) -> Tensor:
    return scores / scores[:, 0].std(correction=0).clamp_min(1e-12)


def _enlarged(
    picture: np.ndarray, resampling: Image.Resampling = Image.Resampling.NEAREST
) -> np.ndarray:
    if picture.shape[:2] == (SIZE, SIZE):
        return picture
    return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), resampling))

"""PCA maps of a net's patches as colours, of images and of turned images.

Letters: B images, h w grid of patches, D channels, K components, n rows.
"""

from pathlib import Path

import torch
from torch import Tensor

from evaluation.features.dataset import evaluating
from evaluation.features.reading import patch_map
from evaluation.pictures.figures import grid, save, visible
from utils.errors import UserError
from utils.symmetry import invert, transform_image, transform_map
from vit.backbone import Backbone

SHOWN_RANGE = 2.3
"""Whitened components are shown from minus to plus this many standard deviations."""
ROWS_AT_ONCE = 65536
IMAGES_AT_ONCE = 64


@torch.no_grad()
def principal_scores(rows: Tensor, components: int, *, whiten: bool = True) -> Tensor:
    """First principal components of rows [n D], in float64 [n K]; K is at most n and D.

    Whitened: each of variance 1 (over n - 1). The sign of each is open. Equals scikit-learn's PCA.
    """
    parts, count = rows.split(ROWS_AT_ONCE), min(components, *rows.shape)
    mean = rows.mean(dim=0, dtype=torch.float64)
    covariance = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in parts:
        covariance.addmm_((part.double() - mean).T, part.double() - mean)
    variances, directions = torch.linalg.eigh(covariance / max(len(rows) - 1, 1))
    variances, directions = variances.flip(0)[:count], directions.flip(1)[:, :count]
    if whiten:
        directions = directions / variances.clamp_min(1e-12).sqrt()
    return torch.cat([(part.double() - mean) @ directions for part in parts])


def signed(scores: Tensor) -> Tensor:
    """Columns [n K] of the sign that makes their skewness, E[x^3] / E[x^2]^1.5, positive."""
    skewness = scores.pow(3).mean(dim=0) / scores.square().mean(dim=0).clamp_min(1e-12) ** 1.5
    return torch.where(skewness < 0, -scores, scores)


@torch.no_grad()
def pca_colours(patches: Tensor) -> Tensor:
    """First principal components of all patches together [B h w D] as colours in 0..1 [B h w 3].

    Whitened; each component's sign is the one that makes its skewness positive, so that pictures of
    two runs can be compared.
    """
    scores = signed(principal_scores(patches.flatten(0, -2), 3))
    colours = (scores / SHOWN_RANGE + 1) / 2
    return colours.clamp(0, 1).float().unflatten(0, patches.shape[:-1])


@torch.no_grad()
def patch_maps(net: Backbone, images: Tensor) -> Tensor:
    """Maps of patches [B h w D] in float32 on the host; UserError for a net without any."""
    with evaluating(net) as device:
        found = [
            patch_map(net, part.to(device)).float().cpu() for part in images.split(IMAGES_AT_ONCE)
        ]
    if found[0].shape[-1] < 3 or found[0][..., 0].numel() < 3:
        raise UserError("three colours need at least three channels and three patches")
    return torch.cat(found)


@torch.no_grad()
def draw_pca_maps(net: Backbone, images: Tensor, path: Path, *, element: str = "r") -> Path:
    """One row per image [B 3 H H]: image, its map, turned image, its map, that map turned back.

    The first and the last map of a row agree where the net is equivariant. One PCA serves all.
    """
    turned = transform_image(images, element)
    patches = [patch_maps(net, views) for views in (images, turned)]
    colours, turned_colours = pca_colours(torch.cat(patches)).chunk(2)
    columns = {
        "image": visible(images),
        "PCA of patches": colours,
        f"image turned ({element})": visible(turned),
        "PCA of patches ": turned_colours,
        "turned back": transform_map(turned_colours, invert(element)),
    }
    figure, axes = grid(len(images), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row][column].imshow(picture.numpy(), interpolation="nearest")
    return save(figure, path)

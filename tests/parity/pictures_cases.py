"""Runners of the cases of topic "evaluation" about pictures: PCA maps in capi's form."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evaluation.pictures.published_pca import (
    flips,
    joint_components,
    separate_components,
    to_heat,
    to_rgb,
    write_published_pca,
)
from tests.parity.harness import check, load

ONE_GREY_LEVEL = 1


def run_pca_maps(case: dict, folder: Path) -> None:
    """Components up to rounding, colours up to one grey level, and the artefacts' names."""
    tensors, whiten = load(case, folder), case["args"]["whiten"]
    features = tensors["in.features"]
    tolerance = {key: case["tolerance"][key] for key in ("atol", "rtol")}
    found = {
        "sep": separate_components(features, whiten=whiten),
        "joint": joint_components(features, whiten=whiten),
    }
    for name, stored in tensors.items():
        if name.startswith("out."):
            ours = _ours(name.removeprefix("out."), found, stored)
            if stored.dtype == torch.uint8:
                check(name, ours.int(), stored.int(), ONE_GREY_LEVEL, "absolute")
            else:
                check(name, ours, stored, tolerance, "close")
    expected = case.get("expected", {})
    with tempfile.TemporaryDirectory() as output:
        write_published_pca(tensors["in.images"], features, Path(output), whiten=whiten)
        artifacts = Path(output) / "artifacts"
        names = sorted(path.name for path in artifacts.glob("0000000_*"))
        check("artifacts", names, sorted(expected["artifacts_of_first_image"]), 0, "exact")
        for kind, key in (("sep", "grid_size"), ("joint", "grid_size_joint")):
            with Image.open(artifacts / f"0000000_pca_{kind}.png") as picture:
                check(key, list(picture.size), expected[key], 0, "exact")


def _ours(name: str, found: dict[str, Tensor], stored: Tensor) -> Tensor:
    """Our value of a stored tensor, such as `sep_proj0`, `rgb_joint2`, `heat_sep0_c0`, `flip7`."""
    if name.startswith("flip"):
        return torch.from_numpy(list(flips(found["sep"][0]))[int(name[-1])])
    kind = "joint" if "joint" in name else "sep"
    image, *component = map(int, re.findall(r"\d+", name))
    components = found[kind][image]
    if name.startswith("rgb"):
        return torch.from_numpy(to_rgb(components[..., :3]))
    if name.startswith("heat"):
        return torch.from_numpy(to_heat(components[..., component[0]]).copy())
    return components.flatten(0, 1)[:, : stored.shape[1]]


RUNNERS: dict[tuple[str, str], Callable[[dict, Path], None]] = {
    ("evaluation", "pca_maps"): run_pca_maps
}

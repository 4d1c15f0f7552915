"""Runner of the cases about images with masks: the squashed pair of the published patch probes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.parity.harness import Runner, check, load
from utils.data.segmentation_transforms import squash, squash_image


def seg_transforms(case: dict[str, Any], folder: Path) -> None:
    """Pixels and labels exactly, the normalised tensor closely."""
    stored, files = load(case, folder), case["files"]
    resolution, stride = case["args"]["resolution"], case["args"]["stride"]
    tolerance = {key: case["tolerance"][key] for key in ("atol", "rtol")}
    image = Image.open(folder / files["png"]).convert("RGB")
    mask = Image.open(folder / files["label_png"])
    assert mask.mode == case["args"]["label_mode"]
    normalised, label = squash(image, np.array(mask), resolution)
    pixels = torch.from_numpy(np.array(squash_image(image, resolution)))
    check("image", pixels, stored["out.image_u8"], 0, "exact")
    check("label", label, stored["out.label"], 0, "exact")
    strided = normalised[:, ::stride, ::stride]
    check("normalised", strided, stored["out.normalized_strided"], tolerance, "close")


RUNNERS: dict[tuple[str, str], Runner] = {("evaluation", "seg_transforms"): seg_transforms}

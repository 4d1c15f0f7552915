"""Runners of the cases about DeiT's evaluation and fine-tuning: transform, resampled positions."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.parity.harness import NotBuilt, Runner, check, load
from utils.data.transforms import deit_evaluation_transform
from vit.finetune import adapt_state
from vit.vision_transformer import VisionTransformer


def evaltf(case: dict[str, Any], folder: Path) -> None:
    """The tensor of an image, with and without the cropping that small inputs go without."""
    stored, args = load(case, folder), case["args"]
    transform = deit_evaluation_transform(
        input_size=args["input_size"], eval_crop_ratio=args["eval_crop_ratio"]
    )
    ours = transform(Image.fromarray(stored["in.image_uint8_hwc"].numpy()))
    check("tensor", ours, stored["out.tensor"], case["tolerance"], "floored")


def posft(case: dict[str, Any], folder: Path) -> None:
    """Positions of a checkpoint on the grid of a model for other images."""
    args, extra = case["args"], case["args"].get("extra_tokens", 0)
    if extra > 1:
        raise NotBuilt("a network with two tokens beside the patches")
    for dtype in (torch.float64, torch.float32):
        stored = load(case, folder, dtype)
        options: dict[str, Any] = {"embed_dim": args["dim"], "depth": 1, "num_heads": 1}
        options |= {"patch_size": 4, "num_classes": 3, "class_position": bool(extra)}
        old = VisionTransformer(img_size=4 * args["old_grid"], **options).to(dtype)
        new = VisionTransformer(img_size=4 * args["new_grid"], **options).to(dtype)
        state, _ = adapt_state(old.state_dict() | {"pos_embed": stored["in.pos_embed"]}, new)
        ours = state["pos_embed"]
        check("positions", ours, stored["out.pos_embed_new"], case["tolerance"], "floored")


RUNNERS: dict[tuple[str, str], Runner] = {
    ("recipes", "evaltf"): evaltf,
    ("recipes", "posft"): posft,
}

"""Runners of the cases about DeiT's evaluation and fine-tuning: transform, resampled positions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

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
    if extra > 2:
        raise NotBuilt(f"a network with {extra} tokens that have positions beside the patches")
    options: dict[str, Any] = {"embed_dim": args["dim"], "depth": 1, "num_heads": 1}
    options |= {"patch_size": 4, "num_classes": 3}
    make: Callable[..., nn.Module] = partial(
        VisionTransformer, class_position=bool(extra), **options
    )
    if extra == 2:  # of a class and a distillation token
        make = partial(timm.create_model, "deit_tiny_distilled_patch16_224", **options)
    for dtype in (torch.float64, torch.float32):
        stored = load(case, folder, dtype)
        old = make(img_size=4 * args["old_grid"]).to(dtype)
        new = make(img_size=4 * args["new_grid"]).to(dtype)
        state, _ = adapt_state(old.state_dict() | {"pos_embed": stored["in.pos_embed"]}, new)
        ours = state["pos_embed"]
        check("positions", ours, stored["out.pos_embed_new"], case["tolerance"], "floored")


RUNNERS: dict[tuple[str, str], Runner] = {
    ("recipes", "evaltf"): evaltf,
    ("recipes", "posft"): posft,
}

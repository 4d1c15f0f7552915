"""Small nets of every kind a probe must serve: an octic hybrid, a timm ViT, a torchvision ViT.

Each takes 32 x 32 images in patches of 8 (a grid of 4 x 4) and has 4 blocks of 64 channels. Tests
take them by `@any_backbone`, as the argument `backbone`, a config node; `make(backbone)` builds it.
"""

import json
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

from evaluation.nets import make_net

IMAGE_SIZE, PATCH_SIZE, EMBED_DIM, DEPTH = 32, 8, 64, 4
OURS = {
    "_partial_": True,
    "img_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "embed_dim": EMBED_DIM,
    "depth": DEPTH,
    "num_heads": 2,
}
BACKBONES: dict[str, dict[str, Any]] = {
    # The layer scale is raised: else the class token hardly looks at the image before training.
    "octic": {
        "_target_": "octic.models.hybrid_dinov2_vit_small_patch16",
        **OURS,
        "init_values": 1.0,
    },
    "timm": {
        "_target_": "vit.adapters.timm_backbone",
        "model_name": "vit_tiny_patch16_224",
        **OURS,
    },
    "torchvision": {
        "_target_": "evaluation.adapters.torchvision_backbone",
        "_partial_": True,
        "model_name": "vit_b_16",
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_dim": EMBED_DIM,
        "mlp_dim": 4 * EMBED_DIM,
        "num_layers": DEPTH,
        "num_heads": 2,
    },
}
# Smaller ones still: 16 x 16 images, two blocks.
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
TINY["init_values"] = 1.0  # else the class token hardly looks at the image before training
OCTIC = {"_target_": "octic.models.hybrid_dinov2_vit_small_patch16", "_partial_": True, **TINY}
PLAIN = {"_target_": "vit.models.dinov2_vit_small_patch16", "_partial_": True, **TINY}
TIMM = {
    "_target_": "vit.adapters.timm_backbone",
    "_partial_": True,
    "model_name": "vit_tiny_patch16_224",
    **TINY,
}
any_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)


def make(backbone: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """The net of a config node, with random weights, in eval mode."""
    return make_net(backbone, None, seed=seed)


def exported(node, folder):
    """A run folder with the weights of a node's net, and the state in it."""
    net = make_net(node, None, seed=1)
    file = folder / "exported/model.safetensors"
    file.parent.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, file, {"constructor": json.dumps(node)})
    return str(folder), state

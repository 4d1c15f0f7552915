"""Adapt networks that are neither ours nor timm's to Backbone: torchvision's ViTs, any callable.

Letters: B images, N patches, h w their grid, R registers, D channels.
"""

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from vit.backbone import Features, take_indices
from vit.vision_transformer import resample_grid

LOADER = "__model_loader__"
# Sizes that torchvision's named constructors fix and its class takes as arguments.
SIZES = ("patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")


class TorchvisionBackbone(nn.Module):
    """A Vision Transformer of torchvision, SWAG's among them, at any image size.

    weights: torchvision's name of released weights ("IMAGENET1K_SWAG_E2E_V1"), which it downloads;
    other keywords are torchvision's, sizes included. Positions are resampled to the images' grid.
    """

    def __init__(self, model_name: str, *, weights: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        from torchvision import models
        from torchvision.models.vision_transformer import VisionTransformer

        known = [name for name in models.list_models() if name.startswith("vit_")]
        if model_name not in known:
            raise ValueError(f"torchvision has no ViT {model_name!r}; known: {', '.join(known)}")
        sizes = [key for key in SIZES if key in kwargs]
        if sizes and weights is not None:
            raise ValueError(
                f"weights={weights} are of {model_name} with its own {sizes[0]}; leave out either"
            )
        if sizes:
            self.net = VisionTransformer(**{**_sizes_of(model_name), **kwargs})
        else:
            self.net = models.get_model(model_name, weights=weights, **kwargs)
        self.embed_dim = self.net.hidden_dim
        self.patch_size = self.net.patch_size
        self.in_chans = self.net.conv_proj.in_channels
        self.img_size = (self.net.image_size, self.net.image_size)
        self.depth = len(self.net.encoder.layers)
        # As in timm's nets; the evaluation of classifiers reads it.
        self.net.pretrained_cfg = {
            "classifier": "heads.head",
            "input_size": (3, *self.img_size),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B classes]."""
        return self.net.heads(self.features(images)[0].cls)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Features of the asked blocks after the final norm (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        encoder = self.net.encoder
        grid = self.net.conv_proj(images)
        height, width = grid.shape[-2:]
        cls = self.net.class_token.expand(grid.shape[0], -1, -1)
        x = torch.cat([cls, grid.flatten(2).mT], dim=1)
        x, kept = encoder.dropout(x + self._positions(height, width)), {}
        for index, block in enumerate(encoder.layers[: max(indices) + 1]):
            x = block(x)
            kept[index] = x
        normed = [encoder.ln(kept[index]) for index in indices]
        return [Features(x[:, 0], x[:, 1:].unflatten(1, (height, width))) for x in normed]

    def _positions(self, height: int, width: int) -> Tensor:
        positions, own = self.net.encoder.pos_embedding, self.img_size[0] // self.patch_size
        if (height, width) == (own, own):
            return positions
        grid = resample_grid(positions[:, 1:].unflatten(1, (own, own)), (height, width))
        return torch.cat([positions[:, :1], grid.flatten(1, 2)], dim=1)


class CallableBackbone(nn.Module):
    """Any module or function of images as a Backbone, depending on what it returns.

    It may return the triple of capi's encoders, (global [B D], registers [B R D] or None, map
    [B h w D]), or a plain [B D] without patches; or it may have DINOv2's `get_intermediate_layers`,
    the only way to get blocks other than the last. UserError for anything else.
    source: where the encoder is from, in words that identify it; stored features are told by it.
    """

    def __init__(
        self, encoder: Callable[..., Any], *, embed_dim: int, patch_size: int, source: str = ""
    ) -> None:
        super().__init__()
        self.net: Any = encoder
        self.source = source
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.in_chans = int(getattr(encoder, "in_chans", 3))

    def extra_repr(self) -> str:
        """Where the encoder is from; a plain function's repr, as it is no module to be shown."""
        return self.source or ("" if _is_net(self.net) else f"encoder={self.net!r}")

    def forward(self, images: Tensor) -> Any:
        """The encoder's own output."""
        return self.net(images)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Features of the asked blocks (Backbone contract)."""
        if hasattr(self.net, "get_intermediate_layers"):
            return self._of_blocks(images, layers)
        if any(layer != -1 for layer in layers):
            raise UserError(
                f"blocks {list(layers)} asked of an encoder that gives its last one only; a method "
                "get_intermediate_layers as DINOv2's would give them"
            )
        found = self.net(images)
        if isinstance(found, Tensor) and found.ndim == 2:
            return [Features(found, None)] * len(layers)
        if isinstance(found, tuple | list) and len(found) == 3 and found[2].ndim == 4:
            return [Features(found[0].flatten(1), found[2])] * len(layers)
        raise UserError(
            "the encoder must return (global [B D], registers or None, map [B h w D]) or [B D]; "
            f"got {_shapes(found)}"
        )

    def _of_blocks(self, images: Tensor, layers: Sequence[int]) -> list[Features]:
        depth = len(self.net.blocks) if hasattr(self.net, "blocks") else self.net.n_blocks
        indices = take_indices(layers, depth)
        grid = [side // self.patch_size for side in images.shape[-2:]]
        # DINOv2 returns blocks in ascending order, whatever order is asked for.
        ascending = sorted(set(indices))
        found = self.net.get_intermediate_layers(images, ascending, return_class_token=True)
        by_index = dict(zip(ascending, found, strict=True))
        return [
            Features(by_index[index][1], by_index[index][0].unflatten(1, grid)) for index in indices
        ]


def torchvision_backbone(model_name: str, **kwargs: Any) -> TorchvisionBackbone:
    """Build torchvision's ViT `model_name` as a Backbone (config target)."""
    return TorchvisionBackbone(model_name, **kwargs)


def encoder_from_file(
    path: str, *, arguments: dict[str, Any] | None = None, image_size: int = 224
) -> CallableBackbone:
    """The encoder that `__model_loader__(**arguments)` of a Python file returns (config target).

    The file is executed: it is the user's own code, as in capi. If the encoder has no `embed_dim`
    and `patch_size`, they are found by passing one image of `image_size` pixels a side.
    UserError for a file without the function, and if the function takes other arguments.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; it must define {LOADER}(**arguments)")
    spec = importlib.util.spec_from_file_location(f"encoder_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loader = getattr(module, LOADER, None)
    if not callable(loader):
        raise UserError(f"{path} defines no function {LOADER}(**arguments)")
    try:
        inspect.signature(loader).bind(**(arguments or {}))
    except TypeError as error:
        raise UserError(f"{path}: {LOADER}{inspect.signature(loader)}: {error}") from None
    encoder = loader(**(arguments or {}))
    embed_dim, patch_size = _ask(encoder, image_size)
    # The file's own code decides what a function computes, and modules of the same names, too.
    code = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    source = f"path={str(file.resolve())!r}, hash={code}, arguments={arguments or {}}"
    return CallableBackbone(encoder, embed_dim=embed_dim, patch_size=patch_size, source=source)


@torch.no_grad()
def _ask(encoder: Any, image_size: int) -> tuple[int, int]:
    """Width and patch size of an encoder: its own attributes, or found by passing one image."""
    patch_size, width = getattr(encoder, "patch_size", None), getattr(encoder, "embed_dim", None)
    if isinstance(patch_size, int) and isinstance(width, int):
        return width, patch_size
    device = next((p.device for p in encoder.parameters()), None) if _is_net(encoder) else None
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    if _is_net(encoder):
        encoder.eval()
    found = CallableBackbone(encoder, embed_dim=0, patch_size=patch_size or 1).features(images)[0]
    if found.patches is None:
        return found.cls.shape[-1], patch_size or image_size
    return found.cls.shape[-1], patch_size or image_size // found.patches.shape[1]


def _is_net(encoder: object) -> bool:
    return isinstance(encoder, nn.Module)


def _sizes_of(model_name: str) -> dict[str, Any]:
    """Constructor keywords of a named torchvision ViT, read off the net without its memory."""
    from torchvision import models

    with torch.device("meta"):
        net = models.get_model(model_name)
    layers = net.encoder.layers
    return {
        "image_size": net.image_size,
        "patch_size": net.patch_size,
        "num_layers": len(layers),
        "num_heads": layers[0].num_heads,
        "hidden_dim": net.hidden_dim,
        "mlp_dim": net.mlp_dim,
    }


def _shapes(found: Any) -> str:
    if isinstance(found, tuple | list):
        return f"({', '.join(_shapes(part) for part in found)})"
    return str([*found.shape]) if isinstance(found, Tensor) else type(found).__name__

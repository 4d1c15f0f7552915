"""Other people's networks as a Backbone."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from vit.backbone import Features
from vit.trunk import take_indices


class TimmBackbone(nn.Module):
    """Any timm network with `forward_intermediates`: ViTs, and CNNs by their pooled map."""

    def __init__(self, model_name: str, *, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if not timm.is_model(model_name):
            near = timm.list_models(f"*{model_name.split('_')[0]}*")[:5]
            raise ValueError(f"timm has no model {model_name!r}; near: {', '.join(near) or 'none'}")
        options = {"num_classes": 0, **_dynamic(model_name), **kwargs}
        self.net = timm.create_model(model_name, pretrained=pretrained, **options)
        if not hasattr(self.net, "forward_intermediates"):
            raise ValueError(f"timm's {model_name} has no forward_intermediates")
        self.embed_dim = self.net.num_features
        self.patch_size = self.net.feature_info[-1]["reduction"]
        self.depth = len(self.net.feature_info)

    def forward(self, images: Tensor) -> Tensor:
        """The network's own output."""
        return self.net(images)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks; a CNN's class token is its mean feature."""
        indices = take_indices(layers, self.depth)
        prefix = getattr(self.net, "num_prefix_tokens", 0)
        options = {"return_prefix_tokens": True} if prefix else {}
        if hasattr(self.net, "blocks"):
            options["norm"] = True
        found = self.net.forward_intermediates(
            images, indices=indices, intermediates_only=True, **options
        )
        return [self._features(entry, prefix) for entry in found]

    def _features(self, entry: Any, prefix: int) -> Features:
        maps, tokens = entry if prefix else (entry, None)
        if tokens is not None and getattr(self.net, "has_class_token", True):
            cls = tokens[:, 0]
        else:
            cls = maps.mean(dim=(2, 3))
        return Features(cls=cls, patches=maps.permute(0, 2, 3, 1))


def _dynamic(model_name: str) -> dict[str, Any]:
    """ViTs of timm take other image sizes when told so."""
    return {"dynamic_img_size": True} if model_name.startswith(("vit_", "deit")) else {}


def timm_backbone(model_name: str, **kwargs: Any) -> TimmBackbone:
    """Build timm's `model_name` as a Backbone (config target)."""
    return TimmBackbone(model_name, **kwargs)

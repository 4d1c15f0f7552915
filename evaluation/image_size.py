"""The image size that a net is shown, where a config does not set it: its own, or the published."""

from typing import Any

from timm.models import get_pretrained_cfg

from vit.backbone import Backbone

PUBLISHED = 224  # the crop of the published probes, for nets that take images of any size
RESIZED = 256  # their shorter side before it


def settle_sizes(
    net: Backbone, resize_size: int | None, crop_size: int | None, *, margin: bool = True
) -> tuple[int, int]:
    """Shorter side and central crop in pixels; None stands for the net's own size.

    Then the crop is that of `probed_at`, and the shorter side is 256 / 224 of the
    crop, rounded down as in DeiT; without a `margin` it equals the crop.
    """
    crop = crop_size or probed_at(net)
    return resize_size or (crop * RESIZED // PUBLISHED if margin else crop), crop


def probed_at(net: Backbone) -> int:
    """Side of the images that probes show a net: 224 if it takes any size, else its own."""
    net = getattr(net, "model", net)  # the inner net of one made invariant over its copies
    inner = getattr(net, "net", net)
    if size := _stated(net, inner):
        return size
    embed = getattr(inner, "patch_embed", None)
    built = _stated(embed)
    # timm's ViTs take any size here, unless they were built for another than their registered one.
    if built and (getattr(embed, "strict_img_size", False) or _usual(inner) != built):
        return built
    return PUBLISHED


def image_size_of(net: Backbone) -> int:
    """Side of the images that a net was built for, or registered with; 224 if it does not say."""
    inner = getattr(net, "net", net)
    return _stated(net, inner, getattr(inner, "patch_embed", None)) or _registered(inner)


def _stated(*owners: object) -> int | None:
    for owner in owners:
        if size := getattr(owner, "img_size", None):
            return int(size if isinstance(size, int) else size[0])
    return None


def _registered(inner: object) -> int:
    return int(_description(inner).get("input_size", (PUBLISHED,))[-1])


def _usual(inner: object) -> int:
    """The size of timm's own net of that name: one read from a folder describes itself instead."""
    said = _description(inner)
    name = ".".join(filter(None, (said.get("architecture"), said.get("tag"))))
    usual = get_pretrained_cfg(name) if name else None
    return int(usual.input_size[-1]) if usual else _registered(inner)


def _description(inner: object) -> dict[str, Any]:
    return getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None) or {}

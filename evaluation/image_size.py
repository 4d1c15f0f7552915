"""The image size that a frozen net is evaluated at, if a probe's config does not set it."""

from vit.backbone import Backbone

PUBLISHED = 224  # the crop of the published probes, for nets that take images of any size
RESIZED = 256  # their shorter side before it


def settle_sizes(
    net: Backbone, resize_size: int | None, crop_size: int | None, *, margin: bool = True
) -> tuple[int, int]:
    """Shorter side and central crop in pixels; None stands for the net's own size.

    Then the crop is the size that the net was built for, and the shorter side is 256 / 224 of the
    crop, rounded down as in DeiT; without a `margin` it equals the crop.
    """
    crop = crop_size or built_for(net)
    return resize_size or (crop * RESIZED // PUBLISHED if margin else crop), crop


def built_for(net: Backbone) -> int:
    """Side of the images that a net was built for; 224 if it takes any size or does not say."""
    net = getattr(net, "model", net)  # the inner net of one made invariant over its copies
    inner = getattr(net, "net", net)
    for part in (net, inner):
        size = getattr(part, "img_size", None)
        if size:
            return int(size if isinstance(size, int) else size[0])
    embed = getattr(inner, "patch_embed", None)
    built = getattr(embed, "img_size", None)
    registered = (getattr(inner, "pretrained_cfg", None) or {}).get("input_size", (PUBLISHED,))
    # timm's ViTs take any size here, unless they were built for another than their registered one.
    if built and (getattr(embed, "strict_img_size", False) or registered[-1] != built[0]):
        return int(built[0])
    return PUBLISHED

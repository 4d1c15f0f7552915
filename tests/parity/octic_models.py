"""Runners of whole models of the parity topic `octic`: the classes of DeiT III and of DINOv2."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from octic.vision_transformer import OcticVisionTransformer
from tests.parity.octic_case import Case

# What both published classes honour; the DINOv2 one ignores in_chans and octic_equi_break_layer.
MODEL_ARGS = (
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_register_tokens",
    "invariant",
)


def model(c: Case, more: tuple[str, ...] = (), **extra: Any) -> nn.Module:
    options = {key: c.args[key] for key in (*MODEL_ARGS, *more) if key in c.args}
    return c.loaded(OcticVisionTransformer(**options, **extra))


def deit(c: Case) -> None:
    args = c.args
    pooled, scale = args.get("global_pool", False), args.get("init_scale", 1e-4)
    if "Layer_scale" in str(args.get("octic_block_layers")):
        scale = scale or 1e-4  # those blocks scale even by 0; the stored scale is loaded
    net = model(
        c,
        ("in_chans", "octic_equi_break_layer"),
        num_classes=args.get("num_classes", 1000),
        qkv_bias=args.get("qkv_bias", False),
        class_token=not pooled,
        global_pool="avg" if pooled else "token",
        init_values=scale,
    )
    for size in [key for key in c.tensors if key.startswith("out.logits_")]:
        c.check(size, net(c.tensor("in.img_" + size.removeprefix("out.logits_"))))
    if c.has("in.img"):
        features = net.pool(net.forward_features(c.leaf("img")))
        logits = net.head(features)
        c.check("out.features", features)
        c.check("out.logits", logits)
        c.check_gradients(logits.pow(2).mean(), net)


def dino(c: Case) -> None:
    net = model(c, num_classes=0, mask_token=True, cls_token_std=1e-6, init_values=1e-4)
    if c.has("in.crop0"):
        count = sum(key.startswith("in.crop") for key in c.tensors)
        crops = [c.leaf(f"crop{i}") for i in range(count)]
        masks = [c.tensors.get(f"in.mask{i}") for i in range(len(crops))]
        outputs = net.encode(crops, masks)
        for i, encoded in enumerate(outputs):
            check_encoded(c, f"out.crop{i}", encoded)
    else:
        outputs = net.encode([c.leaf("img")], [c.tensors.get("in.masks")])
        check_encoded(c, "out.train", outputs[0])
    for name in [key for key in c.tensors if key.startswith("in.img_")]:
        size = name.removeprefix("in.img_")
        if c.has(f"out.train_{size}"):
            check_encoded(c, f"out.train_{size}", net.encode([c.tensor(name)])[0])
    if c.has("out.cls"):
        c.check("out.cls", net(c.tensor("in.img")))
    for name in list(intermediate_names(c)):
        check_intermediate(c, net, name)
    loss = sum(e.cls.pow(2).mean() + e.patches.pow(2).mean() for e in outputs)
    c.check_gradients(loss, net)


def check_encoded(c: Case, name: str, encoded: Any) -> None:
    parts = {
        "x_norm_clstoken": encoded.cls,
        "x_norm_regtokens": encoded.registers,
        "x_norm_patchtokens": encoded.patches,
        "x_prenorm": encoded.prenorm,
    }
    for key, value in parts.items():
        if c.has(f"{name}.{key}"):
            c.check(f"{name}.{key}", value)


def intermediate_names(c: Case) -> Iterator[str]:
    yield from sorted({key.split(".")[1] for key in c.tensors if key.startswith("out.gil_")})


def check_intermediate(c: Case, net: nn.Module, name: str) -> None:
    parts = name.removeprefix("gil_").split("_")
    which = parts[0]
    n = int(which[1:]) if which.startswith("n") else [int(i) for i in which[3:].split("-")]
    reshape = "reshape" in parts
    size = next((part for part in parts if "x" in part and part[0].isdigit()), None)
    images = c.tensor(f"in.img_{size}" if size else "in.img")
    found = net.get_intermediate_layers(
        images, n, reshape=reshape, return_class_token=True, norm="norm0" not in parts
    )
    for j, (patches, cls) in enumerate(found):
        if reshape:
            c.check(f"out.{name}.{j}", patches)
            continue
        c.check(f"out.{name}.{j}.patch", patches)
        c.check(f"out.{name}.{j}.cls", cls)

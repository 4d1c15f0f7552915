"""Runners of the parity topic `posthoc`: copies, aggregators, the small ViT, and all together."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.posthoc.groups import CopyGroup, group_name
from baselines.posthoc.symmetrized import Symmetrized
from baselines.posthoc.vision_transformer import SmallVisionTransformer
from tests.parity.harness import check, check_gradients, load, strip
from tests.published_names import published_posthoc_name
from utils.symmetry import transform_image
from vit.weights import load_state

DTYPES = {"rel_float64": torch.float64, "rel_float32": torch.float32}


def transforms(case: dict[str, Any], folder: Path) -> None:
    """Copies of a batch, pixel by pixel."""
    for dtype in DTYPES.values():
        tensors = load(case, folder, dtype)
        ours = published_group(case["ctor"], tensors["in.x"]).all_copies(tensors["in.x"])
        check("transforms", ours, tensors["out.transforms"], case["tolerance"]["atol"], "absolute")


def aggregate(case: dict[str, Any], folder: Path) -> None:
    """Copies of embeddings or logits to logits, with the loss and all gradients."""
    for key, dtype in DTYPES.items():
        tensors, tol = load(case, folder, dtype), case["tolerance"][key]
        net = Symmetrized(
            Headed(case["ctor"]),
            f"C{case['ctor']['n_transforms']}",
            case["ctor"]["aggregator"],
            form="published",
            aggregator_options=options_of(case["ctor"]),
        ).to(dtype)
        state = strip(tensors, "state.")
        # A case on logits stores no head: none is asked.
        on_logits = net.aggregator.level == "logit"
        if not on_logits:
            load_state(net, state)
        else:
            assert not state or all(name.startswith("model.") for name in state)
        net.eval()
        z = tensors["in.x"].requires_grad_()
        logits = net.aggregator(z) if on_logits else net.aggregate(z)
        loss = F.cross_entropy(logits, tensors["in.target"])
        loss.backward()
        found = {"logits": logits, "loss": loss.reshape(1)}
        for name, stored in strip(tensors, "out.").items():
            check(name, found[name], stored, tol)
        gradients = {
            published_posthoc_name(name, case["ctor"]["aggregator"]): parameter.grad
            for name, parameter in net.named_parameters()
        }
        check_gradients({"x": z.grad, **gradients}, strip(tensors, "grad."), tol)


def backbone(case: dict[str, Any], folder: Path) -> None:
    """The small ViT alone: patches, embedding, logits."""
    for key, dtype in DTYPES.items():
        tensors, tol = load(case, folder, dtype), case["tolerance"][key]
        net = small_vit(case["ctor"], tensors["in.x"]).to(dtype).eval()
        load_state(net, strip(tensors, "state."))
        images = tensors["in.x"].requires_grad_("grad.x" in tensors)
        found = {
            "out.logits": net(images),
            "out.embedding": net(images, output_cls=True),
            "out.patches": net.patches(images),
        }
        for name in (name for name in tensors if name.startswith("out.")):
            check(name, found[name], tensors[name], tol)
        check_training(net, found["out.logits"], tensors, tol)


def pipeline(case: dict[str, Any], folder: Path) -> None:
    """Images through copies, small ViT and aggregator to logits, which stay under the group."""
    ctor = case["ctor"]
    for key, dtype in DTYPES.items():
        tensors, tol = load(case, folder, dtype), case["tolerance"][key]
        images = tensors["in.x"].requires_grad_("grad.x" in tensors)
        net = Symmetrized(
            small_vit(ctor["backbone"], images),
            group_name(ctor["n_rotations"], ctor["flips"]),
            ctor["aggregator"],
            form="published",
            interpolation="nearest",
            rectangular=rectangular_of(images),
            trained=trained_of(ctor),
            aggregator_options=options_of(ctor),
        ).to(dtype)
        load_state(net, strip(tensors, "state."))
        net.eval()
        if "in.transforms" in tensors:
            check(
                "in.transforms", net.group.all_copies(images), tensors["in.transforms"], 0, "exact"
            )
        z = net.embeddings(images)
        if net.aggregator.level == "logit":
            seen = net.split.head(net.model, z.flatten(0, 1)).unflatten(0, z.shape[:2])
        else:
            seen = z
        logits = net(images)
        if "out.embeddings" in tensors:
            check("out.embeddings", seen, tensors["out.embeddings"], tol)
        check("out.logits", logits, tensors["out.logits"], tol)
        check_training(net, logits, tensors, tol, ctor["aggregator"])
        if case.get("invariant_to") in ("D4", "C4"):
            for element in net.group.elements:
                check(element.name, net(transform_image(images, element.name)), logits, 10 * tol)


def check_training(
    net: nn.Module, logits: Tensor, tensors: dict[str, Tensor], tol: float, aggregator: str = "mean"
) -> None:
    """Gradients of the cross entropy, where a case has them; what it has none of is frozen."""
    stored = strip(tensors, "grad.")
    if not stored:
        return
    F.cross_entropy(logits, tensors["in.target"]).backward()
    ours = {
        published_posthoc_name(name, aggregator): parameter.grad
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }
    assert ours.keys() == stored.keys() - {"x"}, f"trained: {sorted(ours.keys() ^ stored.keys())}"
    check_gradients({"x": tensors["in.x"].grad, **ours}, stored, tol)


class Headed(nn.Module):
    """What a case on embeddings has of a backbone: the published head."""

    def __init__(self, ctor: dict[str, Any]) -> None:
        super().__init__()
        linear = nn.Linear(ctor["dim"], ctor["classes"])
        norm = [nn.LayerNorm(ctor["dim"])] if ctor["head"] == "norm_linear" else []
        self.mlp_head = nn.Sequential(*norm, linear)

    def forward(self, x: Tensor, output_cls: bool = False) -> Tensor:
        """Embeddings as they are, or their logits."""
        return x if output_cls else self.mlp_head(x)


def published_group(ctor: dict[str, Any], images: Tensor) -> CopyGroup:
    name = group_name(ctor.get("n_rotations", 4), ctor.get("flips", True))
    return CopyGroup(name, interpolation="nearest", rectangular=rectangular_of(images))


def rectangular_of(images: Tensor) -> str:
    return "refuse" if images.shape[-2] == images.shape[-1] else "crop"


def options_of(ctor: dict[str, Any]) -> dict[str, Any]:
    """What a learned aggregator was built with; attention reads no dropout or hidden_dim."""
    words = ctor.get("aggregation", {})
    return {key: words[key] for key in ("num_heads", "num_layers") if key in words}


def trained_of(ctor: dict[str, Any]) -> str:
    """What the published options train; all where a case names none of them."""
    if not ctor.keys() & {"finetune_model", "finetune_mlp_head"} or ctor.get("finetune_model"):
        return "all"
    if ctor.get("finetune_mlp_head"):
        return "head"
    return "aggregator" if ctor["aggregator"].startswith("learned") else "none"


def small_vit(ctor: dict[str, Any], images: Tensor) -> nn.Module:
    side = math.isqrt(ctor["num_patches"]) * ctor["patch_size"]
    return SmallVisionTransformer(
        img_size=side,
        patch_size=ctor["patch_size"],
        in_chans=ctor["num_channels"],
        num_classes=ctor["num_classes"],
        embed_dim=ctor["embed_dim"],
        hidden_dim=ctor["hidden_dim"],
        depth=ctor["num_layers"],
        num_heads=ctor["num_heads"],
        drop_rate=ctor.get("dropout", 0.0),
        num_patches=ctor["num_patches"],
    )


RUNNERS = {
    ("posthoc", "transforms"): transforms,
    ("posthoc", "aggregate"): aggregate,
    ("posthoc", "backbone"): backbone,
    ("posthoc", "pipeline"): pipeline,
}

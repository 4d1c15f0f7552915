"""Complete DINOv2 training steps of the stored cases: our recipe, optimiser and clipping."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import octic.models
import vit.models
from dinov2.crops import MultiCrop
from dinov2.masking import padded_mask_rows
from dinov2.recipe import DINOv2
from tests.parity.harness import NotBuilt, check, load, strip
from tests.published_names import published_vit_name
from utils.optimizers import apply_schedules, clip_parts, make_optimizer
from vit.keys import from_published

CONSTRUCTORS = {
    "hybrid": octic.models.hybrid_dinov2_vit_small_patch16,
    "invariant": octic.models.d8_inv_early_dinov2_vit_small_patch16,
    "plain": vit.models.dinov2_vit_small_patch16,
}
FIXED = {"ffn_layer": "mlp", "proj_bias": True, "ffn_bias": True}  # of the plain family
UNUSED = ("family", "block_chunks", *FIXED)
# What the published octic class takes and does not read.
UNREAD_BY_OCTIC = (
    *("in_chans", "qkv_bias", "init_values", "layerscale", "octic_equi_break_layer"),
    *("drop_path_uniform", "interpolate_offset", "interpolate_antialias"),
)
SPELLING = {
    "interpolate_offset": "position_offset",
    "interpolate_antialias": "position_antialias",
    "layerscale": "init_values",
}
LOSSES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")


def has_qkv_bias(names: Collection[str]) -> bool:
    """Whether a stored network, octic or plain, has a bias there."""
    return any(name.endswith(("attn.qkv.bias", "attn.qkv.lin_A1.bias")) for name in names)


def completed(model: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The options of a case's network; what they leave out as the stored names have it."""
    return {
        "qkv_bias": has_qkv_bias(names),
        "init_values": 1e-5 if any(".ls1." in name for name in names) else None,
        "block_chunks": int(any(name.partition("blocks.")[2][:4] == "0.0." for name in names)),
    } | model


def make_backbone(model: dict[str, Any], **overrides: Any) -> nn.Module:
    """The network of a case."""
    changed = {k: v for k, v in model.items() if k in FIXED and v != FIXED[k]}
    if model["family"] == "plain" and changed:
        raise NotBuilt(f"a plain ViT with {changed}")
    unused = UNUSED if model["family"] == "plain" else (*UNUSED, *UNREAD_BY_OCTIC)
    keywords = {SPELLING.get(k, k): v for k, v in model.items() if k not in unused}
    return CONSTRUCTORS[model["family"]](**keywords | overrides)


def run_ssl(case: dict[str, Any], folder: Path) -> None:
    """Two steps: losses, all gradients of the first, student and teacher after the last."""
    for dtype in (torch.float64, torch.float32):
        data = load(case, folder, dtype)
        args = case["args"] | {"model": completed(case["args"]["model"], data)}
        ours = train_steps(args, data, dtype)
        for name in data:
            if name.startswith("out."):
                kind = "tolerance" if ".grad." in name else "tolerance_non_grad"
                check(f"{dtype} {name}", ours[name], data[name], case[kind], "floored")


def train_steps(
    args: dict[str, Any], data: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run the steps of a case; returns everything that it stores."""
    recipe = make_recipe(args).to(dtype)
    load_states(recipe, data)
    set_schedules(recipe, args["schedule"])
    optim = args["cfg"].get("optim", {})
    betas = optim.get("adamw_beta1", 0.9), optim.get("adamw_beta2", 0.999)
    optimizer = make_optimizer(
        lambda groups: torch.optim.AdamW(groups, betas=betas, eps=1e-8),
        recipe.param_groups(),
        recipe,
    )
    ours: dict[str, Tensor] = {}
    for step in range(args["steps"]):
        batch = make_batch(data, step, args["upperbound"][step])
        apply_schedules(optimizer, recipe.schedules, step)
        if step == args["steps"] - 1:
            ours["out.dino_loss.center_used_last"] = recipe.dino_targets.ema.center.clone()[None]
            ours["out.ibot_patch_loss.center_used_last"] = recipe.ibot_targets.ema.center.clone()[
                None, None
            ]
        if step == 0:
            ours |= encoded_tokens(recipe, batch, data["batch.0.mask_indices_list"])
        optimizer.zero_grad(set_to_none=True)
        losses = recipe.losses(batch, step)
        losses["loss"].backward()
        ours |= {f"out.{step}.{name}": losses[name] for name in LOSSES}
        ours[f"out.{step}.optimised_total"] = losses["loss"]
        if step == 0:
            ours |= {
                f"out.0.grad.{name}": p.grad.clone()
                for name, p in published_parameters(recipe.student, args["model"])
                if p.grad is not None
            }
        norms = clip_parts(
            recipe.clipped_parts(), args["cfg"].get("optim", {}).get("clip_grad", 3.0)
        )
        ours |= {f"out.{step}.grad_norm.{name}": norm for name, norm in norms.items()}
        optimizer.step()
        recipe.after_step(step)
    for kind in ("student", "teacher"):
        for name, parameter in published_parameters(getattr(recipe, kind), args["model"]):
            ours[f"out.{kind}_after.{name}"] = parameter
    return ours


def make_recipe(args: dict[str, Any]) -> DINOv2:
    """Our recipe with the options of a case."""
    cfg = args["cfg"]
    dino, ibot, crops = cfg.get("dino", {}), cfg.get("ibot", {}), cfg.get("crops", {})
    optim = cfg.get("optim", {})
    return DINOv2(
        backbone=lambda **keywords: make_backbone(args["model"], **keywords),
        dataset=range(8),
        batch_size_per_gpu=args["batch"],
        drop_path_rate=None,
        dino_loss_weight=dino.get("loss_weight", 1.0),
        koleo_loss_weight=dino.get("koleo_loss_weight", 0.1),
        ibot_loss_weight=ibot.get("loss_weight", 1.0),
        centering=cfg.get("train", {}).get("centering", "centering"),
        separate_head=ibot.get("separate_head", False),
        dino_head=head_keywords(dino),
        ibot_head=head_keywords(ibot),
        layerwise_decay=optim.get("layerwise_decay", 0.9),
        patch_embed_lr_multiplier=optim.get("patch_embed_lr_mult", 0.2),
        published_param_groups=True,
        crops=MultiCrop(
            global_crops_size=crops.get("global_crops_size", 224),
            local_crops_size=crops.get("local_crops_size", 96),
            local_crops_number=crops.get("local_crops_number", 8),
            blur_kernel_size=1,  # batches come augmented, of crops too small for the usual one
        ),
    )


def head_keywords(cfg: dict[str, Any]) -> dict[str, int]:
    """Our spelling of a head's options."""
    names = {
        "head_n_prototypes": "num_prototypes",
        "head_hidden_dim": "hidden_dim",
        "head_bottleneck_dim": "bottleneck_dim",
        "head_nlayers": "num_layers",
    }
    return {names[key]: value for key, value in cfg.items() if key in names}


def load_states(recipe: DINOv2, data: dict[str, Tensor]) -> None:
    """Stored student, teacher and centres, by their published names."""
    for kind in ("student", "teacher"):
        for name, part in getattr(recipe, kind).items():
            state = strip(data, f"state.{kind}.{name}.")
            part.load_state_dict(from_published(state, part) if name == "backbone" else state)
    if "state.dino_loss.center" in data:
        recipe.dino_targets.ema.center.copy_(data["state.dino_loss.center"].flatten())
    if "state.ibot_patch_loss.center" in data:
        recipe.ibot_targets.ema.center.copy_(data["state.ibot_patch_loss.center"].flatten())


def set_schedules(recipe: DINOv2, table: list[dict[str, float]]) -> None:
    """Values step by step instead of functions."""
    names = {"wd": "weight_decay"}
    recipe.schedules = {
        names.get(name, name): lambda step, name=name: table[step][name] for name in table[0]
    }


def make_batch(data: dict[str, Tensor], step: int, upperbound: int) -> dict[str, Tensor]:
    """A stored batch as our collation gives it."""
    stored = strip(data, f"batch.{step}.collated_")
    batch = stored | padded_mask_rows(stored["masks"], upperbound)
    num_masked = len(data[f"batch.{step}.mask_indices_list"])
    assert torch.equal(batch["mask_indices"][:num_masked], data[f"batch.{step}.mask_indices_list"])
    batch["mask_weights"] = batch["mask_weights"].to(stored["global_crops"].dtype)
    return batch


@torch.no_grad()
def encoded_tokens(
    recipe: DINOv2, batch: dict[str, Tensor], mask_indices: Tensor
) -> dict[str, Tensor]:
    """The tokens that go into the heads."""
    crops, masks = [batch["global_crops"]], [batch["masks"]]
    if "local_crops" in batch:
        crops, masks = [*crops, batch["local_crops"]], [*masks, None]
    student = recipe.student["backbone"].encode(crops, masks)
    teacher = recipe.teacher["backbone"].encode([batch["global_crops"]])[0]
    tokens = {
        "out.0.student_global_cls": student[0].cls,
        "out.0.teacher_global_cls": teacher.cls,
        "out.0.teacher_masked_patch_tokens": teacher.patches.flatten(0, 1)[mask_indices],
    }
    if "local_crops" in batch:
        tokens["out.0.student_local_cls"] = student[1].cls
    return tokens


def published_name(name: str, model: dict[str, Any]) -> str:
    """The published name of a backbone's parameter: blocks.<chunk>.<index> where chunked."""
    chunks = model.get("block_chunks", 0) if model["family"] == "plain" else 0
    if chunks and name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        name = f"blocks.{int(index) // (model['depth'] // chunks)}.{index}.{rest}"
    return published_vit_name(name, octic=model["family"] != "plain")


def published_parameters(
    parts: nn.ModuleDict, model: dict[str, Any]
) -> list[tuple[str, nn.Parameter]]:
    """Parameters of a student or teacher by published names."""
    return [
        (f"{part}.{published_name(name, model) if part == 'backbone' else name}", parameter)
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    ]

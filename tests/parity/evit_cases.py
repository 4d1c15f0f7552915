"""Runners of the parity topic `evit`: attention, blocks, whole networks and the helpers."""

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.evit.block import EViTAttention, EViTBlock
from baselines.evit.network import EViT
from baselines.evit.reorganisation import patch_indices, patch_mask, tokens_to_keep
from baselines.evit.schedule import Shrink
from baselines.selection import keep_tokens
from evaluation.pictures.token_mask import masked
from tests.parity import dhvt_cases
from tests.parity.harness import NotBuilt, check, load, strip
from vit.weights import load_state


def attention(case: dict[str, Any], folder: Path) -> None:
    """Attention and what it keeps; the published layer decides how many by itself."""
    options = {"qkv_bias": False, **case["kwargs"]}
    own = options.pop("keep_rate", 1.0)
    module = EViTAttention(options.pop("dim"), **_known(options))
    tensors = _ready(case, folder, module)
    number, count = _number(case, own, tensors["in.0"].shape[1] - 1)
    out, kept, importance = module.select(tensors["in.0"], number)
    found = {"out.0": out, "out.1": kept, "out.2": importance, "out.3": count}
    _compare(case, tensors, found, module)


def block(case: dict[str, Any], folder: Path) -> None:
    """A block: tokens that are left, how many, and which."""
    options = {"qkv_bias": False, "norm_eps": 1e-5, **case["kwargs"]}
    own = options.pop("keep_rate", 1.0)
    module = EViTBlock(options.pop("dim"), **_known(options))
    tensors = _ready(case, folder, module)
    number, _ = _number(case, own, tensors["in.0"].shape[1] - 1)
    out, kept, _ = module(tensors["in.0"], number)
    found = {"out.0": out, "out.1": out.shape[1] - 1, "out.2": kept}
    _compare(case, tensors, found, module)


def layer(case: dict[str, Any], folder: Path) -> None:
    """Attention or block, by the published class; other layers are those of DHVT's code."""
    runners = {"Attention": attention, "Block": block}
    runners.get(case["reference"]["class"], dhvt_cases.layer)(case, folder)


def model(case: dict[str, Any], folder: Path) -> None:
    """A network: logits, what each dropping block kept, tokens after each block."""
    options = _known(case["kwargs"])
    if isinstance(options.get("patch_size"), list):
        side, other = options["patch_size"]
        if side != other:
            raise NotBuilt("oblong patches")
        options["patch_size"] = side
    net = EViT(exact_counts=False, **options)
    tensors = _ready(case, folder, net)
    images, called = tensors["in.0"], _called(case)
    called.pop("get_idx")
    logits, indices = net(images, get_idx=True, **called)
    grid = net.grid_of(images)
    counts = torch.tensor(net.token_counts(grid[0] * grid[1], **called))
    found = {"out.0": logits, "out.2": counts}
    found |= {f"out.1.{number}": kept for number, kept in enumerate(indices)}
    _compare(case, tensors, found, net)


def helper(case: dict[str, Any], folder: Path) -> None:
    """Indices and pictures."""
    tensors, kwargs = load(case, folder), case["kwargs"]
    name = case["reference"]["class"]
    if name == "complement_idx":
        check("out", dropped_tokens(tensors["in.0"], kwargs["dim"]), tensors["out"], 0, "exact")
    elif name == "mask":
        images, size = tensors["in.0"], kwargs["patch_size"]
        grid = (images.shape[-2] // size, images.shape[-1] // size)
        kept = patch_mask(tensors["in.1"], grid)
        check("out", masked(images, kept), tensors["out"], case["tolerance"], "close")
    elif name == "get_real_idx":
        given = [tensors[f"in.{i}"] for i in range(len(strip(tensors, "in.")))]
        for number, found in enumerate(patch_indices(given, fuse=kwargs["fuse_token"])):
            # A fused token is no patch; the published helper calls it patch 0.
            check(f"out.{number}", found.clamp(min=0), tensors[f"out.{number}"], 0, "exact")
    elif name == "get_deeper_idx":
        found = patch_indices([tensors["in.0"], tensors["in.1"]], fuse=False)[1]
        check("out", found, tensors["out"], 0, "exact")
    else:
        raise NotBuilt(f"no helper {name}")


def dropped_tokens(kept: Tensor, count: int) -> Tensor:
    """Which of `count` tokens the fused one is made of, beside `kept` [... k]: [... count-k]."""
    rows = kept.flatten(0, -2) if kept.ndim > 1 else kept[None]
    ones = torch.ones(len(rows), count)
    fused = keep_tokens(ones.diag_embed(), rows, ones, num_prefix=0, fuse=True)[:, -1]
    found = fused.nonzero()[:, 1].unflatten(0, (len(rows), -1))
    return found.reshape(*kept.shape[:-1], -1)


def table(case: dict[str, Any], folder: Path) -> None:
    """The keep rate of steps of trainings."""
    for row in case["rows"]:
        start = row["warmup_epochs"]
        # One that is to end before it begins is over where it begins.
        epochs = max(row["total_epochs"] - start, 0)
        shrink = Shrink(start_epoch=start, epochs=epochs, highest=row.get("max_keep_rate", 1))
        rate = shrink.rate_at(row["base_keep_rate"], row["iters"], row["ITERS_PER_EPOCH"])
        check(f"{row}", rate, row["keep_rate"], 1e-12, "absolute")


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Published keywords as ours."""
    unread = ("proj_drop", "drop", "weight_init", "act_layer", "norm_layer", "embed_layer")
    names = {"drop_path": "drop_path_rate"}
    return {names.get(key, key): value for key, value in options.items() if key not in unread}


def _called(case: dict[str, Any]) -> dict[str, Any]:
    """keep_rate, tokens and get_idx of a case's call, `m(in.0, keep_rate=0.5) -> ...`."""
    text = case["call"].split("->")[0].strip().replace("in.0", "x")
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    found = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    given = [ast.literal_eval(value) for value in call.args[1:]]
    defaults = {"keep_rate": None, "tokens": None, "get_idx": False}
    return {**defaults, **dict(zip(defaults, given, strict=False)), **found}


def _number(case: dict[str, Any], own: float, count: int) -> tuple[int | None, int]:
    """How many tokens a layer keeps: for us (None: all), and as the published layer tells it."""
    called = _called(case)
    kept = tokens_to_keep(count, own, called["keep_rate"], called["tokens"], exact=False)
    return (kept if kept < count else None), kept


def _ready(case: dict[str, Any], folder: Path, module: torch.nn.Module) -> dict[str, Tensor]:
    tensors = load(case, folder)
    load_state(module, strip(tensors, "state."))
    module.train(case["mode"] == "train")
    if case["grad"]:
        tensors["in.0"].requires_grad_()
    return tensors


def _compare(
    case: dict[str, Any], tensors: dict[str, Tensor], found: dict[str, Any], module: Any
) -> None:
    stored = {name: value for name, value in tensors.items() if name.startswith("out")}
    given = {name for name, value in found.items() if value is not None}
    if case["reference"]["class"] != "Attention" and not _called(case)["get_idx"]:
        unasked = "out.2" if case["reference"]["class"] == "Block" else "out.1."
        given = {name for name in given if not name.startswith(unasked)}
    assert given == set(stored), f"{sorted(given)} where {sorted(stored)} are stored"
    for name, value in stored.items():
        exact = not value.is_floating_point()
        check(name, found[name], value, case["tolerance"], "exact" if exact else "close")
    if not case["grad"]:
        return
    pairs = [(found[f"out.{n}"], value) for n, value in strip(tensors, "cot.").items()]
    sum((ours * theirs).sum() for ours, theirs in pairs).backward()
    gradients = {"grad_in.0": tensors["in.0"].grad}
    gradients |= {f"grad_state.{name}": p.grad for name, p in module.named_parameters()}
    rule = case["grad_tolerance"]
    for name in (name for name in tensors if name.startswith("grad_")):
        bound = rule["rel"] * max(float(tensors[name].abs().max()), rule["floor"])
        check(name, gradients[name], tensors[name], bound, "absolute")


RUNNERS = {
    ("evit", "layer"): layer,
    ("evit", "model"): model,
    ("evit", "helper"): helper,
    ("evit", "table"): table,
}

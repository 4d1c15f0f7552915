"""Runners of the parity topic `token_reduction`: SWAG's ViT, seven reductions, and their parts."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from baselines.token_reduction.act import ClusteredAttention, cluster_counts, clustered_attention
from baselines.token_reduction.clustering import (
    cluster_grid,
    cluster_tokens,
    initial_labels,
    nearest_clusters,
    reconstruct_tokens,
)
from baselines.token_reduction.reduced import Inspection, Reduced
from baselines.token_reduction.smyrf import sort_by_hash, straddling_attention
from baselines.token_reduction.swag import SwagVisionTransformer
from baselines.token_reduction.tome import (
    match_bipartite,
    match_every_kth,
    merge,
    merge_weighted,
    unmerge,
)
from tests.parity.harness import NotBuilt, check, load
from tests.parity.token_reduction_case import REDUCERS, build
from vit.weights import load_state

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Found = dict[str, Tensor]


def whole(case: dict[str, Any], folder: Path) -> None:
    """A whole network: logits, all tokens, the class token after each block, all decisions."""
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        net = swag(case, folder, dtype)
        record: Found = {}
        if case["method"] == "base":
            found = plain_pass(net, tensors["image"])
        else:
            reducer = build(case["method"], case["arguments"], len(net.blocks), tensors)
            reduced = Reduced(net, reducer).eval()
            laid_open = reduced.inspect(tensors["image"])
            record = renamed(case, laid_open)
            found = {
                "logits": reduced(tensors["image"]),
                "final_tokens": laid_open.tokens,
                "cls_after_block": first_tokens(laid_open, len(net.blocks)),
            }
            assert token_counts(laid_open, len(net.blocks)) == case["tokens_per_block"]
        compare(case, key, tensors, found | record)


def clustering(case: dict[str, Any], folder: Path) -> None:
    """Token clustering alone."""
    given = case["arguments"]
    clusters = cluster_grid(given["num_spixels"])
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        features = tensors["features"]
        grid = (features.shape[2], features.shape[3])
        patches = features.flatten(2).transpose(1, 2)
        centroids = cluster_tokens(
            patches,
            grid,
            clusters,
            iterations=given.get("n_iters", 5),
            temperature=given.get("temperture", 1.0),
            window=given.get("window_size", 7),
        )
        labels = nearest_clusters(patches, centroids)
        start = initial_labels(grid, clusters).expand(len(features), -1)
        found = {"centroids": centroids, "hard_labels": labels, "init_label_map": start}
        compare(case, key, tensors, found)


def reconstruction(case: dict[str, Any], folder: Path) -> None:
    """Token reconstruction alone."""
    given = case["arguments"]
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        out = reconstruct_tokens(
            tensors["feat_before"],
            tensors["feat_after"],
            tensors["x"],
            nearest=given.get("k", 3),
            temperature=given.get("temperture", 0.05),
            normalisation="l2",
        )
        compare(case, key, tensors, {"out": out})


def bipartite(case: dict[str, Any], folder: Path) -> None:
    """Bipartite soft matching, all ways to merge, and back."""
    given = case["arguments"]
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        matching = match_bipartite(
            tensors["metric"],
            given["r"],
            protected_even=int(given["class_token"]),
            protected_odd=int(given["distill_token"]),
        )
        x, size = tensors["x"], tensors["size"]
        if matching is None:
            same = {f"merged_{mode}": x for mode in ("sum", "mean", "amax")}
            same |= {"wavg_x": x, "wavg_size": size, "unmerged_of_merged_sum": x}
            compare(case, key, {name: tensors[name] for name in same if name in tensors}, same)
            continue
        found = {
            "unm_idx": matching.unmerged // 2,
            "src_idx": matching.sources // 2,
            "dst_idx": matching.chosen,
            **{f"merged_{mode}": merge(matching, x, mode) for mode in ("sum", "mean", "amax")},
        }
        found["wavg_x"], found["wavg_size"] = merge_weighted(matching, x, size)
        # The published way back overlooks that a distillation token changed the order.
        way_back = matching._replace(order=None)
        found["unmerged_of_merged_sum"] = unmerge(way_back, found["merged_sum"])
        compare(case, key, tensors, found)


def kth(case: dict[str, Any], folder: Path) -> None:
    """Matching with every k-th token."""
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        matching = match_every_kth(tensors["metric"], case["arguments"]["k"])
        if matching is None:
            same = {name: tensors["x"] for name in tensors if "merge" in name}
            compare(case, key, tensors, same)
            continue
        merged = {f"merged_{m}": merge(matching, tensors["x"], m) for m in ("sum", "mean", "amax")}
        back = unmerge(matching, merged["merged_sum"])
        compare(case, key, tensors, {**merged, "unmerged": back, "unmerged_of_merged_sum": back})


def act_attention(case: dict[str, Any], folder: Path) -> None:
    """Clustered attention alone, on queries as they are given."""
    given = case["arguments"]["kw"]
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        ids: dict[str, Tensor | None] = {"q": None, "k": None}
        found: Found = {}
        reducer = ClusteredAttention(form="published")
        for role, hashes in (("q", given.get("q_hashes", 32)), ("k", given.get("k_hashes", 8))):
            if given.get(f"group_{role.upper()}", False):
                reducer.draws.stored[role] = (tensors[f"{role}.proj"], tensors[f"{role}.bias"])
                ids[role] = reducer.group(tensors[role], role, hashes)
                found[f"{role}.groups"] = ids[role]
                found[f"{role}.counts"] = cluster_counts(ids[role], int(ids[role].max()) + 1)
        found["out"] = clustered_attention(
            *(tensors[name] for name in "qkv"),
            query_ids=ids["q"],
            key_ids=ids["k"],
            scale=given.get("softmax_temp", 1.0),
        )
        compare(case, key, tensors, found)


def smyrf_attention(case: dict[str, Any], folder: Path) -> None:
    """SMYRF's attention alone, queries and keys of different numbers."""
    given = case["arguments"]
    sizes = {f"{name}_cluster_size": cluster_size(given, name[0]) for name in ("query", "key")}
    for key, dtype in DTYPES.items():
        tensors = load(case, folder, dtype)
        q, k, v = (tensors[name] for name in "qkv")
        orders = sort_by_hash(q, k, tensors["alpha"])
        out = straddling_attention(q, k, v, orders, scale=1 / given.get("norm_factor", 1), **sizes)
        found = {"out": out, "q_positions": orders[0], "k_positions": orders[1]}
        compare(case, key, tensors, found)


# Networks and comparisons.


def swag(case: dict[str, Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    """The case's SWAG ViT with its weights, which come in SWAG's own names."""
    made = case["model"]["constructor"]
    if made.get("conv_stem_layers"):
        raise NotBuilt("SWAG's ViT with a stem of convolutions")
    has_class = made.get("classifier", "token") == "token"
    pooled = {} if has_class else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    net = SwagVisionTransformer(
        img_size=made["image_size"],
        patch_size=made["patch_size"],
        depth=made["num_layers"],
        num_heads=made["num_heads"],
        embed_dim=made["hidden_dim"],
        # Timm rounds width times ratio down: from a little above, it finds the number given.
        mlp_ratio=(made["mlp_dim"] + 0.5) / made["hidden_dim"],
        num_classes=made.get("num_classes") or 0,
        **pooled,
    )
    weights = load_file(folder / case["model"]["weights_file"])
    # Positions are resized while they are loaded: in the precision of the case.
    load_state(net.to(dtype), {name: tensor.to(dtype) for name, tensor in weights.items()})
    return net.eval()


@torch.no_grad()
def plain_pass(net: nn.Module, image: Tensor) -> Found:
    """What an unreduced network computes."""
    if net.has_class_token:
        tokens, blocks = net.forward_intermediates(
            image, return_prefix_tokens=True, output_fmt="NLC"
        )
        first = [prefix[:, 0] for _, prefix in blocks]
    else:
        tokens, blocks = net.forward_intermediates(image, output_fmt="NLC")
        first = [patches[:, 0] for patches in blocks]
    return {
        "logits": net(image),
        "final_tokens": tokens,
        "cls_after_block": torch.stack(first),
    }


def first_tokens(found: Inspection, depth: int) -> Tensor:
    """Class token after each block [depth B D]."""
    return torch.stack([found.record[f"block{i}.first_token"] for i in range(depth)])


def token_counts(found: Inspection, depth: int) -> list[int]:
    """Tokens after each block."""
    return [int(found.record[f"block{i}.num_tokens"]) for i in range(depth)]


NAMES = {
    "unmerged": "unm_idx",
    "sources": "src_idx",
    "chosen": "dst_idx",
    "class_attention": "cls_attn",
}


def renamed(case: dict[str, Any], found: Inspection) -> Found:
    """What was decided, in the reference's names."""
    record: Found = {}
    for name, tensor in found.record.items():
        stem, _, last = name.rpartition(".")
        record[f"{stem}.{NAMES.get(last, last)}"] = tensor
        if case["method"].startswith("ats") and last == "kept":
            # Where shapes stand still, padding fills the whole grid.
            record[name] = tensor[:, : int((tensor >= 0).sum(dim=1).max())]
    if "cluster.input" in found.record:
        side = int(found.record["cluster.input"].shape[1] ** 0.5)
        grid = found.record["cluster.input"].transpose(1, 2).unflatten(2, (side, side))
        record["cluster.input_grid"] = grid
    if case["method"] == "tome":
        # Where there is nothing to merge, every token is its own source.
        single = torch.eye(found.tokens.shape[1]).expand(len(found.tokens), -1, -1)
        record["final_size"] = found.record.get("size", single.sum(dim=2, keepdim=True))
        record["final_source"] = found.record.get("source", single)
    return record


GIVEN = {"image", "features", "feat_before", "feat_after", "metric", "x", "size", "q", "k", "v"}
GIVEN_LEAVES = {"proj", "bias", "alpha", "beta"}


def compare(case: dict[str, Any], key: str, tensors: dict[str, Tensor], found: Found) -> None:
    """Every stored result against ours: numbers within the tolerance, indices exactly."""
    for name, stored in tensors.items():
        leaf = name.rpartition(".")[2]
        if name in GIVEN or leaf in GIVEN_LEAVES:
            continue
        if leaf in ("q_positions", "k_positions"):
            check_chunks(case, name, found[name], stored)
        elif stored.is_floating_point():
            check(name, found[name], stored, case["tolerance"][key], "close")
        else:
            check(name, found[name], stored, 0, "exact")


def cluster_size(given: dict[str, Any], role: str) -> int:
    """Tokens of a cluster of queries or keys; the published layer's `attn_size` goes before."""
    names = (f"{role}_attn_size", f"{role}_cluster_size", f"smyrf_{role}_cluster_size")
    return next((given[name] for name in names if given.get(name)), 64)


def check_chunks(case: dict[str, Any], name: str, ours: Tensor, stored: Tensor) -> None:
    """Sorted positions as sets within each cluster: near-ties may swap inside one."""
    given, role = case["arguments"], name.rpartition(".")[2][0]
    size = cluster_size(given, role)
    lengths = torch.arange(ours.shape[1]).repeat(len(ours))[:, None] * ours.shape[-1]

    def chunks(positions: Tensor) -> Tensor:
        # Sequences that share a chunk are told apart by a shift of their own.
        line = (positions.flatten(0, 1) + lengths).flatten()
        return line.unflatten(0, (-1, size)).sort(dim=-1).values

    check(name, chunks(ours), chunks(stored), 0, "exact")


PARTS = {
    "mod_clustering": clustering,
    "mod_reconstruct": reconstruction,
    "mod_bipartite": bipartite,
    "mod_kth": kth,
    "mod_act": act_attention,
    "mod_smyrf": smyrf_attention,
}


def run(case: dict[str, Any], folder: Path) -> None:
    """Any case, by its method."""
    method = case["method"]
    if method not in PARTS and method not in REDUCERS and method != "base":
        raise NotBuilt(f"no runner for {method}")
    PARTS.get(method, whole)(case, folder)


RUNNERS = {"*": run}

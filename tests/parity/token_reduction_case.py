"""The seven reducers of the parity topic `token_reduction`, in the reference's vocabulary."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reducer import Reducer

Builder = Callable[[dict[str, Any], dict[str, Tensor]], Reducer]


def hourglass(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """Expedit; a location that is no block clusters nowhere: ours behind the blocks."""
    location, depth = given["clustering_location"], given["depth"]
    return make_reducer(
        "hourglass",
        form="published",
        location=location if 0 <= location < depth else depth,
        num_clusters=given["num_cluster"],
        iterations=given["cluster_iters"],
        temperature=given["cluster_temperture"],
        window=given["cluster_window_size"],
        after_output=given["cluster_after_output"],
    )


def evit(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """EViT as Expedit-SWAG has it."""
    return make_reducer("evit", form="published", **evit_options(given))


def evit_upstream(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """EViT of the paper."""
    return make_reducer("evit", **evit_options(given))


def evit_options(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ours."""
    return {
        "keep_rate": given["base_keep_rate"],
        "locations": given["drop_loc"],
        "fuse_token": given["fuse_token"],
    }


def tome(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ToMe; a schedule pair is {"tuple": [r, inflection]}, a list may be longer than the depth."""
    r, inflection = given["r"], 0.0
    if isinstance(r, dict):
        r, inflection = r["tuple"]
    if isinstance(r, list):
        r = r[: given["depth"]]
    return make_reducer(
        "tome",
        form="published",
        r=r,
        inflection=inflection,
        proportional=given.get("prop_attn", True),
        trace_source=True,
    )


def evo(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """Evo-ViT; a list of ratios stands for location and ratio."""
    listed = isinstance(given["prune_ratio"], list)
    return make_reducer(
        "evo_vit",
        form="published",
        location=None if listed else given["prune_location"],
        keep_rate=given["prune_ratio"],
        tradeoff=given["tradeoff"],
    )


def ats(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ATS as Expedit-SWAG has it; its `num_tokens` changes nothing."""
    return make_reducer(
        "ats",
        form="published",
        locations=given["ats_blocks"],
        drop_tokens=given["drop_tokens"],
    )


def ats_upstream(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ATS with the block's input as residual; padding is attended to as in the cases' code."""
    return make_reducer(
        "ats",
        locations=given["ats_blocks"],
        drop_tokens=given["drop_tokens"],
        mask_padding=False,
    )


def plugged(given: dict[str, Any], name: str) -> dict[str, int]:
    """The blocks a published encoder plugs in and out again, the latter only behind the former."""
    start, stop, depth = (
        given[f"{name}_plug_in_index"],
        given[f"{name}_plug_out_index"],
        given["depth"],
    )
    if not 0 <= start < depth:
        return {"start": depth, "stop": depth}
    return {"start": start, "stop": stop if start < stop < depth else depth}


def act(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ACT with the stored projections."""
    reducer = make_reducer(
        "act",
        form="published",
        **plugged(given, "act"),
        group_queries=given["act_group_q"],
        group_keys=given["act_group_k"],
        query_hashes=given["act_q_hashes"],
        key_hashes=given["act_k_hashes"],
    )
    for name in tensors:
        if name.endswith(".proj"):
            stem = name.removesuffix(".proj")
            reducer.draws.stored[stem] = (tensors[name], tensors[f"{stem}.bias"])
    return reducer


def smyrf(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """SMYRF with the stored projections."""
    reducer = make_reducer(
        "smyrf",
        form="published",
        **plugged(given, "smyrf"),
        num_hashes=given["smyrf_n_hashes"],
        query_cluster_size=given["smyrf_q_cluster_size"],
        key_cluster_size=given["smyrf_k_cluster_size"],
    )
    for name in tensors:
        if name.endswith(".alpha"):
            stem = name.removesuffix(".alpha")
            reducer.draws.stored[stem] = (tensors[name], tensors[f"{stem}.beta"])
    return reducer


REDUCERS: dict[str, Builder] = {
    "hourglass": hourglass,
    "evit": evit,
    "evit_upstream": evit_upstream,
    "tome": tome,
    "evo": evo,
    "ats": ats,
    "ats_upstream": ats_upstream,
    "act": act,
    "smyrf": smyrf,
}

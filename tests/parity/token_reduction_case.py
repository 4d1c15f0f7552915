"""The seven reducers of the parity topic `token_reduction`, in the reference's vocabulary."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reducer import Reducer

Builder = Callable[[dict[str, Any], dict[str, Tensor]], Reducer]

# What the published constructors take for an argument that a case leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "hourglass": {
        **{"clustering_location": 0, "num_cluster": 256, "cluster_iters": 5},
        **{"cluster_temperture": 1.0, "cluster_window_size": 5, "cluster_after_output": True},
    },
    "evit": {"fuse_token": False},
    "tome": {"r": 0, "prop_attn": True},
    "evo": {"prune_ratio": 1.0, "prune_location": 3, "tradeoff": 0.5},
    "ats": {"ats_blocks": [], "drop_tokens": False},
    "act": {
        **{"act_plug_in_index": 0, "act_plug_out_index": -1},
        **{"act_group_q": True, "act_group_k": False, "act_q_hashes": 32, "act_k_hashes": 32},
    },
    "smyrf": {
        **{"smyrf_plug_in_index": 0, "smyrf_plug_out_index": -1, "smyrf_n_hashes": 32},
        **{"smyrf_q_cluster_size": 64, "smyrf_k_cluster_size": 64},
    },
}


def build(
    method: str, arguments: dict[str, Any], depth: int, tensors: dict[str, Tensor]
) -> Reducer:
    """The reducer of a case, for a network of so many blocks."""
    given = DEFAULTS[method.removesuffix("_upstream")] | arguments | {"depth": depth}
    return REDUCERS[method](given, tensors)


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
    """EViT of the paper, which counts as Expedit-SWAG does."""
    return make_reducer("evit", exact_counts=False, **evit_options(given))


def evit_options(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ours: a rate for every block, or one rate at some, negative ones from the end.

    A list of rates may be longer than the depth.
    """
    if "keep_rate" in given:
        rates = given["keep_rate"][: given["depth"]]
        return {"keep_rates": rates, "fuse_token": given["fuse_token"]}
    return {
        "keep_rate": given["base_keep_rate"],
        "locations": [range(given["depth"])[block] for block in given["drop_loc"]],
        "fuse_token": given["fuse_token"],
    }


def tome(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ToMe; a schedule pair is {"tuple": [r, inflection]}, a list may be longer than the depth.

    A number below 0 merges nothing.
    """
    r, inflection = given["r"], 0.0
    if isinstance(r, dict):
        r, inflection = r["tuple"]
    listed = [max(count, 0) for count in (r if isinstance(r, list) else [r])]
    return make_reducer(
        "tome",
        form="published",
        r=listed[: given["depth"]] if isinstance(r, list) else listed[0],
        inflection=inflection,
        proportional=given["prop_attn"],
        trace_source=True,
    )


def evo(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """Evo-ViT; a list of ratios stands for location and ratio, and may be longer than the depth."""
    depth, location = given["depth"], min(given["prune_location"], given["depth"])
    ratio, tradeoff = (
        value[:depth] if isinstance(value, list) else value
        for value in (given["prune_ratio"], given["tradeoff"])
    )
    return make_reducer(
        "evo_vit",
        form="published",
        location=None if isinstance(ratio, list) else location,
        keep_rate=ratio,
        tradeoff=tradeoff,
    )


def ats(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ATS as Expedit-SWAG has it; its `num_tokens` changes nothing."""
    return make_reducer("ats", form="published", **ats_options(given))


def ats_upstream(given: dict[str, Any], tensors: dict[str, Tensor]) -> Reducer:
    """ATS with the block's input as residual; padding is attended to as in the cases' code."""
    return make_reducer("ats", mask_padding=False, **ats_options(given))


def ats_options(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ours; numbers that no block has are overlooked."""
    blocks = [block for block in given["ats_blocks"] if 0 <= block < given["depth"]]
    return {"locations": blocks, "drop_tokens": given["drop_tokens"]}


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

"""The published cost tables row by row: what each costs in closed form, and the net it is about."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model
from torch import Tensor, nn

from baselines.token_reduction import costs
from baselines.token_reduction.published_rows import BASE, H14, L16, ROWS, Row
from baselines.token_reduction.reduced import Reduced, reduced
from baselines.token_reduction.swag import SWAG
from vit.weights import load_weights

NAMES = {
    **{BASE: "SWAG", "hourglass": "Expedit", "evit": "EViT", "tome": "ToMe", "act": "ACT"},
    **{"ats": "ATS", "evo_vit": "Evo-ViT", "smyrf": "SMYRF"},
}
SIZES = {L16: "L/16", H14: "H/14"}
SMYRF_HASHES = 32
CLUSTER_ITERATIONS = 5


class PublishedTable:
    """The 46 rows of Expedit-SWAG's tables, for `experiments/complexity.py --table`.

    weights: files of weights by registered model, for the counts that depend on them; without one a
    net has random weights.
    """

    title = "token reduction on SWAG ViTs (Expedit-SWAG, Liang et al. 2022)"
    protocol = (
        "one multiply-add counts as one; linear layers with bias, layer norm 4, softmax 5, other "
        "elementwise operations 1 an element, as the published counter does; published speeds are "
        "of one image (FPS) and of a large batch, on a GPU that is not named"
    )
    rows: Sequence[Row] = ROWS
    base = BASE

    def __init__(self, weights: Mapping[str, str | None] | None = None) -> None:
        self.weights = {name: file for name, file in (weights or {}).items() if file}
        for name, file in self.weights.items():
            if name not in SIZES:
                raise ValueError(f"no row is of {name!r}; the models are {', '.join(SIZES)}")
            if not Path(file).is_file():
                raise ValueError(f"{file}: no such weights file")

    def words(self, row: Row) -> tuple[str, str, str]:
        """Method, model and parameters of a row, as text."""
        options = ", ".join(f"{key}={value}" for key, value in row.options.items())
        return NAMES[row.method], SIZES[row.model], options

    def image_size(self, row: Row) -> int:
        """Pixels a side."""
        return int(SWAG[row.model]["img_size"])

    def cost(self, row: Row, counts: Sequence[float] | None = None) -> costs.Cost | None:
        """In closed form; counts: of `measure`, for a cost that depends on them (None without)."""
        shape, options = _shape(row.model), dict(row.options)
        if row.free is not None and counts is None:
            return None
        if row.method == BASE:
            return costs.base(shape)
        if row.method == "hourglass":
            return costs.hourglass(shape, **options, iterations=CLUSTER_ITERATIONS)
        if row.method == "evit":
            return costs.evit(shape, **options, drop_blocks=_quarters(shape.depth))
        if row.method == "tome":
            return costs.tome(shape, schedule=[options["r"]] * shape.depth)
        if row.method == "evo_vit":
            return costs.evo_vit(shape, **options)
        if row.method == "smyrf":
            blocks, size = range(options["start"], shape.depth), options["query_cluster_size"]
            return costs.smyrf(shape, blocks=blocks, num_hashes=SMYRF_HASHES, cluster_size=size)
        counts = list(counts or [])
        if row.method == "act":
            spread = counts if len(counts) > 1 else counts * shape.depth
            return costs.act(shape, num_clusters=spread, num_hashes=options["query_hashes"])
        left = [round(count) for count in counts]
        return costs.ats(shape, tokens=dict(zip(options["locations"], left, strict=True)))

    def net(self, model: str) -> nn.Module:
        """The plain net of a row, in eval mode; ValueError for a file that does not fit."""
        torch.manual_seed(0)
        net = create_model(model)
        if model in self.weights:
            load_weights(net, self.weights[model])
        return net.eval()

    def reduce(self, row: Row, net: nn.Module) -> nn.Module:
        """The net of a row, around the weights of `net`."""
        if row.method == BASE:
            return net
        return reduced(net, method=row.method, form="published", options=_options(row)).eval()

    def measure(self, row: Row, net: nn.Module, image: Tensor) -> list[float]:
        """Clusters of each block (ACT), or tokens after the block (ATS), for one image."""
        found = self.reduce(row, net)
        assert isinstance(found, Reduced), "only reduced nets have such counts"
        record = found.inspect(image).record
        if row.method == "ats":
            return [float(record[f"block{index}.num_tokens"]) for index in row.options["locations"]]
        depth = _shape(row.model).depth
        return [float(record[f"block{index}.q.counts"].shape[-1]) for index in range(depth)]


def _shape(model: str) -> costs.Shape:
    size = SWAG[model]
    side, width = size["img_size"] // size["patch_size"], size["embed_dim"]
    return costs.Shape(
        depth=size["depth"],
        width=width,
        num_heads=size["num_heads"],
        mlp_width=4 * width,
        patch_size=size["patch_size"],
        grid=(side, side),
    )


def _quarters(depth: int) -> list[int]:
    """EViT's published blocks: three, a quarter of the depth apart."""
    return [depth // 4, depth // 2, 3 * depth // 4]


def _options(row: Row) -> dict[str, Any]:
    """Keywords of the reducer; projections are drawn from a seed, so that two passes agree."""
    drawn = {"seed": 0} if row.method in ("act", "smyrf") else {}
    return {**row.options, **drawn}

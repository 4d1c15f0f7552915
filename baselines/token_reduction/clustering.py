"""Expedit ("hourglass"): tokens are clustered once, full resolution is restored at the end.

Liang et al. 2022, "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning", section 3.

Letters in shapes: B images, N patches in a grid of h x w, K clusters in a grid of kr x kc, D
channels, T tokens, P prefix tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.token_reduction.options import each
from baselines.token_reduction.reducer import Facts, Reducer, State, check_blocks
from utils.precision import at_least_float32
from utils.ranges import (
    OutOfRange,
    check_count,
    check_counts,
    check_flags,
    check_range,
    check_word,
)

FORBIDDEN = 1e16  # added to the distance of a patch to a centroid outside of its window
RECONSTRUCTIONS = ("sum", "l2")


def initial_labels(
    grid: tuple[int, int], clusters: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Cluster of each patch before the first step [N]: nearest upsampling of the cluster grid."""
    labels = torch.arange(clusters[0] * clusters[1], device=device, dtype=torch.float32)
    # The framework's own rounding: the integer formula differs at some sizes (44 over 26).
    upsampled = F.interpolate(labels.reshape(1, 1, *clusters), size=grid, mode="nearest")
    return upsampled.flatten().long()


def forbidden_pairs(labels: Tensor, clusters: tuple[int, int], window: int) -> Tensor:
    """Penalty [K N]: patches may join centroids within window // 2 of their first one's place."""
    reach = window // 2
    centroids = torch.arange(clusters[0] * clusters[1], device=labels.device)
    rows = (centroids // clusters[1])[:, None] - (labels // clusters[1])[None]
    columns = (centroids % clusters[1])[:, None] - (labels % clusters[1])[None]
    return ((rows.abs() > reach) | (columns.abs() > reach)) * FORBIDDEN


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 [B I J] of rows a [B I D] and b [B J D], as |a|^2 + |b|^2 - 2 a b."""
    return a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)


def cluster_tokens(
    patches: Tensor,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    *,
    iterations: int = 5,
    temperature: float = 1.0,
    window: int = 5,
) -> Tensor:
    """Local soft k-means of patches [B N D]: centroids [B K D].

    Section 3.1: centroids start as the pooled grid; each step assigns by softmax over centroids of
    -|f - c|^2 temperature. Assignments carry no gradient.
    """
    x = patches
    images = x.transpose(1, 2).unflatten(2, grid)
    centroids = F.adaptive_avg_pool2d(images, clusters).flatten(2).transpose(1, 2)
    labels = initial_labels(grid, clusters, x.device)
    penalty = forbidden_pairs(labels, clusters, window).to(x.dtype)
    for _ in range(iterations):
        with torch.no_grad():
            distances = squared_distances(centroids, x) + penalty
            shares = (-distances * temperature).softmax(dim=1)
            shares = shares / shares.sum(dim=2, keepdim=True).clamp(min=1e-16)
        centroids = shares @ x
    return centroids


@torch.no_grad()
def nearest_clusters(patches: Tensor, centroids: Tensor) -> Tensor:
    """The centroid [B K D] that each patch [B N D] is nearest to: [B N]."""
    return squared_distances(centroids, patches).argmin(dim=1)


def reconstruct_tokens(
    before: Tensor,
    after: Tensor,
    tokens: Tensor,
    *,
    nearest: int = 3,
    temperature: float = 0.05,
    normalisation: str = "sum",
) -> Tensor:
    """Processed clusters tokens [B K D'] back at the patches: [B N D'].

    before [B N D] and after [B K D] are the patches and centroids where they were clustered. A
    patch is a mean of its `nearest` clusters (all, if negative) with weights
    exp(-temperature |before - after|^2), which are divided by their sum, or by their L2 norm
    ("l2", as published: values then grow with the number of near clusters, and vanish where all
    are far; clusters at equal distance are all kept).
    """
    scores = -temperature * squared_distances(before, after)
    if normalisation == "sum":
        if 0 <= nearest < scores.shape[2]:
            kept = scores.topk(max(nearest, 1), dim=2)
            weights = torch.zeros_like(scores).scatter(2, kept.indices, kept.values.softmax(dim=2))
        else:
            weights = scores.softmax(dim=2)
        return weights.to(tokens.dtype) @ tokens
    weights = scores.exp()
    if nearest >= 0:
        count = min(max(nearest, 1), weights.shape[2])
        least = weights.topk(count, dim=2).values[..., -1:]
        weights = torch.where(weights < least, 0, weights)
    return F.normalize(weights, dim=2).to(tokens.dtype) @ tokens


class Hourglass(Reducer):
    """Clusters the patch tokens at one block; the blocks after it see K clusters.

    location: the block whose input is clustered, or whose output (`after_output`); the depth: none.
        Default: the middle of the plain blocks.
    num_clusters: K, a square number, or (rows, columns). Default: half of the patches.
    iterations, temperature, window: of the clustering.
    nearest, reconstruction_temperature, reconstruction ("sum" | "l2"): of the reconstruction,
        see `reconstruct_tokens`; the defaults are the published ones, except "sum".
    Record: cluster.input [B N D], cluster.centroids [B K D], cluster.hard_labels [B N].
    """

    def __init__(
        self,
        location: int | None = None,
        num_clusters: int | tuple[int, int] | None = None,
        *,
        iterations: int = 5,
        temperature: float = 1.0,
        window: int = 5,
        after_output: bool = False,
        nearest: int = 3,
        reconstruction_temperature: float = 0.05,
        reconstruction: str = "sum",
    ) -> None:
        check_flags(after_output=after_output)
        if location is not None:
            check_count("location", location)
        check_counts(iterations=iterations, window=window)
        check_count("nearest", nearest, -1)
        if window % 2 == 0:
            raise ValueError(f"window {window} must be odd")
        # Above 0: nearer tokens weigh more.
        check_range("temperature", temperature, ends="()")
        check_range("reconstruction_temperature", reconstruction_temperature, ends="()")
        check_word("reconstruction", reconstruction, RECONSTRUCTIONS)
        self.location, self.after_output = location, after_output
        self.clusters = None if num_clusters is None else cluster_grid(num_clusters)
        self.iterations, self.temperature, self.window = iterations, temperature, window
        self.nearest, self.reconstruction = nearest, reconstruction
        self.at = -1
        self.reconstruction_temperature = reconstruction_temperature

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for a location that it lacks."""
        super().bind(facts)
        middle = facts.first + (facts.depth - facts.first) // 2
        self.at = middle if self.location is None else self.location
        if self.at != facts.depth:
            check_blocks([self.at], facts, "location")

    def before_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """Tokens [B P+N D], clustered [B P+K D] at the location."""
        return self._clustered(state, x) if self._is_here(index, False) else x

    def after_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """The same after the block."""
        return self._clustered(state, x) if self._is_here(index, True) else x

    def restore(self, state: State, x: Tensor) -> Tensor:
        """Tokens [B P+K D] at full resolution [B P+N D] (section 3.2)."""
        if "before" not in state.memory:
            return x
        with torch.autocast(x.device.type, enabled=False):
            patches = reconstruct_tokens(
                at_least_float32(state.memory["before"]),
                at_least_float32(state.memory["after"]),
                at_least_float32(x[:, state.num_prefix :]),
                nearest=self.nearest,
                temperature=self.reconstruction_temperature,
                normalisation=self.reconstruction,
            )
        return torch.cat([x[:, : state.num_prefix], patches.to(x.dtype)], dim=1)

    def _is_here(self, index: int, behind: bool) -> bool:
        return index == self.at and behind == self.after_output

    def _clustered(self, state: State, x: Tensor) -> Tensor:
        prefix, patches = x[:, : state.num_prefix], x[:, state.num_prefix :]
        clusters = self._clusters_for(state.grid)
        # Distances of raw tokens need more digits and more range than half precision has.
        with torch.autocast(x.device.type, enabled=False):
            centroids = cluster_tokens(
                at_least_float32(patches),
                state.grid,
                clusters,
                iterations=self.iterations,
                temperature=self.temperature,
                window=self.window,
            )
            labels = (
                nearest_clusters(at_least_float32(patches), centroids) if state.traced else None
            )
        centroids = centroids.to(x.dtype)
        if labels is not None:
            state.note("cluster.input", patches)
            state.note("cluster.centroids", centroids)
            state.note("cluster.hard_labels", labels)
            state.origin = labels + state.num_prefix
            state.memory["before"], state.memory["after"] = patches, centroids
        return torch.cat([prefix, centroids], dim=1)

    def _clusters_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        if self.clusters is None:
            rows, columns = (max(1, round(side / math.sqrt(2))) for side in grid)
            return rows, columns
        if self.clusters[0] > grid[0] or self.clusters[1] > grid[1]:
            raise ValueError(
                f"{self.clusters[0]} x {self.clusters[1]} clusters of {grid[0]} x {grid[1]} "
                "patches: give at most one for each"
            )
        return self.clusters


def cluster_grid(num_clusters: "int | tuple[int, int] | list[int]") -> tuple[int, int]:
    """Rows and columns of a number of clusters; ValueError if it is no square number."""
    given = each("num_clusters", num_clusters, lambda key, count: check_count(key, count, 1))
    if not isinstance(num_clusters, int):
        if len(given) != 2:
            raise OutOfRange(
                f"num_clusters takes a square number, or rows and columns as [4, 4], not {given}"
            )
        return given[0], given[1]
    side = math.isqrt(num_clusters)
    if side * side != num_clusters:
        low, high = side**2, (side + 1) ** 2
        raise ValueError(
            f"num_clusters {num_clusters} is no square number; {low} and {high} are, or give rows "
            "and columns"
        )
    return side, side

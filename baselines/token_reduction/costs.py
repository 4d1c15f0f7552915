"""What a plain ViT costs under each method, in closed form, by the rules of the published tables.

One multiply-add counts as one; a linear layer counts rows * out * (in + 1), a layer norm 4 and a
softmax 5 per element, every other elementwise operation 1 (Expedit-SWAG's counter). `Cost` keeps
the products apart, which is all that other counters count.

Letters: n tokens of a block, N at first, P patches, D width, h heads, m width of the MLP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baselines.selection import keep_count


class Shape(NamedTuple):
    """The sizes of a plain ViT that its cost depends on."""

    depth: int
    width: int
    num_heads: int
    mlp_width: int
    patch_size: int
    grid: tuple[int, int]
    num_classes: int = 1000
    in_chans: int = 3

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return self.num_patches + 1


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of matrix products and convolutions, and everything else that is counted."""

    products: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """By the rules of the published tables."""
        return self.products + self.others

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.products + other.products, self.others + other.others)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.products - other.products, self.others - other.others)


def linear(rows: int, inputs: int, outputs: int) -> Cost:
    """A linear layer with bias."""
    return Cost(rows * inputs * outputs, rows * outputs)


def attention(shape: Shape, n: int) -> Cost:
    """LN, queries, keys and values, softmax attention, projection, residual on n tokens."""
    width, heads = shape.width, shape.num_heads
    layers = linear(n, width, 3 * width) + linear(n, width, width)
    return layers + Cost(2 * n * n * width, 4 * n * width + 5 * heads * n * n + 3 * n * width)


def mlp(shape: Shape, n: int) -> Cost:
    """LN, MLP, residual on n tokens."""
    width, hidden = shape.width, shape.mlp_width
    layers = linear(n, width, hidden) + linear(n, hidden, width)
    return layers + Cost(0, 4 * n * width + 2 * n * hidden + 2 * n * width)


def stem(shape: Shape, last: int) -> Cost:
    """Patch embedding, positions, the final norm on `last` tokens, the head."""
    width = shape.width
    patches = shape.in_chans * shape.patch_size**2 * width * shape.num_patches
    around = Cost(patches, 2 * shape.num_tokens * width + 4 * last * width)
    return around + linear(1, width, shape.num_classes)


def base(shape: Shape) -> Cost:
    """The plain ViT."""
    return _over([shape.num_tokens] * shape.depth, shape, stem(shape, shape.num_tokens))


def hourglass(
    shape: Shape,
    *,
    location: int,
    num_clusters: int,
    iterations: int = 5,
    after_output: bool = False,
) -> Cost:
    """Clustering of the patch tokens before block `location`, or after it; at the depth, none."""
    full, few, width = shape.num_tokens, num_clusters + 1, shape.width
    clusters_at_all = location < shape.depth
    first = location + after_output
    tokens = [full if index < first else few for index in range(shape.depth)]
    cost = _over(tokens, shape, stem(shape, few if clusters_at_all else full))
    # Each block of this net adds a copy of its tokens; its input has one operation less.
    cost += Cost(0, sum(tokens) * width - full * width)
    if not clusters_at_all or iterations == 0:
        return cost
    patches, clusters = shape.num_patches, num_clusters
    pairs = clusters * patches
    step = Cost(2 * pairs * width, patches * width + 2 * clusters * width + 10 * pairs)
    cost += Cost(0, patches + clusters + 3 * pairs)
    return cost + Cost(iterations * step.products, iterations * step.others)


def evit(
    shape: Shape, *, keep_rate: float, drop_blocks: Collection[int], fuse_token: bool = False
) -> Cost:
    """Patch tokens dropped by their score between attention and MLP of the blocks named."""
    n, cost = shape.num_tokens, Cost()
    for index in range(shape.depth):
        cost += attention(shape, n)
        kept = keep_count(keep_rate, n - 1, exact=False)
        if index in drop_blocks and kept < n - 1:
            fused = (n - 1 - kept) * shape.width if fuse_token else 0
            cost += Cost(0, n * n + fused)
            n = 1 + kept + fuse_token
        cost += mlp(shape, n)
    return cost + stem(shape, n)


def tome(shape: Shape, *, schedule: Sequence[int], proportional: bool = True) -> Cost:
    """Patch tokens merged between attention and MLP, schedule[i] of them in block i."""
    n, cost, merged = shape.num_tokens, Cost(), False
    width, heads = shape.width, shape.num_heads
    for r in schedule:
        cost += attention(shape, n)
        if merged and proportional:
            cost += Cost(0, heads * n * n)
        r = min(r, (n - 1) // 2)
        if r > 0:
            pairs = (n - n // 2) * (n // 2)
            head_width = width // heads
            cost += Cost(pairs * head_width, n * head_width + n * width + (n - r) * width)
            n, merged = n - r, True
        cost += mlp(shape, n)
    return cost + stem(shape, n)


def evo_vit(shape: Shape, *, location: int, keep_rate: float) -> Cost:
    """Blocks from `location` on run on the class token and the most attended patch tokens."""
    full, last = shape.num_tokens, shape.depth - 1
    if keep_rate == 1.0 or location > last:
        return base(shape)  # the class attention is not used
    cost = stem(shape, full)
    for index in range(shape.depth):
        n = int(shape.num_patches * keep_rate) + 1 if index >= location else full
        cost += attention(shape, n) + mlp(shape, n)
        if index < last:
            cost += Cost(0, n * n + (3 * (n - 1) if index else 0))
        if index >= location:
            cost += Cost(0, shape.num_patches)
    return cost


def smyrf(shape: Shape, *, blocks: Collection[int], num_hashes: int, cluster_size: int) -> Cost:
    """Attention within chunks of `cluster_size` tokens of like projections, in the blocks named."""
    n, width, heads = shape.num_tokens, shape.width, shape.num_heads
    head_width, rounds = width // heads, num_hashes * heads * n
    hashes = Cost(2 * rounds * (head_width + 2), 2 * rounds)
    chunks = Cost(
        2 * num_hashes * n * cluster_size * width,
        2 * heads * (n + 1) + 4 * rounds + 3 * rounds * cluster_size + rounds * head_width,
    )
    one = hashes + chunks - _attention_core(shape) - Cost(0, n * width)
    return base(shape) + Cost(len(blocks) * one.products, len(blocks) * one.others)


def act(shape: Shape, *, num_clusters: Sequence[float], num_hashes: int) -> Cost:
    """Queries replaced by the means of their clusters, num_clusters[i] of them in block i.

    As many blocks as numbers; a mean over blocks is as good as the numbers themselves.
    """
    n, width, heads = shape.num_tokens, shape.width, shape.num_heads
    cost = base(shape)
    hashing = Cost(n * width * num_hashes, 3 * heads * n * num_hashes)
    for queries in num_clusters:
        pairs = queries * n
        core = Cost(round(2 * pairs * width), round(6 * heads * pairs))
        cost += hashing + core - _attention_core(shape)
    return cost


def ats(shape: Shape, *, tokens: dict[int, int]) -> Cost:
    """Tokens sampled by significance in the blocks named; tokens[i] are left after block i."""
    first = n = shape.num_tokens
    width, heads, cost = shape.width, shape.num_heads, Cost()
    for index in range(shape.depth):
        if index not in tokens:
            cost += attention(shape, n) + mlp(shape, n)
            continue
        left = tokens[index]
        cost += linear(n, width, 3 * width) + linear(left, width, width)
        masked = 4 * n * width + 4 * n * width + 5 * heads * n * n + 2 * n * n + n * width
        cost += Cost(2 * n * n * width, masked + (first - 1) ** 2 + 6 * left * width)
        n = left
        cost += mlp(shape, n)
    return cost + stem(shape, n)


def _over(tokens: Sequence[int], shape: Shape, rest: Cost) -> Cost:
    """Whole blocks on so many tokens each, and the rest."""
    for n in tokens:
        rest = rest + attention(shape, n) + mlp(shape, n)
    return rest


def _attention_core(shape: Shape) -> Cost:
    """The two products and the softmax of full attention."""
    n = shape.num_tokens
    return Cost(2 * n * n * shape.width, 5 * shape.num_heads * n * n)

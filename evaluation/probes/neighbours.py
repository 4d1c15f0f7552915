"""Exact nearest neighbours by dot product, and their weighted vote (Wu et al. 2018, section 3.4).

Each rank searches its own training rows in chunks and keeps only the best k per query, so memory
beside the features holds one block of queries x chunk similarities.
Letters: Q queries, N training rows, D width, k neighbours, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.features.dataset import full_float32_products
from evaluation.probes.class_metrics import AnyMatchCounts
from utils import distributed
from utils.ranges import check_word

SEARCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
QUERIES_AT_ONCE = 1024


class Neighbours(NamedTuple):
    """The nearest rows of every query, most similar first."""

    similarities: Tensor  # [Q, k] float32
    indices: Tensor  # [Q, k] int64


@torch.inference_mode()
def find_neighbours(
    queries: Tensor,
    rows: Tensor,
    *,
    k: int,
    indices: Tensor | None = None,
    chunk_size: int = 65536,
    query_batch: int = QUERIES_AT_ONCE,
    precision: str = "fp32",
) -> Neighbours:
    """The k of the rows [N, D] with the largest dot products with each query [Q, D]; all if N < k.

    `rows` may be on another device than `queries` and in another dtype: each chunk is moved once.
    `indices` [N] names the rows (default 0..N-1). Equal similarities are ordered by index, but
    which of several rows that tie for place k are found is undefined.
    """
    check_word("precision", precision, SEARCH_DTYPES)
    device, dtype = queries.device, SEARCH_DTYPES[precision]
    names = torch.arange(len(rows)) if indices is None else indices
    blocks = queries.to(dtype).split(query_batch)
    best = [no_neighbours(len(block), device) for block in blocks]
    with full_float32_products(device):
        for start in range(0, len(rows), chunk_size):
            chunk = rows[start : start + chunk_size].to(device=device, dtype=dtype)
            chunk_names = names[start : start + chunk_size].to(device)
            for position, block in enumerate(blocks):
                values, places = (block @ chunk.T).topk(min(k, len(chunk)), dim=1)
                found = Neighbours(values.float(), chunk_names[places])
                best[position] = merge_neighbours([best[position], found], k)
    return Neighbours(*(torch.cat(pieces) for pieces in zip(*best, strict=True)))


def merge_neighbours(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k best of several lists, most similar first, the lower index first on ties."""
    similarities = torch.cat([part.similarities for part in parts], dim=1)
    indices = torch.cat([part.indices for part in parts], dim=1)
    by_index = indices.argsort(dim=1)
    similarities, indices = similarities.gather(1, by_index), indices.gather(1, by_index)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return Neighbours(similarities[:, :k], indices.gather(1, order)[:, :k])


def gather_neighbours(own: Neighbours, k: int) -> Neighbours:
    """The k best over all ranks, on every rank; every rank must call this with the same queries.

    A rank that found fewer than k pads with rows of similarity -inf.
    """
    world = distributed.world_size()
    if world == 1:
        return own
    missing = k - own.similarities.shape[1]
    similarities = torch.nn.functional.pad(own.similarities, (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(own.indices, (0, missing))
    merged = []
    for block in zip(
        similarities.split(QUERIES_AT_ONCE), indices.split(QUERIES_AT_ONCE), strict=True
    ):
        everywhere = [distributed.all_gather_variable(part).chunk(world) for part in block]
        parts = [Neighbours(*part) for part in zip(*everywhere, strict=True)]
        merged.append(merge_neighbours(parts, k))
    return Neighbours(*(torch.cat(pieces) for pieces in zip(*merged, strict=True)))


def vote(
    neighbours: Neighbours,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, Tensor]:
    """Class scores [Q, C] for each k: softmax weights of the first k neighbours, summed by class.

    The softmax runs over all neighbours; for a smaller k it is truncated and not renormalised,
    which does not change the order of the classes. `labels` [N] are those of all training rows.
    """
    weights = (neighbours.similarities / temperature).softmax(dim=1)
    classes = labels.to(weights.device)[neighbours.indices]
    scores = weights.new_zeros(len(weights), num_classes)
    result, start = {}, 0
    for k in sorted(ks):
        scores = scores.scatter_add(1, classes[:, start:k], weights[:, start:k])
        result[k], start = scores, k
    return result


def choose_rows(
    labels: Tensor, ks: Sequence[int], *, n_per_class: int, num_tries: int
) -> Iterator[tuple[Tensor | None, list[int]]]:
    """Yield for each try the training rows that vote (None: all), and the k to use.

    n_per_class < 0: one try with all rows and all k. Otherwise try t seeds a generator with t and
    draws one permutation per class in ascending label order, as DINOv2 does, so that the same rows
    are drawn; k are those of `ks` up to n_per_class, and n_per_class itself.
    """
    if n_per_class < 0:
        yield None, list(dict.fromkeys(ks))
        return
    classes = labels.argsort(stable=True).split(labels.bincount().tolist())
    for attempt in range(num_tries):
        generator = torch.Generator().manual_seed(attempt)
        chosen = [
            members[torch.randperm(len(members), generator=generator)[:n_per_class]]
            for members in classes
            if len(members)
        ]
        yield torch.cat(chosen), sorted(k for k in {*ks, n_per_class} if k <= n_per_class)


@torch.inference_mode()
def classify(
    neighbours: Neighbours,
    train_labels: Tensor,
    val_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, dict[int, float]]:
    """Percent correct, top-1 and top-5 for each k, of queries with labels `val_labels` [Q]."""
    num_classes = int(train_labels.max()) + 1
    device = neighbours.similarities.device
    # Not `ClassCounts`: a label beyond the training classes is possible, and is always wrong.
    counts = {k: AnyMatchCounts(1, num_classes, device=device) for k in ks}
    for start in range(0, len(val_labels), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)
        part = Neighbours(neighbours.similarities[block], neighbours.indices[block])
        scores = vote(part, train_labels, ks=ks, temperature=temperature, num_classes=num_classes)
        for k in ks:
            counts[k].add(scores[k][None], val_labels[block, None].to(device))
    return {
        k: {top: 100 * share.item() for top, share in counts[k].fractions().items()} for k in ks
    }


def no_neighbours(queries: int, device: torch.device) -> Neighbours:
    """Neighbours [queries, 0] to start a search with."""
    return Neighbours(
        torch.empty(queries, 0, device=device),
        torch.empty(queries, 0, dtype=torch.int64, device=device),
    )

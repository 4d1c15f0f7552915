"""kNN on patches: each pixel of a patch gets the majority label of the nearest patches there.

Protocol of capi's segmentation probe (Darcet et al. 2025). Training patches stay on their ranks:
every rank holds the queries of all ranks and searches its own training patches once per distance,
for all numbers of neighbours together.
Letters: Q queries, m training patches of a chunk, D width, k neighbours, P patches of an image,
p pixels a side of a patch, B patches of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.features.dataset import full_float32_products
from evaluation.probes.neighbours import (
    Neighbours,
    gather_neighbours,
    merge_neighbours,
    no_neighbours,
)
from evaluation.progress import say, track_share
from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.iou import NUM_LABELS, Confusion, Scores
from evaluation.segmentation.store import PatchStore
from utils import distributed
from utils.ranges import check_count, check_list, check_range, check_word, check_words

GATHERED_ROWS = 8192  # queries read, standardised and shared at once
SEARCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Distance(NamedTuple):
    """A distance as a similarity of queries, rows and the rows' squared norms; larger is nearer."""

    similarity: Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, D], [m, D], [m] -> [B, m]
    normalized: bool = False
    is_product: bool = False  # a dot product, which a search in bf16 computes in bf16


def _by_product(queries: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    return queries @ rows.T


def _by_square(queries: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    # -|q - x|^2 + |q|^2: the last term is the same for all x, so the order stays.
    return torch.addmm(-squares, queries, rows.T, alpha=2)


def _by_sum(queries: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    return -torch.cdist(queries, rows, p=1)


def _by_maximum(queries: Tensor, rows: Tensor, squares: Tensor) -> Tensor:
    return -torch.cdist(queries, rows, p=torch.inf)


DISTANCES = {
    "cosine": Distance(_by_product, normalized=True, is_product=True),
    "L2": Distance(_by_square),
    "L1": Distance(_by_sum),
    "Linf": Distance(_by_maximum),
    "inner_product": Distance(_by_product, is_product=True),
}


class PatchKnn:
    """The kNN classifier and its grid: num_neighbors x distances, in this order.

    search_precision: fp32, or bf16 as in octic-vits, which rounds features to bf16 and computes
    cosine and inner product in bf16, other distances in fp32. chunk_size: training patches compared
    at once with query_batch queries. query_gb: GB of queries that every rank holds at once; more
    queries take several passes over the training patches.
    Departs from capi and octic-vits: fp32 by default, because in bf16 the 30 nearest have only a
    dozen distinct similarities, and which of them make the cut then depends on the device.
    """

    name = "knn"

    def __init__(
        self,
        *,
        num_neighbors: Sequence[int] = (1, 3, 10, 30),
        distances: Sequence[str] = ("cosine", "L2"),
        search_precision: str = "fp32",
        subsampling: int = 1,
        chunk_size: int = 65536,
        query_batch: int = 1024,
        query_gb: float = 2.5,
    ) -> None:
        check_list("num_neighbors", num_neighbors, 1)
        check_words("distances", distances, DISTANCES)
        check_word("search_precision", search_precision, SEARCH_DTYPES)
        check_count("subsampling", subsampling, 1)
        check_count("chunk_size", chunk_size, 1)
        check_count("query_batch", query_batch, 1)
        check_range("query_gb", query_gb, ends="()")
        self.num_neighbors, self.distances = list(num_neighbors), list(distances)
        self.search_precision, self.subsampling = search_precision, subsampling
        self.chunk_size, self.query_batch, self.query_gb = chunk_size, query_batch, query_gb

    @property
    def points(self) -> dict[str, tuple[int, str]]:
        """The grid by its published keys, in order."""
        return {
            f"num_neighbors={k}_distance={distance}": (k, distance)
            for k in self.num_neighbors
            for distance in self.distances
        }

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "num_neighbors": self.num_neighbors,
            "distances": self.distances,
            "search_precision": self.search_precision,
            "subsampling": self.subsampling,
        }

    def score(
        self, rows: FitRows, queries: PatchStore, *, device: torch.device
    ) -> dict[str, Scores]:
        """Scores of the queries at every point of the grid; every rank must call this."""
        found = {}
        for distance in self.distances:
            confusions = {k: Confusion(device) for k in self.num_neighbors}
            for share, predictions in self.predictions(
                rows, queries, distance=distance, ks=self.num_neighbors, device=device
            ):
                for k, confusion in confusions.items():
                    confusion.add(queries.labels[share], predictions[k])
            for k, confusion in confusions.items():
                found[k, distance] = confusion.scores(rows.ignore_labels)
        return {key: found[point] for key, point in self.points.items()}

    def fit_and_predict(
        self, rows: FitRows, queries: PatchStore, key: str, *, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (own places, labels [B, p^2]) of the queries at one grid point.

        Every rank must exhaust this.
        """
        k, distance = self.points[key]
        for share, predictions in self.predictions(
            rows, queries, distance=distance, ks=[k], device=device
        ):
            yield share, predictions[k]

    @torch.no_grad()
    def predictions(
        self,
        rows: FitRows,
        queries: PatchStore,
        *,
        distance: str,
        ks: Sequence[int],
        device: torch.device,
    ) -> Iterator[tuple[slice, dict[int, Tensor]]]:
        """Yield (own places, labels [B, p^2] by k) of this rank's queries in order, on `device`.

        A collective generator: every rank must exhaust it. A k above the number of training patches
        is lowered to it.
        """
        votes = {k: min(k, rows.count) for k in ks}
        if max(ks) > rows.count and distributed.is_main():
            asked = ", ".join(str(k) for k in ks if k > rows.count)
            say(f"kNN: k = {asked} asked, all {rows.count} training patches vote")
        most, per_image = max(votes.values()), queries.shape.patches_per_image
        dtype = SEARCH_DTYPES[self.search_precision]
        images = _images_at_once(queries, self.query_gb, dtype)
        block, done = max(self.query_batch // per_image, 1), 0
        for first in range(0, queries.shape.num_images, images):
            last = min(first + images, queries.shape.num_images)
            nearest = self._nearest(rows, queries, first, last, distance, most, device)
            by_image = nearest.view(last - first, per_image, most)
            for start in range(0, last - first, block):
                numbers = by_image[start : start + block]
                labels = rows.pixel_labels(numbers)
                mine = labels[(queries.rank - first - start) % queries.world :: queries.world]
                share = slice(done, done + mine.shape[0] * per_image)
                done = share.stop
                voted = vote(mine.flatten(0, 1).to(device), sorted(set(votes.values())))
                yield share, {k: voted[votes[k]] for k in ks}

    def _nearest(
        self,
        rows: FitRows,
        queries: PatchStore,
        first: int,
        last: int,
        distance: str,
        k: int,
        device: torch.device,
    ) -> Tensor:
        """Numbers [Q, k], on the host, of the patches nearest to those of images [first, last)."""
        metric, rounded = DISTANCES[distance], SEARCH_DTYPES[self.search_precision]
        dtype = rounded if metric.is_product else torch.float32

        def prepare(features: Tensor) -> Tensor:
            features = features.to(rounded).float()
            return (normalize(features, dim=1) if metric.normalized else features).to(dtype)

        with full_float32_products(device):
            everyone = _gather_queries(rows, queries, first, last, prepare, dtype, device)
            blocks = everyone.split(self.query_batch)
            best = [no_neighbours(len(block), device) for block in blocks]
            chunks = track_share(
                rows.chunks(device),
                total=rows.own_count,
                label=f"kNN {distance}, {len(everyone)} queries",
                size=lambda chunk: len(chunk[2]),
            )
            for features, _, numbers in chunks:
                features, numbers = prepare(features), numbers.to(device)
                squares = torch.linalg.vector_norm(features, dim=1).square()
                for position, block in enumerate(blocks):
                    similarities = metric.similarity(block, features, squares)
                    values, places = similarities.topk(min(k, len(features)), dim=1)
                    found = Neighbours(values.float(), numbers[places])
                    best[position] = merge_neighbours([best[position], found], k)
        own = Neighbours(*(torch.cat(pieces) for pieces in zip(*best, strict=True)))
        return gather_neighbours(own, k).indices.cpu()


def vote(labels: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """The most frequent of the first k labels [B, k, p^2] at each pixel, for each k; uint8.

    On ties it is the smallest. One pass serves all k: each neighbour raises only the count of its
    own label, so the best label is either unchanged or that one.
    """
    planes = labels.transpose(0, 1).contiguous()
    count_dtype = torch.uint8 if len(planes) < NUM_LABELS else torch.int32
    best = torch.zeros(planes.shape[1:], dtype=torch.int32, device=labels.device)
    found = {}
    for place, plane in enumerate(planes[: max(ks)]):
        count = torch.ones_like(plane, dtype=count_dtype)
        for earlier in planes[:place]:
            count += earlier == plane
        # Count first, then the smaller label.
        rank = count.int() * NUM_LABELS + (NUM_LABELS - 1 - plane.int())
        best = torch.maximum(best, rank)
        if place + 1 in ks:
            found[place + 1] = (NUM_LABELS - 1 - best % NUM_LABELS).to(torch.uint8)
    return found


def _images_at_once(queries: PatchStore, query_gb: float, dtype: torch.dtype) -> int:
    """Images whose patches fit into `query_gb`, at least one."""
    bytes_per_image = queries.shape.patches_per_image * queries.shape.dim * dtype.itemsize
    return max(int(query_gb * 1e9 / bytes_per_image), 1)


def _gather_queries(
    rows: FitRows,
    queries: PatchStore,
    first: int,
    last: int,
    prepare: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Prepared features [Q, D] of the images [first, last), of all ranks, on every rank."""
    per_image, world = queries.shape.patches_per_image, queries.world
    everyone = torch.zeros((last - first) * per_image, rows.dim, dtype=dtype, device=device)
    own = everyone.view(last - first, per_image, rows.dim)[(queries.rank - first) % world :: world]
    begin, step = len(range(queries.rank, first, world)), max(GATHERED_ROWS // per_image, 1)
    for start in range(0, len(own), step):
        part = own[start : start + step]
        place = (begin + start) * per_image
        features = queries.rows.read(place, place + len(part) * per_image)
        features = rows.standardizer(features.to(device, torch.float32))
        part.copy_(prepare(features).view(part.shape))
    if world > 1:
        for block in everyone.split(GATHERED_ROWS):
            torch.distributed.all_reduce(block)  # every rank has zeros in the rows of the others
    return everyone

"""The patches that a classifier is fitted to: those of one or more stores with a counted label.

Letters: m patches of a chunk, D width, B queries, k neighbours, p pixels a side of a patch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evaluation.segmentation.iou import NUM_LABELS
from evaluation.segmentation.standardize import Standardizer
from evaluation.segmentation.store import PatchStore
from utils import distributed
from utils.errors import UserError


class FitRows:
    """The patches of all `stores`, one after the other, standardised as they are read.

    Only every `subsampling`-th of all patches is kept, and none whose most frequent label is
    ignored; ignored pixels of other patches stay.
    """

    def __init__(
        self,
        stores: Sequence[PatchStore],
        *,
        ignore_labels: Sequence[int],
        standardizer: Standardizer,
        subsampling: int = 1,
        chunk_size: int = 65536,
    ) -> None:
        self.stores, self.ignore_labels = list(stores), list(ignore_labels)
        self.standardizer, self.chunk_size = standardizer, chunk_size
        self.offsets = [sum(s.total_rows for s in self.stores[:i]) for i in range(len(self.stores))]
        ignored = torch.zeros(NUM_LABELS, dtype=torch.bool)
        ignored[list(ignore_labels)] = True
        self.keep = []
        for store, offset in zip(self.stores, self.offsets, strict=True):
            keep = ~ignored[store.patch_labels.int()]
            if subsampling > 1:
                numbers = store.numbers(torch.arange(store.num_rows)) + offset
                keep &= numbers % subsampling == 0
            self.keep.append(keep)
        own = torch.zeros(NUM_LABELS, dtype=torch.int64)
        for store, keep in zip(self.stores, self.keep, strict=True):
            own += store.patch_labels[keep].bincount(minlength=NUM_LABELS)
        self.own_count = int(own.sum())
        counts = torch.stack(distributed.gather_objects(own)).sum(0)
        self.count = int(counts.sum())  # of all ranks
        self.classes = counts.nonzero().flatten()  # labels that some patch of some rank has
        if not self.count:
            raise UserError(
                f"no patch to learn from: the labels {', '.join(map(str, ignore_labels))} are "
                "ignored, and every patch mostly has one of them"
            )

    @property
    def dim(self) -> int:
        """Width of the standardised features."""
        rotation = self.standardizer.rotation
        return self.stores[0].shape.dim if rotation is None else rotation.shape[1]

    def chunks(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (features [m, D], patch labels [m] uint8, numbers [m]) of this rank in chunks.

        Numbers count the patches of all stores and ranks; they and the labels are on the host.
        """
        for store, keep, offset in zip(self.stores, self.keep, self.offsets, strict=True):
            read = store.chunks(self.chunk_size, device, keep=keep, transform=self.standardizer)
            for features, places in read:
                yield features, store.patch_labels[places], store.numbers(places) + offset

    def pixel_labels(self, numbers: Tensor) -> Tensor:
        """Pixel labels [B, k, p^2] of the patches `numbers` [B, k]; a collective call.

        Each patch's labels come from the rank that has them, so every rank must pass the same
        numbers.
        """
        pixels = self.stores[0].shape.pixels_per_patch
        found = torch.zeros(*numbers.shape, pixels, dtype=torch.uint8)
        for store, offset in zip(self.stores, self.offsets, strict=True):
            within = (numbers >= offset) & (numbers < offset + store.total_rows)
            places = store.own_places(numbers - offset).where(within, -1)
            mine = places >= 0
            found[mine] = store.labels[places[mine]]
        return distributed.all_reduce_sum(found)  # zeros for patches of the other ranks

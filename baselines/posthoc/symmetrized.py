"""Any classifier made invariant after training, by joining its results on copies of an image.

Basu et al. 2023 ("Equi-Tuning") and the post-hoc experiments beside GE-ViT. The published models
are called equivariant; what they are is invariant, f(g x) = f(x) for every g of the group.

Letters in shapes: B images, T copies, C channels, H W height and width, D channels of the
embedding, h w grid of patches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from baselines.posthoc.aggregators import Aggregator, make_aggregator
from baselines.posthoc.dense import average_features
from baselines.posthoc.groups import CopyGroup
from baselines.posthoc.keys import rename_state
from baselines.posthoc.split import Pair, find_split, head_classes, head_width
from baselines.wrapping import make_backbone
from utils.config.signature import keywords_of
from utils.ranges import check_count, check_word
from vit.backbone import Features

TRAINED = ("none", "aggregator", "head", "all")
OUTPUTS = ("logits", "embedding", "map")


class Symmetrized(nn.Module):
    """f(x) = aggregate over t of backbone(g_t x), g_t the elements of a group; f(g x) = f(x).

    backbone: any timm, octic or torchvision classifier; what builds one, then with the keywords
        that are not of this class (num_classes, img_size, drop_path_rate, ...); or (embed, head),
        two callables with logits = head(embed(images)).
    group, fill, disc_mask, interpolation, rectangular: see `baselines.posthoc.groups`. Exact for
        the symmetries of the square that the group holds; finer angles interpolate.
    aggregator, form, aggregator_options: see `baselines.posthoc.aggregators`; among the options of
        a learned one is `dim`, the width of the head's input, where the head does not say it. One
        of yours is an `Aggregator` that has its options already.
    chunk: copies per pass of the backbone, 0 for all: the answer is the same, the memory is not.
    trained: none | aggregator | head (and a learned aggregator) | all. What is frozen stays in
        evaluation mode and takes no gradient, whatever the mode of the whole net.
    one_copy: while training, one random copy per image instead of all: a T-th of the cost.
    output: what a call gives: logits [B classes], the joined embedding [B D], or the averaged map
        of patches [B h w D]. `features` gives both of the latter in every case.
    Departs from the published code: frozen parts dropped out and moved their statistics; the device
    was fixed at construction and `train` and `eval` returned nothing.
    """

    invariant = True

    def __init__(
        self,
        backbone: Callable[..., nn.Module]
        | nn.Module
        | tuple[Callable[..., Tensor], Callable[..., Tensor]],
        group: str = "D4",
        aggregator: str | Aggregator = "mean",
        *,
        form: str = "sound",
        chunk: int = 0,
        trained: str = "all",
        one_copy: bool = False,
        output: str = "logits",
        fill: float | Sequence[float] = 0.0,
        disc_mask: bool = False,
        interpolation: str = "bilinear",
        rectangular: str = "refuse",
        aggregator_options: Mapping[str, Any] | None = None,
        **backbone_keywords: Any,
    ) -> None:
        super().__init__()
        check_word("output", output, OUTPUTS)
        check_count("chunk", chunk)
        whole = Pair(*backbone) if isinstance(backbone, tuple) else backbone
        own = keywords_of(Symmetrized)
        self.model = make_backbone(whole, backbone_keywords, "Symmetrized", own)
        self.split = find_split(self.model)
        self.group = CopyGroup(
            group,
            fill=fill,
            disc_mask=disc_mask,
            interpolation=interpolation,
            rectangular=rectangular,
        )
        width = head_width(self.split, self.model) or self._own("embed_dim")
        if "form" in (aggregator_options or {}):
            raise ValueError("form is a keyword of its own, not one of aggregator_options")
        options = {"dim": width, **(aggregator_options or {})}
        self.aggregator = make_aggregator(aggregator, form=form, **options)
        named = isinstance(aggregator, str)
        self.aggregator_name = aggregator if named else type(aggregator).__name__
        self._born_frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        self.chunk, self.one_copy, self.output = chunk, one_copy, output
        self.set_trained(trained)

    # What is computed.

    def forward(self, images: Tensor) -> Tensor:
        """The output for images [B C H W]; `output` says which."""
        if self.output == "map":
            return self._map(images)
        if self.output == "embedding":
            return self.embedding(images)
        if self.training and self.one_copy:
            return self.aggregate(self._embed(self._random_copies(images))[:, None])
        return self.aggregate(self.embeddings(images))

    def embeddings(self, images: Tensor) -> Tensor:
        """Embeddings of all copies [B T D], `chunk` copies at a time."""
        images = self.group.prepare(images)
        size = self.chunk or len(self.group)
        found = []
        for start in range(0, len(self.group), size):
            indices = range(start, min(start + size, len(self.group)))
            copies = torch.stack([self.group.copy(images, index) for index in indices], dim=1)
            found.append(self._embed(copies.flatten(0, 1)).unflatten(0, copies.shape[:2]))
        return torch.cat(found, dim=1)

    def aggregate(self, z: Tensor) -> Tensor:
        """Logits [B classes] of the copies' embeddings [B T D]."""
        if self.aggregator.level == "logit":
            logits = self.split.head(self.model, z.flatten(0, 1)).unflatten(0, z.shape[:2])
            return self.aggregator(logits)
        return self.split.head(self.model, self.aggregator(z))

    def embedding(self, images: Tensor) -> Tensor:
        """The joined embedding [B D]; the mean where the aggregator joins logits."""
        z = self.embeddings(images)
        return self.aggregator(z) if self.aggregator.level == "embedding" else z.mean(dim=1)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Features of the asked blocks (Backbone contract).

        The class tokens of all copies are joined by mean, max or sum if the aggregator is one of
        them, else by the mean: cls(g x) = cls(x). The map is the mean of the copies' maps turned
        back: map(g x) = g map(x). ValueError for a backbone without `features`.
        """
        if not inspectable(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no features(); build it by vit.adapters."
                "timm_backbone or evaluation.adapters.torchvision_backbone to have maps of patches"
            )
        joins_tokens = self.aggregator.level == "embedding" and not self.aggregator.learned
        join = self.aggregator if joins_tokens else None
        with torch.no_grad() if self._frozen() else nullcontext():
            return average_features(self.model, self.group, images, layers, self.chunk, join)

    # What is trained.

    def set_trained(self, trained: str) -> None:
        """Choose what takes gradients, see `trained`; ValueError if that would be nothing."""
        check_word("trained", trained, TRAINED)
        if trained == "aggregator" and not self.aggregator.learned:
            raise ValueError(
                f"aggregator {self.aggregator_name} has nothing to train; trained=head, all or none"
            )
        head = [p for part in self.split.parts(self.model) for p in part.parameters()]
        if trained == "head" and not head:
            raise ValueError(f"{type(self.model).__name__} has no head to train")
        self.trained = trained
        for name, parameter in self.model.named_parameters():
            # What the caller froze in the backbone stays frozen.
            parameter.requires_grad_(trained == "all" and name not in self._born_frozen)
        for parameter in head if trained == "head" else ():
            parameter.requires_grad_(True)
        self.aggregator.requires_grad_(trained != "none")
        self.train(self.training)

    def train(self, mode: bool = True) -> "Symmetrized":
        """Set the mode of what is trained; the rest stays in evaluation mode."""
        super().train(mode)
        if self.trained != "all":
            self.model.eval()
            for part in self.split.parts(self.model) if self.trained == "head" else ():
                part.train(mode)
        if self.trained == "none":
            self.aggregator.eval()
        return self

    # The interface that probes and reports read.

    @property
    def num_classes(self) -> int:
        """Logits of the backbone's head; 0 where a call gives none."""
        if self.output != "logits":
            return 0
        found = self._own("num_classes")
        return int(found if found is not None else head_classes(self.split, self.model) or 0)

    @property
    def embed_dim(self) -> int:
        """Channels of the features."""
        own = self._own("embed_dim") or self._own("num_features")
        return int(own or head_width(self.split, self.model) or 0)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self._own("patch_size") or 1)

    @property
    def depth(self) -> int:
        """Blocks that `features` can be asked for."""
        return int(self._own("depth") or 1)

    @property
    def switch(self) -> int:
        """Blocks whose maps obey the group's law: all."""
        return self.depth

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self._own("in_chans") or self.pretrained_cfg["input_size"][0])

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width the backbone was built for."""
        embed = self._own("patch_embed")
        size = self._own("img_size") or getattr(embed, "img_size", None)
        size = size or self._config().get("input_size", (3, 224, 224))[-2:]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the backbone, with names seen from this wrapper."""
        channels = self._own("in_chans") or self._config().get("input_size", (3,))[0]
        parts = {id(part): name for name, part in self.named_modules()}
        heads = [parts[id(part)] for part in self.split.parts(self.model) if id(part) in parts]
        linear = [
            f"{head}.{name}" if name else head
            for head in heads
            for name, part in self.get_submodule(head).named_modules()
            if isinstance(part, nn.Linear)
        ]
        return {
            **self._config(),
            "input_size": (channels, *self.img_size),
            "classifier": linear[-1] if linear else "",
        }

    default_cfg = pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The head, as one module."""
        parts = self.split.parts(self.model)
        return parts[0] if len(parts) == 1 else nn.ModuleList(parts)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the backbone a fresh head (0 classes: none)."""
        owner: Any = self.model if hasattr(self.model, "reset_classifier") else self._net()
        if not hasattr(owner, "reset_classifier"):
            raise ValueError(f"{type(owner).__name__} has no reset_classifier")
        owner.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        head = {id(p) for part in self.split.parts(self.model) for p in part.parameters()}
        fresh = {name for name, p in self.model.named_parameters() if id(p) in head}
        self._born_frozen -= fresh  # it was the old head that the caller froze
        self.set_trained(self.trained)

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's weights under our names: ours, the published ones, or the backbone's alone."""
        return rename_state(state, self.model, learned=self.aggregator.learned)

    def extra_repr(self) -> str:
        """The settings that its output depends on and no module inside shows."""
        return f"group={self.group!r}, output={self.output!r}"

    # Parts of the above.

    def _embed(self, copies: Tensor) -> Tensor:
        with torch.no_grad() if self._frozen() else nullcontext():
            z = self.split.embed(self.model, copies)
        return z.flatten(1) if z.ndim != 2 and z.shape[2:].numel() == 1 else z

    def _map(self, images: Tensor) -> Tensor:
        patches = self.features(images)[0].patches
        if patches is None:
            raise ValueError(f"{type(self.model).__name__} gives no map of patches to average")
        return patches

    def _random_copies(self, images: Tensor) -> Tensor:
        images = self.group.prepare(images)
        drawn = torch.randint(len(self.group), (len(images),), device=images.device)
        copies = torch.empty_like(images)
        for index in drawn.unique().tolist():
            copies[drawn == index] = self.group.copy(images[drawn == index], index)
        return copies

    def _frozen(self) -> bool:
        """Whether nothing before the head takes a gradient."""
        return self.trained != "all"

    def _net(self) -> nn.Module:
        return getattr(self.model, "net", self.model)

    def _own(self, name: str) -> Any:
        """An attribute of the backbone, or of the net in its adapter."""
        found = getattr(self.model, name, None)
        return getattr(self._net(), name, None) if found is None else found

    def _config(self) -> dict[str, Any]:
        return dict(self._own("pretrained_cfg") or self._own("default_cfg") or {})


symmetrized = Symmetrized  # its name in configs


def inspectable(model: nn.Module) -> bool:
    """Whether a model has the Backbone contract's `features`, and not just a layer of that name."""
    return callable(getattr(model, "features", None)) and not isinstance(model.features, nn.Module)

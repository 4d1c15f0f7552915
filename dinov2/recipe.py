"""The DINOv2 recipe: a student learns to predict, from parts of an image, its teacher's output.

Oquab et al. 2023. The student sees global crops with masked patches and small local crops, the
teacher (its moving average) sees the global crops whole. Letters in shapes: B images of a
micro-batch, n local crops each, N patches, U rows of masked patches, D channels, K prototypes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinov2.centering import Targets
from dinov2.crops import MultiCrop
from dinov2.fast_crops import FastMultiCrop
from dinov2.head import DINOHead
from dinov2.losses import CrossEntropy, dino_loss, ibot_loss, koleo_loss
from dinov2.masking import Collate, MaskSampler
from dinov2.param_groups import param_groups
from dinov2.schedules import Schedules
from dinov2.weights import load_start, read_start
from utils.data.colour_plan import finished
from utils.data.images import ImageDataset
from utils.data.loaders import check_loading, training_batches
from utils.distributed import rank, world_size
from utils.effective_batch import count_steps
from utils.moving_average import MovingAverage
from utils.parallel import blocks_of
from utils.ranges import check_count, check_range
from vit.backbone import Encoded, check_whole_patches

NUM_GLOBAL_CROPS = 2


class DINOv2(nn.Module):
    """Student, teacher, their heads and centres: all that a run saves (see `utils.recipe`).

    backbone: makes the network; called as `backbone(drop_path_rate=...)`, it must offer `encode`
        with masks. dataset: gives PIL images.
    epochs, epoch_length: a run has epochs * epoch_length steps; epoch_length <= 0 means one pass
        over the data set at the effective batch, batch_size_per_gpu * ranks * accumulation.
    accumulation: micro-batches per step. Cross entropies and the centre come out as on that many
        times more ranks; KoLeo and Sinkhorn-Knopp look at one micro-batch at a time.
    dino_head, ibot_head: keywords of `dinov2.head.DINOHead`; the latter counts if separate_head and
        the iBOT loss has a weight.
    """

    def __init__(
        self,
        *,
        backbone: Callable[..., nn.Module],
        dataset: ImageDataset,
        epochs: float = 100,
        epoch_length: int = 0,
        batch_size_per_gpu: int = 64,
        accumulation: int = 1,
        drop_path_rate: float | None = 0.3,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        koleo_loss_weight: float = 0.1,
        centering: str = "centering",
        separate_head: bool = False,
        dino_head: Mapping[str, Any] | None = None,
        ibot_head: Mapping[str, Any] | None = None,
        layerwise_decay: float = 0.9,
        patch_embed_lr_multiplier: float = 0.2,
        published_param_groups: bool = False,
        crops: MultiCrop | FastMultiCrop | None = None,
        masks: MaskSampler | None = None,
        schedules: Schedules | None = None,
        sampler: str = "shuffled",
        num_workers: int = 10,
        on_error: str = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("batch_size_per_gpu", batch_size_per_gpu, 1)
        check_count("accumulation", accumulation, 1)
        batch_size = batch_size_per_gpu * accumulation * world_size()
        self.epoch_length, self.total_steps = count_steps(
            epochs, epoch_length, images=len(dataset), batch_size=batch_size
        )
        check_range("layerwise_decay", layerwise_decay, 0, 1)
        check_range("patch_embed_lr_multiplier", patch_embed_lr_multiplier)
        check_range("dino_loss_weight", dino_loss_weight)
        check_range("ibot_loss_weight", ibot_loss_weight)
        check_range("koleo_loss_weight", koleo_loss_weight)
        if not (dino_loss_weight or ibot_loss_weight or koleo_loss_weight):
            raise ValueError("all loss weights are 0: there is nothing to learn")
        self.dataset = dataset
        self.accumulation = accumulation
        self.batch_size_per_gpu = batch_size_per_gpu
        self.dino_loss_weight = dino_loss_weight
        self.ibot_loss_weight = ibot_loss_weight
        self.koleo_loss_weight = koleo_loss_weight
        self.grouping: dict[str, Any] = {
            "layerwise_decay": layerwise_decay,
            "patch_embed_lr_multiplier": patch_embed_lr_multiplier,
            "published": published_param_groups,
        }
        self.loading: dict[str, Any] = {
            "sampler": sampler,
            "num_workers": num_workers,
            "on_error": on_error,
            "seed": seed,
        }
        check_loading(**self.loading)
        self.crops = crops or MultiCrop()
        self.masks = masks or MaskSampler()

        heads = {"dino_head": dino_head or {}}
        if separate_head and ibot_loss_weight:
            heads["ibot_head"] = ibot_head or {}

        def network(rate: float | None) -> nn.Module:
            # One without stochastic depth takes no rate.
            return backbone() if drop_path_rate is None else backbone(drop_path_rate=rate)

        self.student = _make_parts(network(drop_path_rate), heads)
        self.teacher = _make_parts(network(0.0), heads)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self._average = MovingAverage(self.teacher, self.student)
        head = self.student["dino_head"]
        self.dino_targets = Targets(head.num_prototypes, centering=centering)
        head = self.student["ibot_head" if "ibot_head" in heads else "dino_head"]
        self.ibot_targets = Targets(head.num_prototypes, centering=centering)
        self.cross_entropy = CrossEntropy()
        self.grid = self._grid()

        self.schedules = (schedules or Schedules()).build(
            epochs=epochs, epoch_length=self.epoch_length, batch_size=batch_size
        )
        self.train()

    # What the loop calls.

    @property
    def exported(self) -> nn.Module:
        """The network that is exported and probed: the teacher's backbone."""
        return self.teacher["backbone"]

    @property
    def image_size(self) -> int:
        """Pixels a side of the global crops."""
        return self.crops.global_crops_size

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the student."""
        return param_groups(self.clipped_parts(), **self.grouping)

    def clipped_parts(self) -> dict[str, nn.Module]:
        """The student's parts, each clipped by its own gradient norm."""
        return dict(self.student.items())

    def parallelize(self, wrap: Callable[..., nn.Module]) -> None:
        """Let the loop shard and compile each part of student and teacher."""
        for parts in (self.student, self.teacher):
            for name, part in parts.items():
                parts[name] = wrap(part, units=blocks_of(part))
        self._average = MovingAverage(self.teacher, self.student)
        # These have nothing to shard, but pass over all logits and pixels: worth compiling.
        loose = [self.cross_entropy, self.dino_targets.ema, self.ibot_targets.ema]
        colours = getattr(self.crops, "colours", None)
        for module in loose if colours is None else [*loose, colours]:
            wrap(module)

    def batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches (see `dinov2.masking.Collate`) from a step on, without end."""
        return training_batches(
            self.dataset,
            self.crops,
            Collate(self.masks, self.grid),
            self.batch_size_per_gpu,
            first_step=first_step,
            rank=rank(),
            world_size=world_size(),
            micro_batches=self.accumulation,
            **self.loading,
        )

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Finish the augmentation on the device."""
        return finished(self.crops, batch)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Losses of a micro-batch; `loss` is optimised, the rest is shown."""
        # The teacher first: what it computes is freed before the student keeps all of its own.
        targets = self._targets(batch, step)
        crops = [batch["global_crops"]]
        if "local_crops" in batch:
            crops.append(batch["local_crops"])
        masks = [batch["masks"], None][: len(crops)]
        return self.losses_of(self.student["backbone"].encode(crops, masks), targets, batch)

    def losses_of(
        self,
        encoded: Sequence[Encoded],
        targets: tuple[Tensor, Tensor],
        batch: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Losses of the student's tokens: the place for terms of one's own on them.

        encoded: of the 2B global crops, patches masked, then of the nB local ones, if any. targets:
        of classes [2 B K], the teacher's two crops swapped, and of masked patches [U K].
        The names and scales shown are the published ones: koleo_loss and ibot_loss are half of what
        is optimised, and total_loss is the sum of the four shown, without their weights.
        """
        class_targets, patch_targets = targets
        num_images = len(batch["global_crops"])  # 2B
        rows, weights = self._masked(batch)
        tokens = torch.cat([crop.cls for crop in encoded])
        class_logits, patch_logits = self._project(
            self.student, tokens, _rows_of(encoded[0].patches, rows)
        )
        dino_global, dino_local = self._dino_losses(class_logits, class_targets)
        entropy = self.cross_entropy
        ibot = ibot_loss(patch_logits, patch_targets, weights, num_images, cross_entropy=entropy)
        first, second = encoded[0].cls.chunk(NUM_GLOBAL_CROPS)
        koleo = self.koleo_loss_weight * (koleo_loss(first) + koleo_loss(second))
        loss = (
            self.dino_loss_weight * (dino_global + dino_local)
            + self.ibot_loss_weight * ibot
            + koleo
        )
        shown = {
            "dino_local_crops_loss": dino_local,
            "dino_global_crops_loss": dino_global,
            "koleo_loss": koleo / 2,
            "ibot_loss": ibot / 2,
        }
        shown["total_loss"] = torch.stack(list(shown.values())).sum()
        return {"loss": loss} | {name: value.detach() for name, value in shown.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, and the centres. Every rank must call this."""
        self._average.update(1 - self.schedules["momentum"](step))
        self.dino_targets.update()
        self.ibot_targets.update()

    def load_weights(self, path: str) -> None:
        """Weights of student and teacher from a file: a backbone, or a backbone with its heads."""
        start = read_start(path)
        for parts in (self.student, self.teacher):
            load_start(parts, start, path)
        # Heads that the file lacks are new, and must be the same in both.
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self._average = MovingAverage(self.teacher, self.student)  # adapted to the file

    def train(self, mode: bool = True) -> "DINOv2":
        """Set the student's mode; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    # Parts of a step.

    def _masked(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Flat positions [U] of masked patches and their weights; none where iBOT has no weight."""
        rows = batch["mask_indices"] if self.ibot_loss_weight else batch["mask_indices"][:0]
        return rows, batch["mask_weights"][: len(rows)]

    @torch.no_grad()
    def _targets(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Class targets [2 B K], the teacher's two crops swapped, and patch targets [U K]."""
        rows, weights = self._masked(batch)
        encoded = self.teacher["backbone"].encode([batch["global_crops"]], [None])[0]
        first, second = encoded.cls.chunk(NUM_GLOBAL_CROPS)
        tokens = torch.stack([second, first]).flatten(0, 1)
        class_logits, patch_logits = self._project(
            self.teacher, tokens, _rows_of(encoded.patches, rows)
        )
        temperature = self.schedules["teacher_temp"](step)
        class_targets, patch_targets = class_logits[:0], patch_logits[:0]
        if self.dino_loss_weight:
            class_targets = self.dino_targets(class_logits, temperature)
        if self.ibot_loss_weight:
            patch_targets = self.ibot_targets(patch_logits, temperature, weights > 0)
        return class_targets.unflatten(0, (NUM_GLOBAL_CROPS, -1)), patch_targets

    def _project(
        self, parts: nn.ModuleDict, tokens: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of class tokens and of masked patches; a shared head is called once."""
        if "ibot_head" in parts:
            return parts["dino_head"](tokens), parts["ibot_head"](patches)
        logits = parts["dino_head"](torch.cat([tokens, patches]))
        return logits.split([len(tokens), len(patches)])

    def _dino_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the global and of the local crops: together the mean over all pairs of crops.

        logits: of the 2B global, then the nB local crops.
        Departs from DINOv2: without local crops the global pairs are all that is averaged; there
        one pair more is counted than there are (and its collation fails before that).
        """
        if not self.dino_loss_weight:
            return logits.new_zeros(()), logits.new_zeros(())
        num_images = targets[0].shape[0]  # B
        logits = logits.unflatten(0, (-1, num_images))  # [2+n B K]
        num_local = len(logits) - NUM_GLOBAL_CROPS
        loss = partial(dino_loss, cross_entropy=self.cross_entropy)
        num_pairs = NUM_GLOBAL_CROPS * (NUM_GLOBAL_CROPS - 1 + num_local)
        local = loss(logits[NUM_GLOBAL_CROPS:], targets) / num_pairs
        paired = logits[:NUM_GLOBAL_CROPS].flatten(0, 1)[None]
        same = loss(paired, targets.flatten(0, 1)[None]) * NUM_GLOBAL_CROPS / num_pairs
        return same, local

    def _grid(self) -> tuple[int, int]:
        """Patches of a global crop; ValueError if a crop is no whole number of patches."""
        patch = self.student["backbone"].patch_size
        sizes = {"global_crops_size": self.crops.global_crops_size}
        if self.crops.local_crops_number:
            sizes["local_crops_size"] = self.crops.local_crops_size
        for name, size in sizes.items():
            check_whole_patches((size, size), patch, f"crops.{name}")
        side = self.crops.global_crops_size // patch
        return side, side


def _make_parts(backbone: nn.Module, heads: Mapping[str, Mapping[str, Any]]) -> nn.ModuleDict:
    """Backbone and heads of a student or a teacher."""
    if not hasattr(backbone, "encode"):
        raise ValueError(
            "DINOv2 needs a backbone that encodes crops with masks, such as the DINOv2 models of "
            f"octic and vit; {type(backbone).__name__} has no encode()"
        )
    batch_norms = [name for name, m in backbone.named_modules() if isinstance(m, _BatchNorm)]
    if batch_norms:
        raise ValueError(
            f"DINOv2 cannot train batch norms ({', '.join(batch_norms)}): "
            "masked and unmasked crops would share their statistics"
        )
    made = {name: DINOHead(backbone.embed_dim, **keywords) for name, keywords in heads.items()}
    return nn.ModuleDict({"backbone": backbone, **made})


def _rows_of(patches: Tensor, rows: Tensor) -> Tensor:
    """Patch tokens [U D] at flat positions of [2B N D]."""
    return patches.flatten(0, 1).index_select(0, rows)

"""The attentive probe of capi (Darcet et al. 2025): linear and attentive heads on frozen features.

It differs from the linear probe: there are also heads that attend to all patches, AdamW trains with
weight decay, and the head of each representation is chosen on a held-out tenth of the training
images.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.features.cache import net_fingerprint
from evaluation.features.dataset import evaluating, full_float32_products
from evaluation.probes.attentive_heads import REPRESENTATIONS, AttentiveHeads, make_grid
from evaluation.probes.exams import HELD_OUT, Exam, TestSet, count_classes, prepare_exam
from evaluation.probes.files import ProbeFiles
from evaluation.probes.head_results import by_head, print_heads
from evaluation.probes.run import HeadRun
from evaluation.probes.training import HeadTraining, best_head
from utils import distributed
from utils.data.images import ImageDataset, Subset
from utils.errors import UserError
from utils.ranges import check_list, check_range, check_words
from utils.results_file import write_results
from utils.schedules import Cosine, scale_lr
from vit.backbone import Backbone

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
WEIGHT_DECAYS = (5e-4, 1e-3, 5e-2)
SPLIT_SEED = 42


class AttentiveProbe:
    """Evaluate the best head of each representation on data.val; callable as a probe.

    representations, all of the last block after the final norm: "cls", the class token, and
    "avg_patch", the mean patch, both with linear heads; "patch", all patches, with attentive heads.
    Base rates are for 256 images per step; a linear warm-up of `warmup_epochs` comes before half a
    cosine, which is 0 at the last step.
    Departs from capi: the images of a step are the same on any number of processes, and the fourth
    representation, which capi's code adds by mistake, is left out.
    """

    needs_labels = True

    def __init__(
        self,
        *,
        representations: Sequence[str] = REPRESENTATIONS,
        learning_rates: Sequence[float] = RATES,
        weight_decays: Sequence[float] = WEIGHT_DECAYS,
        epochs: int = 10,
        epoch_length: int | None = None,
        warmup_epochs: int = 1,
        global_batch_size: int = 1024,
        sampler: str = "shuffled",
        seed: int = 0,
        resize_size: int | None = None,
        crop_size: int | None = None,
        transform: Callable | None = None,
        train_transform: Callable | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        precision: str = "fp32",
        resume: bool = True,
        on_error: str = "raise",
    ) -> None:
        check_words("representations", representations, REPRESENTATIONS)
        check_range("warmup_epochs", warmup_epochs, 0, epochs)
        self.representations = [name for name in REPRESENTATIONS if name in representations]
        self.learning_rates = check_list("learning_rates", learning_rates, 0, ends="()")
        self.weight_decays = check_list("weight_decays", weight_decays, 0)
        self.warmup_epochs, self.resume = warmup_epochs, resume
        self.given = HeadTraining(
            epochs=epochs,
            epoch_length=epoch_length,
            global_batch_size=global_batch_size,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            sampler=sampler,
            seed=seed,
            resize_size=resize_size,
            crop_size=crop_size,
            transform=transform,
            train_transform=train_transform,
            on_error=on_error,
        )
        self.training = self.given  # completed from the data and the net when called
        self.counts: dict[str, int] = {}  # of images, when they were judged

    def __call__(
        self, net: Backbone, data: Mapping[str, ImageDataset], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Percentages by flat name; every rank must call this. Writes `results.json` and heads."""
        folder, num_classes = Path(output_dir), count_classes(data["train"])
        val = prepare_exam(
            TestSet("val", data["val"], "mean_accuracy", None),
            trained_on=data["train"],
            num_classes=num_classes,
        )
        self.training = self.given.on(len(data["train"])).sized(net)
        train_set, held_out = split_off_tenth(data["train"])
        with evaluating(net) as device, full_float32_products(device):
            run = self._prepare(net, num_classes, train_set, folder, step, device)
            for _ in run.train(resume=self.resume):
                pass
            return self._report(run, Exam(HELD_OUT, held_out), val, data, folder, step)

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        return self.training_protocol | self.counts

    @property
    def training_protocol(self) -> dict[str, object]:
        """What the trained heads depend on."""
        return {
            "probe": "attentive",
            "feature": f"{', '.join(self.representations)} of the last block after the final norm",
            "vote": "the best head of each representation on a held-out tenth of train",
            "learning_rates": self.learning_rates,
            "weight_decays": self.weight_decays,
            "optimizer": f"AdamW, betas 0.9 and 0.95, warm-up of {self.warmup_epochs} epochs, half "
            "cosine to 0",
            **self.training.protocol(),
        }

    def _prepare(
        self,
        net: Backbone,
        num_classes: int,
        train_set: ImageDataset,
        folder: Path,
        step: int,
        device: torch.device,
    ) -> HeadRun:
        batch_size = self.training.global_batch_size
        rates = [scale_lr(rate, "linear_wrt_256", batch_size) for rate in self.learning_rates]
        heads = AttentiveHeads(
            make_grid(self.representations, rates, self.weight_decays),
            embed_dim=net.embed_dim,
            num_classes=num_classes,
            generator=torch.Generator().manual_seed(self.training.seed),
        ).to(device)
        optimizer = torch.optim.AdamW(heads.param_groups(), betas=(0.9, 0.95))
        training = self.training
        schedule = warm_cosine(
            training.num_steps, warmup_steps=self.warmup_epochs * training.steps_per_epoch
        )
        owner = {"net": net_fingerprint(net), "step": step}
        files = ProbeFiles(
            folder,
            owner | {"protocol": self.training_protocol | {"train_images": len(train_set)}},
            running="running_checkpoint_attentive_eval",
            final="attentive_model_final",
            pointer="last_attentive_checkpoint",
        )
        return HeadRun(
            net,
            heads,
            optimizer,
            schedule,
            train_set,
            self.training,
            files,
            label="attentive probe",
        )

    def _report(
        self,
        run: HeadRun,
        held_out: Exam,
        val: Exam,
        data: Mapping[str, ImageDataset],
        folder: Path,
        step: int,
    ) -> dict[str, float]:
        chosen_by, by_k = run.judge(held_out), run.judge(val)
        self.counts = run.count_images(data)
        names, figures, best = run.heads.names, {}, {}
        per_representation = len(names) // len(self.representations)
        for number, representation in enumerate(self.representations):
            first = number * per_representation
            index = first + best_head(chosen_by[1][first : first + per_representation])
            best[representation] = names[index]
            for k, fractions in by_k.items():
                figures[f"attentive_{representation}_top{k}"] = 100 * fractions[index].item()
        if distributed.is_main():
            heads = by_head(names, {"val": by_k, held_out.name: chosen_by})
            protocol = self.protocol | {"step": step, "world_size": distributed.world_size()}
            results = {**figures, "best": best, "heads": heads}
            write_results(folder, "attentive", protocol=protocol, figures=results)
            print_heads(names, chosen_by, held_out.name, protocol)
        return figures


def warm_cosine(num_steps: int, *, warmup_steps: int) -> Cosine:
    """capi's schedule as a factor: 0 at the first step, 1 after the warm-up, 0 at the last step.

    If only one step follows the warm-up, its factor is 1.
    """
    end = max(num_steps - 1, warmup_steps + 1)  # where the cosine is 0; `Cosine` comes one later
    return Cosine(base=1.0, final=0.0, num_steps=end, warmup_steps=warmup_steps)


def split_off_tenth(dataset: ImageDataset) -> tuple[Subset, Subset]:
    """Split into nine tenths and one tenth, as in capi: the end of a fixed permutation.

    Nine tenths are rounded to the nearest integer, halves to even. UserError below ten images.
    """
    count = len(dataset)
    if count < 10:
        raise UserError(f"{dataset!r}: {count} images are too few to set a tenth apart")
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    kept = round(0.9 * count)
    return Subset(dataset, order[:kept]), Subset(dataset, order[kept:])

"""A probe that measures images per second and multiply-adds of a net.

It is for one net, beside its accuracy (EViT's and DHVT's `--test_speed`). To compare nets, use
experiments/complexity.py, which measures them in turn and so more fairly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.cost.peaks import device_name
from evaluation.cost.timing import INFERENCE, Contestant, Turn, speed_of
from evaluation.features.dataset import PRECISIONS
from evaluation.image_size import image_size_of
from evaluation.progress import say
from utils import distributed
from utils.errors import UserError
from utils.flops import count_one_image
from utils.ranges import check_count, check_sizes, check_word


class ThroughputProbe:
    """Time the net on random images, without gradients; no images of the data are read.

    steps: timed batches of `batch_size` images in each of `repeats` measurements, the first of
    which is discarded. input_size: None is the net's own. UserError in several processes.
    Departs from EViT: without autograd, and an untimed step precedes each measurement.
    """

    splits = ()

    def __init__(
        self,
        *,
        batch_size: int = 64,
        steps: int = 100,
        repeats: int = 3,
        input_size: int | None = None,
        precision: str = "fp32",
    ) -> None:
        if distributed.world_size() > 1:  # told before a training or the other probes, not after
            raise UserError("speed is that of one process; start one, without --ngpus and --nodes")
        check_word("precision", precision, PRECISIONS)
        check_count("batch_size", batch_size, 1)
        check_count("steps", steps, 1)
        check_count("repeats", repeats, 2)
        check_sizes(input_size=input_size)
        self.batch_size, self.steps, self.repeats = batch_size, steps, repeats
        self.input_size, self.precision = input_size, precision

    def __call__(
        self, net: nn.Module, data: Mapping[str, Any], output_dir: Path, step: int = 0
    ) -> dict[str, float]:
        """Images per second and giga multiply-adds."""
        found: list[Turn] = []
        size, training = self.input_size or image_size_of(net), net.training
        device = next(net.parameters()).device
        images = torch.randn(self.batch_size, getattr(net, "in_chans", 3), size, size)
        timed = Contestant(net, images.to(device), dtype=PRECISIONS[self.precision])
        say(f"timing {self.repeats} x {self.steps} batches (probes.throughput.steps)")
        try:
            for _ in range(self.repeats):
                found.append(timed.turn(INFERENCE, self.steps))
            macs = count_one_image(net, size, backward=False).forward / 2e9
        finally:
            net.train(training)
        speed = speed_of(found[1:], self.batch_size)
        count = f"{macs:.3f} G" if macs >= 1e-3 else f"{1e3 * macs:.3f} M"
        say(
            f"{speed.images_per_second:.1f} img/s (batch {self.batch_size}, {size} x {size}, "
            f"{self.precision}, {device_name(device)}), {count} multiply-adds"
        )
        return {"images_per_second": speed.images_per_second, "gmacs": macs}

    @property
    def protocol(self) -> dict[str, object]:
        """What the figures depend on."""
        keys = ("batch_size", "steps", "repeats", "precision", "input_size")
        return {"probe": "throughput", **{key: getattr(self, key) for key in keys}}

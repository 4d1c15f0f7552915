"""Train a plain and an octic ViT for two steps with the switches of a config, alone or in company.

Run as a program (under torchrun) it does so for a list of cases and writes what came of each.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octic.models import hybrid_dinov2_vit_small_patch16
from utils import distributed, layout, parallel
from utils.communication import Communication
from utils.joining import session
from utils.precision import Precision
from vit.models import dinov2_vit_small_patch16

NETS = {"plain": dinov2_vit_small_patch16, "octic": hybrid_dinov2_vit_small_patch16}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "init_values": 0.1}
IMAGES, MICRO_BATCHES = 16, 2


class Pair(nn.Module):
    """A student that is trained and a teacher that only runs, as in a recipe."""

    def __init__(self, name: str, depth: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = NETS[name]
        self.student = make(**SMALL, depth=depth, num_classes=3).to(device)
        self.teacher = make(**SMALL, depth=depth, num_classes=0).to(device).requires_grad_(False)

    def loss(self, images: Tensor, number: int) -> Tensor:
        """Through `encode` in the first micro-batch, through `forward` in the next."""
        with torch.no_grad():
            goal = self.teacher.encode([images])[0].cls
        if number:
            return self.student(images).float().logsumexp(-1).mean() + goal.mean()
        encoded = self.student.encode([images])[0]
        return (encoded.cls - goal).float().square().mean() + encoded.patches.float().mean()


def train(
    name: str, *, precision: str = "fp32", depth: int = 2, device: str = "cpu", **switches: Any
) -> dict[str, Any]:
    """Losses, weights, gradients of the first step, and what was sent in it."""
    place = torch.device(device)
    pair, mode = Pair(name, depth, place), Precision(precision, place)
    wrap = parallel.make_wrap(place, mode, **switches)
    for net in (pair.student, pair.teacher):
        wrap(net, units=list(net.blocks))
    reduction = parallel.Gradients(pair)
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses, gradients, messages = [], {}, []
    for step in range(2):
        whole = torch.randn(IMAGES, 3, 32, 32, generator=generator).to(place)
        total = torch.zeros((), device=place)
        with Communication() as sent:
            for number, batch in enumerate(whole.chunk(MICRO_BATCHES)):
                part = batch.chunk(distributed.world_size())[distributed.rank()]
                reduction.set_sync(number == MICRO_BATCHES - 1)
                with mode.autocast():
                    loss = pair.loss(part, number) / MICRO_BATCHES
                loss.backward()
                total += loss.detach()
            reduction.finish()
        losses.append(float(distributed.all_reduce_mean(total)))
        if step == 0:
            messages = sent.messages
            gradients = {n: layout.whole(p.grad).cpu() for n, p in pair.student.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(pair.student.named_parameters())
    kinds = Counter((m.kind, str(m.dtype).removeprefix("torch.")) for m in messages)
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": {n: layout.whole(p.detach()).cpu() for n, p in parameters.items()},
        "sharded": sum(isinstance(p, DTensor) for p in parameters.values()) / len(parameters),
        "held": sum(layout.local(p).numel() for p in parameters.values()),
        "kinds": {f"{kind} {dtype}": count for (kind, dtype), count in kinds.items()},
        "bytes": dict(sum((Counter({m.kind: m.payload}) for m in messages), Counter())),
        "dtypes": sorted({str(p.dtype) for p in parameters.values()}),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(2, int(os.environ["WORLD_SIZE"])))  # two make a node
    with session(sys.argv[3]):
        for number, case in enumerate(json.loads(sys.argv[1])):
            found = train(**case)
            if distributed.is_main():
                torch.save(found, Path(sys.argv[2]) / f"{number}.pt")

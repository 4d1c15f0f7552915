"""A net and a data set small enough for tests, and a way to run a function in several processes."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing
from PIL import Image
from torch import Tensor, nn

from utils.data.images import ImageError
from utils.joining import session
from vit.backbone import Features


class ToyNet(nn.Module):
    """Linear features of 8 x 8 images, with 4 x 4 patches."""

    embed_dim, patch_size = 6, 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(6, 3 * 16, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def features(self, images: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        patches = self.dropout(patches @ self.weight.T)
        return [Features(cls=patches.mean(dim=(1, 2)), patches=patches) for _ in layers]


class ToyImages:
    """Noisy images of a colour per class."""

    def __init__(self, length: int, seed: int, num_classes: int = 6, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(num_classes, (length,), generator=generator).numpy()
        colours = torch.randint(
            256, (num_classes, 1, 1, 3), generator=torch.Generator().manual_seed(9)
        )
        noise = torch.randn(length, 8, 8, 3, generator=generator) * 40
        self.pixels = (colours[self.labels] + noise).clamp(0, 255).byte().numpy()
        self.labelled = labelled
        self.class_names = [f"colour {index}" for index in range(num_classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def label(self, index: int) -> int | None:
        return int(self.labels[index]) if self.labelled else None

    def path(self, index: int) -> str:
        return f"toy {index}"


class Damaged(ToyImages):
    """Every fifth image cannot be read."""

    def read(self, index: int) -> Image.Image:
        if index % 5 == 4:
            raise ImageError(self.path(index), "damaged")
        return super().read(index)


def to_tensor(image: Image.Image) -> Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(8, 8, 3)
        .permute(2, 0, 1)
        .float()
        / 255
    )


def in_processes(function: Callable[[], object], count: int, folder: Path) -> list[object]:
    """Results (as JSON) of `function` in `count` gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A server that has imported what most of them need forks them: seconds less for each process.
    multiprocessing.set_forkserver_preload(["evaluation.judge", "octic.models"])
    torch.multiprocessing.start_processes(
        _one, (function, count, port, folder), nprocs=count, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _one(rank: int, function: Callable[[], object], count: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with session("cpu"):
        (folder / f"{rank}.json").write_text(json.dumps(function()))

"""Images per second of each stage of the data path, on one core and on the device.

Stages take turns, round by round, so that they share whatever else the machine does.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Generator

from evaluation.cost.peaks import device_name, synchronize
from evaluation.progress import say
from evaluation.results import print_table, write_measured
from utils import distributed
from utils.config.build import build, plain
from utils.data.colour_plan import finished
from utils.data.encoded import EncodedImage
from utils.data.images import ImageFolder, read_image
from utils.joining import session
from utils.parallel import to_device
from utils.randomness import seed_cpu
from utils.ranges import check_count, check_path

SIZE = (500, 375)  # width and height of ImageNet's usual photograph
QUALITY = 95  # about 90 kB
WORKER, DEVICE = "worker", "device"
READING, DECODING = "reading", "decoding"


class Stage(NamedTuple):
    """One thing done to images; `run` does it to so many of them, where `place` says."""

    pipeline: str
    name: str
    place: str
    images: int
    run: Callable[[], object]
    before: Callable[[], None] = lambda: None  # untimed


def measure(config: Mapping[str, Any]) -> dict[str, float]:
    """Time the stages of `config["pipelines"]` (the keys of configs/bench_data.yaml).

    Prints images per second of each stage, and their ratios to the first one's; returns the rates
    by "pipeline/stage/place". UserError for invalid settings.
    """
    config = dict(plain(config))
    for key, least in (("images", 1), ("batch_size", 1), ("rounds", 1), ("reading", 0)):
        check_count(key, config[key], least)
    for key in ("root", "scratch", "json_file"):
        if config.get(key) is not None:
            check_path(key, config[key])
    with session(config["device"]) as device, _one_thread():
        rates: dict[str, float] = {}
        if distributed.is_main():
            files = _files(config["root"], config["images"])
            seed_cpu(config["seed"])
            with _reading(files, config) as stages:
                stages += _decoders(files)
                for name, pipeline in config["pipelines"].items():
                    stages += _stages(name, pipeline, files, config["batch_size"], device)
                found = _time(stages, config["rounds"], device)
            rates = _report(stages, found, config, device, files)
        distributed.barrier()
    return rates


def _files(root: str | None, count: int) -> list[EncodedImage]:
    if root is not None:
        folder = ImageFolder(root, labels=False)
        chosen = np.linspace(0, len(folder) - 1, min(count, len(folder))).astype(int).tolist()
        return [EncodedImage(folder.read_bytes(index), folder.path(index)) for index in chosen]
    from sklearn.datasets import load_sample_image

    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        image = photographs[number % 2]
        left, top = (int(rng.integers(0, side // 8)) for side in image.size)
        part = image.crop((left, top, image.width - left, image.height - top))
        file = io.BytesIO()
        part.resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
        files.append(EncodedImage(file.getvalue(), f"photograph {number}"))
    return files


@contextmanager
def _reading(files: list[EncodedImage], config: Mapping[str, Any]) -> Iterator[list[Stage]]:
    """The stages of reading from disk; none with reading=0."""
    if not config["reading"]:
        yield []
        return
    from evaluation.cost.reading import stores

    count, scratch = config["reading"], config["scratch"]
    with stores(files, count, scratch) as found:
        yield [Stage(READING, s.name, WORKER, count, s.read, s.forget) for s in found]


def _decoders(files: list[EncodedImage]) -> list[Stage]:
    def ours(data: bytes, name: str) -> None:
        # Another format than JPEG is decoded when the object is made.
        EncodedImage(data, name).decode()

    return [
        Stage(DECODING, "Pillow", WORKER, len(files), _for_each(files, _read)),
        Stage(DECODING, "ours", WORKER, len(files), _for_each(files, ours)),
    ]


def _stages(
    name: str,
    pipeline: Mapping[str, Any],
    files: list[EncodedImage],
    batch_size: int,
    device: torch.device,
) -> list[Stage]:
    collate = build(pipeline["collate"])
    stages = []
    for kind, node in pipeline["transforms"].items():
        transform = build(node)
        stages.append(Stage(name, kind, WORKER, len(files), _worker(transform, files)))
        if getattr(transform, "takes_encoded", False):
            samples = [(transform(files[i % len(files)]), 0) for i in range(batch_size)]
            batch = to_device(collate(samples, Generator().manual_seed(0)), device)
            stages.append(
                Stage(name, kind, DEVICE, batch_size, partial(finished, transform, batch))
            )
    return stages


def _for_each(files: list[EncodedImage], do: Callable[[bytes, str], object]) -> Callable[[], None]:
    def work() -> None:
        for file in files:
            do(file.data, file.name)

    return work


def _worker(transform: Callable[[Any], Any], files: list[EncodedImage]) -> Callable[[], None]:
    encoded = getattr(transform, "takes_encoded", False)
    image: Callable[[bytes, str], Any] = EncodedImage if encoded else _read
    return _for_each(files, lambda data, name: transform(image(data, name)))


def _read(data: bytes, name: str) -> Image.Image:
    return read_image(io.BytesIO(data), name=name)


def _time(stages: list[Stage], rounds: int, device: torch.device) -> list[list[float]]:
    """Images per second of each stage in each round."""
    rates: list[list[float]] = [[] for _ in stages]
    for round in range(rounds + 1):
        say(f"round {round} of {rounds}" if round else "warming up")
        for stage, found in zip(stages, rates, strict=True):
            stage.before()
            synchronize(device)
            start = time.perf_counter()
            stage.run()
            synchronize(device)
            if round:
                found.append(stage.images / (time.perf_counter() - start))
    return rates


def _report(
    stages: list[Stage],
    rates: list[list[float]],
    config: Mapping[str, Any],
    device: torch.device,
    files: list[EncodedImage],
) -> dict[str, float]:
    published = {
        stage.pipeline: found
        for stage, found in zip(stages, rates, strict=True)
        if _first(stage, stages)
    }
    figures, rows = {}, []
    for stage, found in zip(stages, rates, strict=True):
        rate = statistics.median(found)
        figures[f"{stage.pipeline}/{stage.name}/{stage.place}"] = rate
        times = [own / other for own, other in zip(found, published[stage.pipeline], strict=True)]
        ratio = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        compared = stage.place == WORKER and not _first(stage, stages)
        where = "one core" if stage.place == WORKER else device_name(device)
        rows.append(
            (
                stage.pipeline,
                stage.name,
                where,
                f"{rate:.0f}",
                1000 / rate,
                ratio if compared else "-",
            )
        )
    sizes = sorted(len(file.data) for file in files)
    protocol = {
        "images": f"{len(files)} of {config['root'] or 'sklearn, 500 x 375 JPEG'}",
        "median_kb": round(sizes[len(sizes) // 2] / 1000, 1),
        "rounds": config["rounds"],
        "batch_size": config["batch_size"],
        "machine": f"{device_name(torch.device('cpu'))}, one thread",
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Pillow {PIL.__version__}",
        "date": date.today().isoformat(),
    }
    columns = ["pipeline", "by", "on", "images/s", "ms an image", "times the first"]
    words = "; ".join(f"{key}: {value}" for key, value in protocol.items())
    print_table("data path", columns, rows, protocol=words)
    if config["json_file"]:
        path = Path(config["json_file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"figures: {write_measured(path, protocol, figures=figures)}")
    return figures


def _first(stage: Stage, stages: list[Stage]) -> bool:
    """Whether it is the published stage of its pipeline."""
    return stage is next(other for other in stages if other.pipeline == stage.pipeline)


@contextmanager
def _one_thread() -> Any:
    """A worker's share: one thread, as the loader gives it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

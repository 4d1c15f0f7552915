"""A training batch depends on (seed, step, micro-batch, rank) alone; bad images are named."""

import logging
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from utils.data.images import ImageFolder
from utils.data.loaders import evaluation_batches, training_batches
from utils.errors import UserError
from utils.signals import STOP_SIGNALS

COUNT = 11
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    for number in range(COUNT):
        path = tmp_path / f"{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(path)
    return ImageFolder(tmp_path)


def augment(image: Image.Image) -> torch.Tensor:
    """The number of the image (its red), and a draw from each generator."""
    number = image.getpixel((0, 0))[0]
    return torch.tensor(
        [number, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64
    )


def collate(samples: list, generator: Generator) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    rows, labels = zip(*samples, strict=True)
    draws = torch.stack([torch.rand((), generator=generator), torch.rand(())])
    return torch.stack(rows), list(labels), draws.double()


def wrong(image: Image.Image) -> None:
    raise KeyError("mine")


def die(image: Image.Image) -> None:
    os._exit(9)


def _batches(images: ImageFolder, count: int, batch_size: int = 4, **options: object) -> list:
    stream = training_batches(images, augment, collate, batch_size, **options)
    return [next(stream) for _ in range(count)]


def _same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[2], b[2])
        for a, b in zip(ours, theirs, strict=True)
    )


def _numbers(batches: list) -> list[int]:
    return [int(number) for batch in batches for number in batch[0][:, 0]]


def test_samples_carry_their_labels(images: ImageFolder) -> None:
    for rows, labels, _ in _batches(images, 6):
        assert labels == [int(number) % 2 for number in rows[:, 0]]
    flat = ImageFolder(images.root, labels=False)
    assert _batches(flat, 1)[0][1] == [-1] * 4


def test_workers_change_nothing(images: ImageFolder) -> None:
    assert _same(_batches(images, 8), _batches(images, 8, num_workers=2))


def test_any_step_can_be_the_first(images: ImageFolder) -> None:
    whole = _batches(images, 14, micro_batches=2, seed=3)
    assert _same(_batches(images, 4, micro_batches=2, seed=3, first_step=5), whole[10:])
    assert not _same(_batches(images, 4, micro_batches=2, seed=4, first_step=5), whole[10:])


def test_augmentation_is_new_in_every_pass(images: ImageFolder) -> None:
    rows = torch.cat([batch[0] for batch in _batches(images, 2 * COUNT, batch_size=1)])
    assert len(rows[:, 0].unique()) == COUNT
    for column in (1, 2, 3):
        assert len(rows[:, column].unique()) == 2 * COUNT


def test_ranks_and_micro_batches_share_the_samples_of_one_process(images: ImageFolder) -> None:
    """Order and augmentation: 2 ranks of 2 micro-batches of 2 are one process with batches of 8."""
    one = torch.cat([batch[0] for batch in _batches(images, 5, batch_size=8)]).view(5, 8, 4)
    ranks = [
        torch.cat([b[0] for b in _batches(images, 10, 2, rank=rank, world_size=2, micro_batches=2)])
        for rank in (0, 1)
    ]
    together = torch.stack([part.view(5, 2, 2, 4) for part in ranks], dim=2)
    assert torch.equal(together.reshape(5, 8, 4), one)


def test_masks_differ_between_ranks_and_steps(images: ImageFolder) -> None:
    batches = [_batches(images, 3, rank=rank, world_size=2) for rank in (0, 1)]
    draws = torch.stack([batch[2] for part in batches for batch in part])
    assert all(len(draws[:, column].unique()) == 6 for column in (0, 1))


def test_another_seed_draws_anew(images: ImageFolder) -> None:
    """In another order alone the same images would be augmented and masked as before."""
    draws = [
        {
            value
            for rows, _, masks in batches
            for value in (*rows[:, 1:].flatten().tolist(), *masks.tolist())
        }
        for batches in (_batches(images, 3, batch_size=COUNT, seed=seed) for seed in (3, 4))
    ]
    assert not draws[0] & draws[1]


def test_a_random_transform_judges_an_image_alike_in_any_company(images: ImageFolder) -> None:
    def rows(batch_size: int, world_size: int) -> torch.Tensor:
        parts = [
            evaluation_batches(images, augment, batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return torch.cat([batch[0] for part in parts for batch in part]).unique(dim=0)

    alone = rows(1, 1)
    assert len(alone[:, 1].unique()) == COUNT
    assert torch.equal(alone, rows(4, 1)) and torch.equal(alone, rows(3, 2))


def test_masks_do_not_hang_on_what_the_augmentation_draws(images: ImageFolder) -> None:
    still = training_batches(images, lambda image: torch.zeros(4), collate, 4)
    masks = [batch[2] for batch in _batches(images, 3)]
    assert all(torch.equal(next(still)[2], own) for own in masks)


def test_the_global_generators_are_left_alone(images: ImageFolder) -> None:
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: E731
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    _batches(images, 3)
    list(evaluation_batches(images, augment, 4))
    assert draw() == expected


def test_fewer_images_than_a_step_wrap_and_say_so(
    images: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    batch = _batches(images, 1, batch_size=3 * COUNT)
    assert sorted(_numbers(batch)) == sorted(3 * list(range(COUNT)))
    assert "smaller than one step of 33 images" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "folder"])
def test_a_bad_image_stops_with_its_name_and_index(
    images: ImageFolder, damage: str, num_workers: int
) -> None:
    path = _damage(images, 4, damage)
    message = rf"cannot read image 4 of {COUNT}, {path}: .*recipe.on_error=skip"
    with pytest.raises(UserError, match=message) as error:
        _batches(images, 6, num_workers=num_workers, on_error="raise")
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # with the error at hand; later they are deaf
    message = rf"cannot read image 4 of {COUNT}, {path}: .*probes.NAME.on_error=skip"
    with pytest.raises(UserError, match=message) as error:
        list(evaluation_batches(images, augment, 4, num_workers=num_workers, on_error="raise"))
    assert "recipe." not in str(error.value)  # a key that no evaluation has


def test_no_option_is_named_that_the_caller_lacks(images: ImageFolder) -> None:
    """As a segmentation probe, whose masks cannot be left out."""
    _damage(images, 4, "empty")
    for read in (lambda: _batches(images, 6), lambda: list(evaluation_batches(images, augment, 4))):
        with pytest.raises(UserError, match="cannot read image 4") as error:
            read()
        assert "on_error" not in str(error.value)


def _damage(images: ImageFolder, index: int, damage: str) -> str:
    path = Path(images.path(index))
    content = path.read_bytes()
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": content[:-30], "empty": b"", "text": b"<html>"}[damage])
    return str(path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_counted_and_named_once(
    images: ImageFolder, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    before = [[int(n) for n in batch[0][:, 0]] for batch in _batches(images, 11)]
    number, after = int(Path(images.path(4)).stem), int(Path(images.path(5)).stem)
    path = _damage(images, 4, "truncated")
    stream = training_batches(images, augment, collate, 4, on_error="skip", num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        batches = [next(stream) for _ in range(11)]
    replaced = [[after if n == number else n for n in batch] for batch in before]
    assert [[int(n) for n in batch[0][:, 0]] for batch in batches] == replaced
    assert stream.errors.total() == 4
    assert dict(stream.errors) == {path: 4}
    assert caplog.text.count(path) == 1


@pytest.mark.parametrize("works", [True, False])
def test_batches_are_pinned_where_the_process_works_on_a_gpu(
    works: bool, images: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where there is one that device=cpu leaves alone: pinning would take memory of it."""
    found = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, pin_memory: bool, **options) -> None:
            found.append(pin_memory)
            super().__init__(*args, **options)

    monkeypatch.setattr("utils.data.loaders.DataLoader", Loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: works)
    next(evaluation_batches(images, np.array, 1))
    assert found == [works]


def test_images_that_are_all_bad_stop_even_when_skipping(images: ImageFolder) -> None:
    for index in range(COUNT):
        _damage(images, index, "empty")
    with pytest.raises(UserError, match="11 images in a row cannot be read"):
        _batches(images, 1, on_error="skip")


def test_an_error_of_the_transform_keeps_its_own_type(images: ImageFolder) -> None:
    for num_workers in (0, 1):
        with pytest.raises(KeyError, match="mine"):
            next(training_batches(images, wrong, collate, 4, num_workers=num_workers))


def test_a_killed_worker_is_one_clear_line(images: ImageFolder) -> None:
    with pytest.raises(UserError, match=r"exited unexpectedly.*out of memory"):
        next(training_batches(images, die, collate, 4, num_workers=1))


def test_workers_live_on_when_the_whole_job_is_told_to_stop(images: ImageFolder) -> None:
    """Slurm's warnings reach every process of a job, and the step in hand is to be finished."""
    stream = training_batches(images, augment, collate, 4, num_workers=1)
    found = [next(stream)]
    for number in STOP_SIGNALS:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    found += [next(stream) for _ in range(7)]
    assert _same(found, _batches(images, 8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_image_once(
    images: ImageFolder, world_size: int, num_workers: int
) -> None:
    if num_workers and world_size > 2:
        pytest.skip("the same without workers")
    seen = []
    for rank in range(world_size):
        batches = evaluation_batches(
            images, augment, 4, rank=rank, world_size=world_size, num_workers=num_workers
        )
        for rows, labels, indices in batches:
            assert labels.dtype == indices.dtype == torch.int64
            assert labels.tolist() == images.labels[indices.numpy()].tolist()
            names = [int(Path(images.path(int(i))).stem) for i in indices]
            assert rows[:, 0].tolist() == names
            seen += indices.tolist()
    assert sorted(seen) == list(range(COUNT))


def test_evaluation_can_leave_bad_images_out(
    images: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [_damage(images, index, "empty") for index in (0, 1, 2, 3, 9)]
    batches = list(evaluation_batches(images, augment, 4, on_error="skip"))
    assert [batch[2].tolist() for batch in batches] == [[4, 5, 6, 7], [8, 10]]
    assert all(path in caplog.text for path in paths)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"rank": 1},
        {"on_error": "ignore"},
        {"micro_batches": 0},
        {"seed": -1},
        {"first_step": -1},
        {"sampler": "random"},
    ],
)
def test_wrong_arguments_are_refused(images: ImageFolder, wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        _batches(images, 1, **{"batch_size": 4, **wrong})


def test_an_error_in_a_loop_over_batches_ends_the_process(
    images: ImageFolder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its workers do not hear Python's SIGTERM; the process must not wait for them for ever.

    Nor do they leave anything in the folder for temporary files.
    """
    temporary = tmp_path_factory.mktemp("temporary")
    program = (
        "import sys\n"
        "from torchvision.transforms import PILToTensor\n"
        "from utils.data.images import ImageFolder\n"
        "from utils.data.loaders import evaluation_batches\n"
        "images = ImageFolder(sys.argv[1])\n"
        "batches = evaluation_batches(images, PILToTensor(), 1, num_workers=1)\n"
        "for batch in batches:\n"
        "    raise ValueError('the net does not take it')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(images.root)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.endswith("ValueError: the net does not take it\n")
    assert not list(temporary.glob("pymp-*"))

"""A store gives back what was put in, from memory and from a file, and leaves nothing behind."""

import pytest
import torch

from evaluation.segmentation.store import PatchStore, Shape
from tests.evaluation.segmentation.toys import make_store, random_patches
from utils.errors import UserError


@pytest.mark.parametrize("size", [1, 7, 100])
def test_file_equals_memory(size, tmp_path):
    features, labels = random_patches(20)
    keep = torch.arange(20) % 3 != 0
    stores = [make_store(features, labels, folder=folder) for folder in (None, tmp_path)]
    for mask in (None, keep):
        read = [list(store.chunks(size, "cpu", keep=mask)) for store in stores]
        for (a, places_a), (b, places_b) in zip(*read, strict=True):
            assert torch.equal(a, b) and torch.equal(places_a, places_b)
        places = torch.cat([places for _, places in read[0]])
        assert torch.equal(torch.cat([rows for rows, _ in read[1]]), features[places])
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    features, labels = random_patches(6)
    store = PatchStore(Shape(6, 1, 9, 6), dtype=dtype, folder=tmp_path)
    store.write(2, features[:3], labels[:3], labels[:3, 0])
    assert torch.equal(store.rows.read(2, 5), features[:3].to(dtype))
    ((read, _),) = store.chunks(6, "cpu")
    assert read.dtype == torch.float32
    store.close()
    store.close()


@pytest.mark.parametrize("world", [1, 3])
def test_numbers_and_places(world):
    """Ranks share out the images; a patch's number tells whose it is and where."""
    seen = []
    for rank in range(world):
        store = PatchStore(Shape(7, 4, 1, 2), dtype=torch.float32, folder=None)
        store.rank, store.world = rank, world
        store.num_rows = store.num_own_images * 4
        places = torch.arange(store.num_rows)
        numbers = store.numbers(places)
        assert torch.equal(store.own_places(numbers), places)
        others = torch.tensor(sorted(set(range(28)) - set(numbers.tolist())), dtype=torch.int64)
        assert bool((store.own_places(others) == -1).all())
        seen += numbers.tolist()
    assert sorted(seen) == list(range(28))


def test_no_room(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another scratch_dir"):
        PatchStore(Shape(2, 1, 1, 2), dtype=torch.float32, folder=tmp_path / "file")

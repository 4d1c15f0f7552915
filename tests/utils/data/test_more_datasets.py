"""CIFAR, iNaturalist and LMDB in their real layouts, written small, and what is wrong with them."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from utils.data.cifar import Cifar
from utils.data.classes import class_fingerprint, class_list, class_metadata, mismatch
from utils.data.images import ImageError, ImageFolder, Subset
from utils.data.inaturalist import INaturalist
from utils.data.loaders import evaluation_batches
from utils.data.transforms import deit_evaluation_transform
from utils.errors import UserError

NAMES = ["airplane", "automobile", "bird"]


def record(*labels: int, colour: tuple[int, int, int]) -> bytes:
    planes = np.repeat(np.array(colour, dtype=np.uint8), 1024)
    planes[0] = 7  # red of the top left pixel
    return bytes(labels) + planes.tobytes()


@pytest.fixture
def cifar10(tmp_path):
    """Five batches of two images and a test batch, as the archive unpacks."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for batch in range(1, 6):
        data = record(batch % 3, colour=(batch, 20, 30)) + record(0, colour=(1, 2, 3))
        (folder / f"data_batch_{batch}.bin").write_bytes(data)
    (folder / "test_batch.bin").write_bytes(record(2, colour=(200, 100, 50)))
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def test_cifar10(cifar10):
    for root in (cifar10, cifar10.parent):
        train, val = Cifar(root), Cifar(root, split="val")
        assert train.labels.tolist() == [1, 0, 2, 0, 0, 0, 1, 0, 2, 0]
        assert (len(train), len(val), val.class_names) == (10, 1, NAMES)
        image = val.read(0)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert image.getpixel((0, 0)) == (7, 100, 50)
        assert image.getpixel((1, 0)) == (200, 100, 50)
        assert val.label(0) == 2 and train.path(3).endswith("train 3")


def test_cifar100_has_two_levels(tmp_path):
    (tmp_path / "fine_label_names.txt").write_text("apple\nbee\n")
    (tmp_path / "coarse_label_names.txt").write_text("fruit\ninsects\nfish\n")
    for name in ("train.bin", "test.bin"):
        data = record(2, 1, colour=(9, 9, 9)) + record(0, 0, colour=(1, 1, 1))
        (tmp_path / name).write_bytes(data)
    fine = Cifar(tmp_path, version=100)
    assert fine.labels.tolist() == [1, 0] and fine.class_names == ["apple", "bee"]
    coarse = Cifar(tmp_path, version=100, level="coarse", split="val")
    assert coarse.labels.tolist() == [2, 0] and len(coarse.class_names) == 3
    assert coarse.read(0).getpixel((5, 5)) == (9, 9, 9)
    with pytest.raises(UserError, match="no level 'middle'; known: coarse, fine"):
        Cifar(tmp_path, version=100, level="middle")


def test_damaged_and_missing_cifar_is_one_line(cifar10, tmp_path):
    (cifar10 / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="test_batch.bin has 100 bytes, no multiple of the 3073"):
        Cifar(cifar10, split="val")
    names = (cifar10 / "batches.meta.txt").read_bytes()
    (cifar10 / "batches.meta.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read the names of classes"):
        Cifar(cifar10)
    (cifar10 / "batches.meta.txt").write_text("airplane\nautomobile\n")
    with pytest.raises(UserError, match="label 2 has no name"):
        Cifar(cifar10)
    (cifar10 / "batches.meta.txt").write_bytes(names)
    (cifar10 / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match="lacks data_batch_3.bin of CIFAR-10"):
        Cifar(cifar10)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no binary version of CIFAR-10"):
        Cifar(empty)
    with pytest.raises(UserError, match="no split 'test'"):
        Cifar(empty, split="test")
    with pytest.raises(UserError, match="no CIFAR-12"):
        Cifar(empty, version=12)


def test_pickled_cifar_is_not_opened(tmp_path):
    """The Python version is named as such, and nothing of it runs."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "executed"), "w"))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    for root in (tmp_path, folder):
        with pytest.raises(UserError, match=r"Python version.*cifar-10-binary\.tar\.gz"):
            Cifar(root)
    assert not (tmp_path / "executed").exists()


def taxonomy(name: str, family: str) -> dict:
    return {"name": name, "family": family, "supercategory": "Aves"}


@pytest.fixture
def inat(tmp_path):
    """Three categories in another order than their ids, one image each."""
    categories = [
        {"id": 20, **taxonomy("Corvus corax", "Corvidae")},
        {"id": 3, **taxonomy("Pica pica", "Corvidae")},
        {"id": 7, **taxonomy("Anas crecca", "Anatidae")},
    ]
    images = [
        {"id": 100 + n, "file_name": f"train_val2019/Birds/{c}/{n}.jpg"}
        for n, c in enumerate((20, 3, 7))
    ]
    annotations = [
        {"id": n, "image_id": 102 - n, "category_id": c} for n, c in enumerate((7, 3, 20))
    ]
    for number, image in enumerate(images):
        path = tmp_path / image["file_name"]
        path.parent.mkdir(parents=True)
        Image.new("RGB", (10, 8), (80 * number, 0, 0)).save(path)
    content = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        (tmp_path / f"{split}2019.json").write_text(json.dumps(content))
    return tmp_path


def test_inaturalist(inat):
    species = INaturalist(inat, year=2019)
    assert species.class_names == ["Pica pica", "Anas crecca", "Corvus corax"]
    assert species.labels.tolist() == [2, 0, 1] and species.label(1) == 0
    assert species.read(2).size == (10, 8)
    family = INaturalist(inat, year=2019, split="val", category="family")
    assert family.class_names == ["Anatidae", "Corvidae"]
    assert family.labels.tolist() == [1, 1, 0]
    (inat / "train_val2019" / "Birds").rename(inat / "moved")
    for folder in (inat / "moved").iterdir():
        folder.rename(inat / "train_val2019" / folder.name)
    assert INaturalist(inat, year=2019).read(0).size == (10, 8), "without the group's folder"


def test_inaturalist_2018_takes_its_ranks_from_categories_json(inat):
    content = json.loads((inat / "train2019.json").read_text())
    full = content["categories"]
    content["categories"] = [{"id": entry["id"], "name": str(entry["id"])} for entry in full]
    (inat / "train2018.json").write_text(json.dumps(content))
    assert INaturalist(inat).class_names == ["3", "7", "20"]
    with pytest.raises(UserError, match="category 3 has no family; put categories.json"):
        INaturalist(inat, category="family")
    (inat / "categories.json").write_text(json.dumps(full))
    assert INaturalist(inat, category="family").class_names == ["Anatidae", "Corvidae"]
    assert INaturalist(inat).class_names[0] == "Pica pica"


def test_the_ranks_of_2018_are_not_taken_for_those_of_2019(inat):
    """categories.json lies beside both years, whose ids mean other species."""
    expected = {rank: INaturalist(inat, year=2019, category=rank) for rank in ("name", "family")}
    other = [{"id": n, **taxonomy(f"Homo {n}", f"Hominidae {n}")} for n in range(30)]
    (inat / "categories.json").write_text(json.dumps(other))
    for rank, alone in expected.items():
        found = INaturalist(inat, year=2019, category=rank)
        assert found.class_names == alone.class_names
        assert found.labels.tolist() == alone.labels.tolist()


def test_mistakes_with_inaturalist_are_one_line(inat):
    with pytest.raises(UserError, match="no .*train2018.json"):
        INaturalist(inat)
    with pytest.raises(UserError, match="2021 is not offered"):
        INaturalist(inat, year=2021)
    with pytest.raises(UserError, match="unknown rank 'tribe'; known: name, genus"):
        INaturalist(inat, year=2019, category="tribe")
    content = json.loads((inat / "val2019.json").read_text())
    content["annotations"].pop()
    (inat / "val2019.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 images without category, as train_val2019"):
        INaturalist(inat, year=2019, split="val")
    for broken, said in (
        ([], "val2019.json lists no images"),
        (content | {"images": [{"id": 1}]}, "images, entry 0, has no file_name"),
        (content | {"annotations": ["x"]}, "annotations, entry 0, has no category_id and no image"),
    ):
        (inat / "val2019.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=said):
            INaturalist(inat, year=2019, split="val")
    (inat / "val2019.json").write_text("{")
    with pytest.raises(UserError, match="is no readable json"):
        INaturalist(inat, year=2019, split="val")


@pytest.fixture
def tree(tmp_path):
    """A class folder of PNG and one of JPEG files."""
    for number, (name, ending) in enumerate([("ape", "png"), ("bee", "jpg"), ("bee", "png")]):
        path = tmp_path / "tree" / name / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "tree"


def test_lmdb_gives_the_folder_back(tree, tmp_path):
    """The same pixels, labels, order and fingerprint; also in workers, which open it anew."""
    pytest.importorskip("lmdb")
    from utils.data.lmdb import LmdbImages

    file = tmp_path / "new" / "images.lmdb"
    command = [sys.executable, "-m", "utils.data.lmdb", str(tree), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"3 images in {file}\n"), done.stderr
    assert [path.name for path in file.parent.iterdir()] == ["images.lmdb"]
    images, folder = LmdbImages(file), ImageFolder(tree)
    assert len(images) == 3 and images.class_names == folder.class_names
    assert images.labels.tolist() == folder.labels.tolist()
    assert class_fingerprint(class_list(images)) == class_fingerprint(class_list(folder))
    for index in range(3):
        assert images.read(index).tobytes() == folder.read(index).tobytes()
    assert images.path(0) == f"{file}:ape/0.png"
    assert LmdbImages(file).label(1) == pickle.loads(pickle.dumps(images)).label(1)
    transform = deit_evaluation_transform(input_size=8, resize_small=True)
    batches = list(evaluation_batches(images, transform, 2, num_workers=2))
    assert [indices.tolist() for *_, indices in batches] == [[0, 1], [2]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "exists" in done.stderr


def test_lmdb_without_labels_and_wrong_files(tree, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    from utils.data.lmdb import LmdbImages
    from utils.data.lmdb_writer import write_lmdb

    assert write_lmdb(tree / "bee", tmp_path / "flat.lmdb") == 2
    images = LmdbImages(tmp_path / "flat.lmdb")
    assert images.labels is None and images.label(0) is None and images.class_names == []
    with pytest.raises(IndexError):
        images.read(2)
    (tmp_path / "text").write_text("no database" * 1000)
    with pytest.raises(UserError, match="is no LMDB file|not written by"):
        LmdbImages(tmp_path / "text")
    with pytest.raises(UserError, match="there is no LMDB file"):
        LmdbImages(tmp_path / "nothing")
    with pytest.raises(UserError, match="no LMDB file was given.*data.train_file="):
        LmdbImages(None)
    with pytest.raises(UserError, match="no LMDB file was given.*data.val_file="):
        LmdbImages(None, split="val")
    other = lmdb.open(str(tmp_path / "other"), subdir=False, lock=False)
    with other, other.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    with pytest.raises(UserError, match="not written by this program"):
        LmdbImages(tmp_path / "other")


def test_lmdb_names_a_damaged_image(tree, tmp_path):
    pytest.importorskip("lmdb")
    from utils.data.lmdb import LmdbImages
    from utils.data.lmdb_writer import write_lmdb

    (tree / "ape" / "0.png").write_bytes(b"\x89PNG cut")
    write_lmdb(tree, tmp_path / "images.lmdb")
    with pytest.raises(ImageError, match="images.lmdb:ape/0.png"):
        LmdbImages(tmp_path / "images.lmdb").read(0)


def test_a_cut_lmdb_is_told_and_kills_nobody(tree, tmp_path):
    """Reading behind the end of a mapped file is a bus error: an unfinished copy is refused."""
    pytest.importorskip("lmdb")
    from utils.data.lmdb import LmdbImages
    from utils.data.lmdb_writer import write_lmdb

    write_lmdb(tree, tmp_path / "images.lmdb")
    data = (tmp_path / "images.lmdb").read_bytes()
    for size, said in (
        (len(data) - 4096, "is cut: it has"),
        (100, "is no LMDB file"),
        (0, "is no"),
    ):
        (tmp_path / f"{size}.lmdb").write_bytes(data[:size])
        with pytest.raises(UserError, match=said):
            LmdbImages(tmp_path / f"{size}.lmdb")
    images = LmdbImages(tmp_path / "images.lmdb")
    images.close()
    assert images.read(0).mode == "RGB"


def test_fingerprint_of_classes(tree):
    """It depends on names and order, a part of a data set has that of the whole, and ids come
    before names that a labels.txt may or may not give."""
    folder = ImageFolder(tree)
    metadata = class_metadata(folder)
    assert metadata == class_metadata(Subset(Subset(folder, [1, 2]), [0]))
    assert mismatch(metadata, folder) is None and mismatch({}, folder) is None
    assert class_fingerprint(["a", "b"]) != class_fingerprint(["b", "a"])
    folder.class_names = ["bee", "ape"]
    assert "class 0 was 'ape' in training and is 'bee' in" in mismatch(metadata, folder)
    folder.class_ids = ["ape", "bee"]
    assert mismatch(metadata, folder) is None
    assert class_metadata(ImageFolder(tree / "ape")) == {} == class_metadata(None)


@pytest.mark.parametrize(("size", "crop"), [((32, 32), 1.0), ((32, 32), 0.875)])
def test_small_inputs_are_left_alone_only_at_their_size(size, crop):
    image = Image.new("RGB", size)
    for small in (True, False):
        transform = deit_evaluation_transform(
            input_size=32, eval_crop_ratio=crop, resize_small=small
        )
        assert transform(image).shape == (3, 32, 32)
        large = transform(Image.new("RGB", (40, 60))).shape
        assert large == ((3, 32, 32) if small else (3, 60, 40))
    with pytest.raises(ValueError, match="eval_crop_ratio 0.0"):
        deit_evaluation_transform(eval_crop_ratio=0.0)

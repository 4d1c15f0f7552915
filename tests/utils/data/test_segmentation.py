"""Images with masks: what the readers find, in which order, and what they refuse."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from utils.data.embedded import voc_palette
from utils.data.images import ImageError
from utils.data.segmentation import VOC_CLASSES, ade20k, scenes, voc2012
from utils.errors import UserError

SIZE = (6, 4)  # width, height


def write_image(path: Path, value: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def write_mask(path: Path, label: int, mode: str = "L", size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.full(size[::-1], label, dtype=np.uint8))
    if mode == "P":
        mask.putpalette(voc_palette())
    (mask if mode in "LP" else mask.convert(mode)).save(path)


def make_ade20k(root: Path, stems: tuple[str, ...] = ("b", "a", "c")) -> Path:
    folder = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for label, stem in enumerate(stems, start=1):
            write_image(folder / "images" / split / f"{stem}.jpg", label)
            write_mask(folder / "annotations" / split / f"{stem}.png", label)
    return folder


def make_voc(root: Path, below: str = "VOCdevkit/VOC2012") -> Path:
    voc = root / below
    lists = {"train": ["t1", "t2"], "val": ["v1", "v2"], "trainval": ["t1", "t2", "v1", "v2"]}
    for name in lists["trainval"]:
        write_image(voc / "JPEGImages" / f"{name}.jpg")
        write_mask(voc / "SegmentationClass" / f"{name}.png", 15, mode="P")
    for split, names in lists.items():
        path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")
    return voc


def make_sbd(root: Path, below: str = "benchmark_RELEASE/dataset") -> Path:
    """SBD train: an image of VOC train, one of VOC val, one of its own; val: one of its own."""
    sbd = root / below
    for name in ("t2", "v1", "s1", "s2"):
        write_image(sbd / "img" / f"{name}.jpg")
        (sbd / "cls").mkdir(exist_ok=True)
        mask = np.full(SIZE[::-1], 7, dtype=np.uint8)
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask, "Boundaries": 0}})
    (sbd / "train.txt").write_text("t2\nv1\ns1\n")
    (sbd / "val.txt").write_text("s2\n")
    return sbd


def stems(dataset) -> list[str]:
    return [Path(dataset.path(index)).stem for index in range(len(dataset))]


def test_ade20k_in_the_order_of_its_names_with_labels_as_stored(tmp_path: Path) -> None:
    folder = make_ade20k(tmp_path)
    for root in (tmp_path, folder):
        dataset = ade20k(root, split="validation")
        assert stems(dataset) == ["a", "b", "c"]
        assert [int(dataset.read_mask(i)[0, 0]) for i in range(3)] == [2, 1, 3]
    mask = dataset.read_mask(0)
    assert mask.dtype == np.uint8 and mask.shape == (4, 6) and dataset.read(0).size == (6, 4)
    assert dataset.name == "ADE20K" and dataset.ignore_labels == (0, 255)
    assert len(dataset.class_names) == 151 and dataset.class_names[150] == "class 150"
    assert stems(pickle.loads(pickle.dumps(dataset))) == ["a", "b", "c"]


def test_ade20k_takes_its_class_names_from_the_archive(tmp_path: Path) -> None:
    folder = make_ade20k(tmp_path)
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n"
    (folder / "objectInfo150.txt").write_text(table + "2  \t0.1\t9\t9\t1\tbuilding, edifice\n")
    names = ade20k(tmp_path).class_names
    assert names[:4] == ["unlabelled", "wall", "building", "class 3"] and len(names) == 151


@pytest.mark.parametrize(("folder", "suffix", "lost", "left"), [
    ("annotations", "png", "mask", "image"), ("images", "jpg", "image", "mask"),
])  # fmt: skip
def test_ade20k_wants_images_and_masks_in_pairs(
    tmp_path: Path, folder: str, suffix: str, lost: str, left: str
) -> None:
    (make_ade20k(tmp_path) / folder / "training" / f"a.{suffix}").unlink()
    with pytest.raises(UserError, match=f"the {left} a has no {lost} .1 of 3") as error:
        ade20k(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2012", "original/VOCdevkit/VOC2012", "."])
def test_voc_by_its_lists_with_indices_of_the_palette(tmp_path: Path, below: str) -> None:
    make_voc(tmp_path, below)
    assert stems(voc2012(tmp_path, split="train")) == ["t1", "t2"]
    assert stems(voc2012(tmp_path, split="trainval")) == ["t1", "t2", "v1", "v2"]
    dataset = voc2012(tmp_path, split="val")
    assert stems(dataset) == ["v1", "v2"] and (dataset.read_mask(1) == 15).all()
    assert dataset.class_names == list(VOC_CLASSES) and len(dataset.class_names) == 21
    assert dataset.class_names[15] == "person" and dataset.ignore_labels == (255,)


@pytest.mark.parametrize("below", ["benchmark_RELEASE/dataset", "aug/benchmark_RELEASE/dataset"])
def test_trainaug_leaks_val_as_published_and_its_other_form_does_not(
    tmp_path: Path, below: str
) -> None:
    make_voc(tmp_path)
    make_sbd(tmp_path, below)
    published = voc2012(tmp_path, split="trainaug")
    assert stems(published) == ["t1", "t2", "t2", "v1", "s1", "s2"]
    clean = voc2012(tmp_path, split="trainaug_noval")
    assert stems(clean) == ["t1", "t2", "s1", "s2"]
    assert not set(stems(clean)) & set(stems(voc2012(tmp_path, split="val")))
    assert (clean.read_mask(0) == 15).all() and (clean.read_mask(3) == 7).all()
    assert clean.read(3).size == SIZE


def test_scenes_have_masks_that_fit(tmp_path: Path) -> None:
    train, val = scenes(split="train", root=tmp_path), scenes(split="val", root=tmp_path)
    assert (len(train), len(val)) == (240, 80)
    assert val.class_names == ["background", "zero", "one", "two", "three", "four", "five", "six",
                               "seven", "eight", "nine"]  # fmt: skip
    assert set(np.unique(val.read_mask(0))) <= {*range(11), 255}
    assert val.read(0).size == val.read_mask(0).shape


@pytest.mark.parametrize(("make", "expected"), [
    (lambda mask: write_mask(mask, 1, mode="RGB"), "mode L or P.*mode RGB"),
    (lambda mask: write_mask(mask, 1, size=(5, 4)), "the mask is 5 x 4, its image .* 6 x 4 pixels"),
    (lambda mask: write_mask(mask, 151), "label 151; ADE20K has 0 to 150 and 255"),
    (lambda mask: mask.write_bytes(mask.read_bytes()[:40]), "damaged mask"),
    (lambda mask: mask.unlink(), "no such file"),
])  # fmt: skip
def test_a_bad_mask_is_named(tmp_path: Path, make, expected: str) -> None:
    mask = make_ade20k(tmp_path) / "annotations" / "training" / "a.png"
    dataset = ade20k(tmp_path)
    make(mask)
    with pytest.raises(ImageError, match=expected) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.read_mask(0)
    assert str(mask) in str(error.value) and "\n" not in str(error.value)


def test_a_bad_mask_of_sbd_is_named(tmp_path: Path) -> None:
    make_voc(tmp_path)
    mask = make_sbd(tmp_path) / "cls" / "s2.mat"
    savemat(mask, {"something": 1})
    with pytest.raises(ImageError, match="no mask of SBD"):
        voc2012(tmp_path, split="trainaug_noval").read_mask(3)


@pytest.mark.parametrize(("call", "expected"), [
    (lambda root: ade20k(root), "no ADEChallengeData2016/images/training; bring it with "
     "`python -m utils.data.download ade20k "),
    (lambda root: voc2012(root), "no VOCdevkit/VOC2012/ImageSets/Segmentation; bring it with "
     "`python -m utils.data.download voc2012 "),
    (lambda root: ade20k(None), "no folder of ADE20K was given; say where it is: root=FOLDER"),
    (lambda root: ade20k(root, split="train"), "no split 'train' in ADE20K; there are training"),
    (lambda root: voc2012(root, split="training"), "no split 'training' in VOC2012; there are tr"),
])  # fmt: skip
def test_what_is_missing_is_one_line(tmp_path: Path, call, expected: str) -> None:
    with pytest.raises(UserError) as error:
        call(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_trainaug_without_sbd_says_how_to_bring_it(tmp_path: Path) -> None:
    make_voc(tmp_path)
    with pytest.raises(UserError, match="SBD .for trainaug. is not in .*download sbd"):
        voc2012(tmp_path, split="trainaug")


def test_what_is_missing_is_brought_on_request(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def bring(name: str, root: Path) -> None:
        asked.append(name)
        {"ade20k": make_ade20k, "voc2012": make_voc, "sbd": make_sbd}[name](root)

    monkeypatch.setattr("utils.data.segmentation.downloads.bring", bring)
    assert len(ade20k(tmp_path, download=True)) == 3
    assert len(voc2012(tmp_path, split="trainaug", download=True)) == 6
    assert len(voc2012(tmp_path, split="val", download=True)) == 2
    assert asked == ["ade20k", "voc2012", "sbd"]

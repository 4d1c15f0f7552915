"""Any folder of images has one order and clear classes; every file is read as RGB or named."""

import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from utils.data.imagenet import ImageNetTree
from utils.data.images import ImageError, ImageFolder, Subset, folder, read_image
from utils.errors import UserError


def _make(root: Path, *names: str, size: tuple[int, int] = (4, 3)) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(path)
    return root


def _paths(images: ImageFolder) -> list[str]:
    return [os.path.relpath(images.path(i), images.root) for i in range(len(images))]


def test_classes_and_order_are_torchvisions(tmp_path: Path) -> None:
    names = [
        "b/2.png",
        "b/10.JPG",
        "a/z.webp",
        "a b/x.png",
        "a/deep/er/1.bmp",
        "a/deep/0.tif",
        "c/q.pgm",
    ]
    _make(tmp_path, *names)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images, theirs = ImageFolder(tmp_path), TorchvisionFolder(str(tmp_path))
    assert [(images.path(i), images.label(i)) for i in range(len(images))] == theirs.samples
    assert images.class_names == theirs.classes
    assert images.labels.dtype == np.int64
    assert images.read(0).mode == "RGB"


def test_flat_images_and_labels_false_have_no_labels(tmp_path: Path) -> None:
    flat = ImageFolder(_make(tmp_path / "flat", "b.png", "a.png"))
    assert (_paths(flat), flat.labels, flat.label(0), flat.class_names) == (
        ["a.png", "b.png"],
        None,
        None,
        [],
    )
    mixed = _make(tmp_path / "mixed", "a.png", "x/b.png")
    assert ImageFolder(mixed, labels=False).labels is None
    with pytest.raises(UserError, match=r"a\.png lies beside folders"):
        ImageFolder(mixed)


def test_hidden_files_are_left_out_and_empty_classes_counted(tmp_path: Path) -> None:
    _make(tmp_path, "b/x.png", "b/.hidden.png", ".trash/y.png")
    (tmp_path / "a").mkdir()
    images = ImageFolder(tmp_path)
    assert (_paths(images), images.class_names, images.label(0)) == (["b/x.png"], ["a", "b"], 1)


def test_links_that_lead_back_are_no_endless_folder(tmp_path: Path) -> None:
    _make(tmp_path / "root", "a/x.png")
    _make(tmp_path / "elsewhere", "y.png")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    assert _paths(ImageFolder(tmp_path / "root")) == ["a/x.png", "b/y.png"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (None, "no folder of images was given"),
        ("", "no folder of images was given"),
        ("missing", "does not exist"),
        ("file.txt", "is a file, not a folder"),
        ("empty", r"no image in .*empty or below it; looked for \.jpg \.jpeg"),
    ],
)
def test_a_missing_or_empty_folder_is_one_clear_line(
    tmp_path: Path, root: str | None, message: str
) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match=message) as error:
        ImageFolder(tmp_path / root if root else root)
    assert "\n" not in str(error.value)


def test_given_classes_fix_the_numbers(tmp_path: Path) -> None:
    _make(tmp_path, "b/x.png")
    assert ImageFolder(tmp_path, classes=["a", "b"]).label(0) == 1
    with pytest.raises(UserError, match="not one of the 1 known classes"):
        ImageFolder(tmp_path, classes=["a"])


def test_a_folder_splits_by_class(tmp_path: Path) -> None:
    _make(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(10)))
    train, val = (folder(tmp_path, split=split, val_fraction=0.2) for split in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(val.labels).tolist() == [2, 2]
    together = [data.path(i) for data in (train, val) for i in range(len(data))]
    assert len(set(together)) == 20
    chosen = [Path(val.path(index)).name for index in range(len(val))]
    assert chosen == ["4.png", "9.png"] * 2, "a run that goes on judges on what it never trained on"
    assert val.read(0).size == (4, 3)


def test_a_val_folder_gets_the_classes_of_train(tmp_path: Path) -> None:
    root = _make(tmp_path / "train", "a/x.png", "b/x.png")
    val_root = _make(tmp_path / "val", "b/x.png")
    assert len(folder(root, val_root=val_root)) == 2
    assert folder(root, split="val", val_root=val_root).labels.tolist() == [1]


@pytest.mark.parametrize("judged", ["val", "validation", "test"])
def test_splits_are_no_classes(tmp_path: Path, judged: str) -> None:
    """R/train and R/val would be told apart as two classes."""
    root = _make(tmp_path, "train/a/x.png", "train/b/x.png", f"{judged}/a/x.png")
    remedy = f"data.root={root}/train data.val_root={root}/{judged}"
    with pytest.raises(UserError, match=remedy):
        folder(root)
    with pytest.raises(UserError, match=remedy):
        folder(root, split="val", val_root=root / judged)
    assert len(folder(root, labels=False, val_fraction=0.5)) == 2
    assert len(folder(root / "train", val_root=root / judged)) == 2
    _make(tmp_path, "tram/x.png")
    assert ImageFolder(root).class_names == sorted(["train", judged, "tram"])
    folder(root, val_fraction=0.5)


def test_a_folder_too_small_to_split_says_so(tmp_path: Path) -> None:
    _make(tmp_path, "a.png", "b.png")
    with pytest.raises(UserError, match="too few"):
        folder(tmp_path)
    with pytest.raises(UserError, match="no split 'test'"):
        folder(tmp_path, split="test")
    with pytest.raises(UserError, match="val_fraction"):
        folder(tmp_path, val_fraction=0)


def test_names_of_any_bytes_survive(tmp_path: Path) -> None:
    _make(tmp_path, "é ü/ 漢.png")
    images = pickle.loads(pickle.dumps(ImageFolder(tmp_path)))
    assert images.read(0).size == (4, 3)
    assert Subset(images, [0]).path(0) == images.path(0)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _gradient(mode: str) -> Image.Image:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image"),
        (_bytes(Image.effect_noise((64, 64), 80), "PNG")[:900], "damaged"),
        (_bytes(Image.effect_noise((64, 64), 80), "JPEG")[:900], "damaged"),
        (_bytes(Image.effect_noise((64, 64), 80).convert("F"), "TIFF"), "floating-point"),
        (None, "no such file"),
        ("folder", "is a folder"),
        ("broken link", "no such file"),
    ],
)
def test_what_is_no_whole_image_is_named(
    tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "x.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "broken link":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.path, copy.reason) == (str(path), error.value.reason)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(path)


def test_a_link_to_nothing_is_listed_so_that_it_gets_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="no such file"):
        ImageFolder(tmp_path).read(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_alpha_are_converted_as_by_pillow(mode: str) -> None:
    image = _gradient("RGB").convert(mode)
    file = io.BytesIO(_bytes(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow up to 12.1 at least cannot read such a file that it wrote")
    read = read_image(file, name="x")
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((0, 0), (200, 0, 0, 0))
    for source in (image, image.convert("LA")):
        pixels = np.asarray(read_image(io.BytesIO(_bytes(source, "PNG")), name="x"))
        assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(read_image(io.BytesIO(_bytes(image, "PNG")), name="x"))[0, 1].tolist() == [
        10,
        20,
        30,
    ]
    palette = _gradient("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(
            read_image(io.BytesIO(_bytes(palette, "PNG", transparency=0)), name="x")
        )
    assert pixels[0, 0].tolist() == [255, 255, 255]
    keyed = _bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert np.asarray(read_image(io.BytesIO(keyed), name="x")).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    read = read_image(io.BytesIO(_bytes(Image.fromarray(values), kind)), name="x")
    assert np.asarray(read)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied_only_when_asked(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (6, 4)
    assert ImageFolder(tmp_path, exif_orientation=True).read(0).size == (4, 6)
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "x.jpg").rename(tmp_path / "train" / "n01" / "x.jpg")
    assert ImageNetTree(tmp_path).read(0).size == ImageFolder(tmp_path).read(0).size == (6, 4)


def test_32_bit_pixels_are_refused_as_no_range_is_theirs(tmp_path):
    """Cut to 16 bits, 200 of 255 would be black and 2e8 white."""
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "x.tiff")
    with pytest.raises(ImageError, match="32-bit pixels have no defined range"):
        read_image(tmp_path / "x.tiff")


def test_a_link_to_itself_ends_no_listing(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "self").symlink_to("self")
    assert len(ImageFolder(tmp_path)) == 1
    _make(tmp_path / "by_class", "a/x.png")
    (tmp_path / "by_class" / "self").symlink_to("self")
    assert ImageFolder(tmp_path / "by_class").class_names == ["a"]

"""Fast crops: the distribution of torchvision's, the pixels of Pillow's, files decoded late."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop

from utils.data.encoded import EncodedImage, encoded_image, pixels_of
from utils.data.images import ImageError, ImageFolder, Subset
from utils.data.random_crops import Box, CropKind, cut_crops, draw_boxes, resized_crop

PHOTOGRAPH = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("shape", [(375, 500), (500, 90), (90, 500)])
def test_boxes_are_spread_as_torchvisions(shape, scale):
    """Area, aspect ratio and position, by Kolmogorov and Smirnov's distance."""
    np.random.seed(0)
    torch.manual_seed(0)
    count, picture = 4000, torch.empty(1, *shape)
    ours = np.array([box[:4] for box in draw_boxes(*shape, count, scale)], float)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(count)],
        float,
    )
    measures = (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    )
    for measure in measures:
        # By chance, one in a thousand pairs of such samples is 0.044 apart.
        assert ks_2samp(measure(ours), measure(theirs)).statistic < 0.045


def test_half_of_the_boxes_are_mirrored():
    np.random.seed(0)
    mirrored = [box.mirrored for box in draw_boxes(40, 50, 4000, (0.1, 1.0))]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.03)
    assert not any(box.mirrored for box in draw_boxes(9, 9, 50, (0.1, 1.0), flip_probability=0.0))


def test_place_size_shape_and_mirroring_hang_on_nothing_but_chance():
    np.random.seed(0)
    top, left, height, width, mirrored = np.array(draw_boxes(400, 500, 4000, (0.1, 0.3)), float).T
    places = [top / (400 - height), left / (500 - width)]
    related = np.corrcoef([*places, height * width, width / height, mirrored]) - np.eye(5)
    assert np.abs(related).max() < 0.06


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_is_pillows_to_one_level(mirrored):
    box = Box(20, 30, 300, 280, mirrored)
    found = resized_crop(pixels_of(PHOTOGRAPH), box, 224).int()
    expected = PHOTOGRAPH.crop((30, 20, 310, 320)).resize((224, 224), Image.Resampling.BICUBIC)
    expected = pixels_of(expected.transpose(Image.FLIP_LEFT_RIGHT) if mirrored else expected)
    assert (found - expected.int()).abs().max() <= 1


def test_a_file_is_decoded_as_pillow_does():
    image = EncodedImage(jpeg(PHOTOGRAPH, quality=95), "a.jpg")
    assert image.size == (427, 640)
    found, expected = image.decode().int(), pixels_of(Image.open(io.BytesIO(image.data))).int()
    assert (found - expected).abs().max() <= 2  # two builds of the same library


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_without_torchvisions_decoder_pillow_decodes(mode, monkeypatch):
    """torchvision deprecates its own: a release without it imports, and changes no image."""
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    spec = importlib.util.find_spec("utils.data.encoded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    image = module.EncodedImage(jpeg(PHOTOGRAPH.convert(mode), quality=95), "a.jpg")
    assert torch.equal(image.decode(), pixels_of(Image.open(io.BytesIO(image.data))))


@pytest.mark.parametrize(("reduction", "size"), [(1.9, 427), (2.0, 214), (5.0, 107), (9.0, 54)])
def test_a_jpeg_is_decoded_no_larger_than_needed(reduction, size):
    assert EncodedImage(jpeg(PHOTOGRAPH), "a.jpg").decode(reduction).shape[1] == size


def test_crops_of_a_large_photograph_look_the_same():
    """Decoded at a part of its size, a crop is the crop of the whole, but for the finest detail."""
    large = PHOTOGRAPH.resize((2560, 1708), Image.Resampling.BICUBIC)
    kinds = [CropKind(2, 200, (0.4, 1.0)), CropKind(3, 128, (0.3, 0.4))]
    encoded = EncodedImage(jpeg(large, quality=95), "a.jpg")
    np.random.seed(3)
    found = cut_crops(encoded, kinds)
    np.random.seed(3)
    expected = cut_crops(large, kinds)
    np.random.seed(3)
    for kind, crops in zip(kinds, expected, strict=True):
        boxes = draw_boxes(1708, 2560, kind.number, kind.scale)
        cut = [resized_crop(pixels_of(large), box, kind.size) for box in boxes]
        assert torch.equal(crops, torch.stack(cut)), "the boxes are those of the whole image"
    assert [tuple(crops.shape) for crops in found] == [(2, 3, 200, 200), (3, 3, 128, 128)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().mean() < 3


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode):
    small = PHOTOGRAPH.resize((32, 24))
    image = (
        Image.fromarray(np.full((24, 32), 40_000, np.uint16))
        if mode == "I;16"
        else small.convert(mode)
    )
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
    pixels = EncodedImage(file.getvalue(), "a").decode()
    assert pixels.shape == (3, 24, 32) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("kept", [0, 2, 300, 0.9])
def test_a_damaged_file_is_named(kept):
    data = jpeg(PHOTOGRAPH)
    data = data[: int(kept if kept >= 1 or kept == 0 else kept * len(data))]
    with pytest.raises(ImageError, match="cannot read image broken.jpg"):
        EncodedImage(data, "broken.jpg").decode()


def test_files_of_a_folder_pass_undecoded(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(PHOTOGRAPH))
    folder = ImageFolder(tmp_path)
    assert isinstance(encoded_image(Subset(folder, [0]), 0), EncodedImage)
    turned = ImageFolder(tmp_path, exif_orientation=True)
    assert isinstance(encoded_image(turned, 0), Image.Image)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageError, match="a.jpg: no such file"):
        encoded_image(folder, 0)

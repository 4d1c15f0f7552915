"""Crops have the sizes and the statistics asked for."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from dinov2.crops import CropOptions, MultiCrop
from tests.dinov2.tiny import Noise, make_recipe


def count_calls(monkeypatch, layer: type, draws: int = 200, **options) -> Counter:
    """How often a transform acted on the first global, second global and local crop."""
    crops = MultiCrop(
        global_crops_size=8, local_crops_size=4, local_crops_number=1, blur_kernel_size=3, **options
    )
    counts: Counter = Counter()
    forward = layer.forward
    now = [""]

    def counted(self, image):
        counts[now[0]] += 1
        return forward(self, image)

    monkeypatch.setattr(layer, "forward", counted)
    for name in ("first_global", "second_global", "local"):
        now[0] = name
        for _ in range(draws):
            getattr(crops, name)(Noise(1).read(0))
    return counts


@pytest.mark.parametrize(
    "options, expected",
    [({}, (1.0, 0.1, 0.5)), ({"blur_probabilities": (0.0, 0.9, 0.5)}, (0.0, 0.9, 0.5))],
)
def test_blur_probabilities(monkeypatch, options, expected):
    counts = count_calls(monkeypatch, T.GaussianBlur, **options)
    for name, probability in zip(("first_global", "second_global", "local"), expected, strict=True):
        assert abs(counts[name] / 200 - probability) < 0.12


def test_only_the_second_global_crop_is_solarized(monkeypatch):
    from torchvision.transforms import functional as F

    counts: Counter = Counter()
    monkeypatch.setattr(
        F, "solarize", lambda image, *args, **kwargs: counts.update(["all"]) or image
    )
    crops = MultiCrop(global_crops_size=8, local_crops_number=0, blur_kernel_size=3)
    for _ in range(100):
        crops.first_global(Noise(1).read(0))
    assert not counts
    for _ in range(200):
        crops.second_global(Noise(1).read(0))
    assert abs(counts["all"] / 200 - 0.2) < 0.12


def test_sizes_and_numbers_are_free():
    crops = MultiCrop(global_crops_size=12, local_crops_size=6, local_crops_number=3)(
        Noise(1).read(0)
    )
    assert crops["global_crops"].shape == (2, 3, 12, 12)
    assert crops["local_crops"].shape == (3, 3, 6, 6)
    assert list(MultiCrop(local_crops_number=0, global_crops_size=8)(Noise(1).read(0))) == [
        "global_crops"
    ]


def test_crops_follow_torchs_seed():
    crops = MultiCrop(global_crops_size=8, local_crops_size=8, local_crops_number=2)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return crops(Noise(1).read(0))["global_crops"]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_crops_draw_in_the_published_order():
    """A seed gives the crops that torchvision's operators give one after another."""
    size, first, second, local = 12, 0.0, 0.9, 0.5
    crops = MultiCrop(
        global_crops_size=size,
        local_crops_size=size,
        local_crops_number=2,
        local_crops_scale=(0.32, 1.0),
        blur_probabilities=(first, second, local),
    )

    def pipeline(blur: float, *last: torch.nn.Module) -> T.Compose:
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        steps = [
            T.RandomResizedCrop(size, (0.32, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([jitter], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], blur),
        ]
        return T.Compose([*steps, *last, T.ToTensor(), crops.local.transforms[-1]])

    image = Noise(1).read(0)
    for seed in range(20):
        torch.manual_seed(seed)
        ours = crops(image)
        torch.manual_seed(seed)
        expected = [pipeline(first)(image), pipeline(second, T.RandomSolarize(128, 0.2))(image)]
        assert torch.equal(ours["global_crops"], torch.stack(expected))
        assert torch.equal(ours["local_crops"][1], [pipeline(local)(image) for _ in range(2)][1])


def test_scale_is_the_share_of_the_area():
    """Seen on a ramp: the range of values in a crop tells how wide it was."""
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    crops = MultiCrop(
        **{"global_crops_size": 32, "local_crops_size": 32, "local_crops_number": 20},
        **{
            "color_jitter_probability": 0.0,
            "grayscale_probability": 0.0,
            "solarize_probability": 0.0,
        },
        **{"blur_probabilities": (0, 0, 0), "mean": (0, 0, 0), "std": (1, 1, 1)},
    )
    local = crops(Image.fromarray(ramp))["local_crops"]
    widths = (local.amax(dim=(1, 2, 3)) - local.amin(dim=(1, 2, 3))) * 255 / 256
    # Area 0.05 to 0.32, aspect 3/4 to 4/3.
    assert (
        widths.min() > (0.05 * 3 / 4) ** 0.5 - 0.05 and widths.max() < (0.32 * 4 / 3) ** 0.5 + 0.05
    )


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="local_crops_number"):
        MultiCrop(local_crops_number=-1)
    with pytest.raises(ValueError, match="blur_probabilities takes three"):
        MultiCrop(blur_probabilities=(0.5,))
    with pytest.raises(ValueError, match="twice the smallest crop, 4; not 9"):
        MultiCrop(local_crops_size=4)


def test_any_callable_on_an_image_makes_crops():
    """What it returns is trained on: it need leave nothing to the device, and say nothing of it."""

    class Flat(CropOptions):
        def __call__(self, image):
            return {"global_crops": torch.full((2, 3, 16, 16), float(image.width))}

    crops = Flat(global_crops_size=16, local_crops_number=0, blur_kernel_size=3)
    recipe = make_recipe(crops=crops)
    batch = recipe.prepare(next(recipe.batches(0)))
    assert torch.equal(batch["global_crops"], torch.full((6, 3, 16, 16), 20.0))
    assert recipe.losses(batch, 0)["loss"].isfinite()

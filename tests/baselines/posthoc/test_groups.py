"""Copies of images under a group: order, exactness, corners, rectangles, and the way back."""

import pytest
import torch

from baselines.posthoc.groups import CopyGroup, parse_group
from utils.symmetry import SYMMETRIES, transform_image


def images(size: int = 8, dtype: torch.dtype = torch.float32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )


def test_d4_is_the_eight_symmetries_in_their_order():
    x = images()
    copies = CopyGroup("D4").all_copies(x)
    for index, name in enumerate(SYMMETRIES):
        assert torch.equal(copies[:, index], transform_image(x, name))


@pytest.mark.parametrize(
    ("name", "count", "exact"),
    [
        ("C1", 1, ["e"]),
        ("mirror", 2, ["e", "m"]),
        ("C2", 2, ["e", "rr"]),
        ("C4", 4, ["e", "r", "rr", "rrr"]),
        ("C6", 6, ["e", "rr"]),
        ("C8", 8, ["e", "r", "rr", "rrr"]),
        ("D4", 8, list(SYMMETRIES)),
        ("D16", 32, list(SYMMETRIES)),
    ],
)
def test_a_group_says_what_it_holds(name, count, exact):
    group = CopyGroup(name)
    assert len(group) == count and [element.name for element in group.elements] == exact


@pytest.mark.parametrize("name", ["C8", "D8"])
def test_the_nearest_pixel_claims_no_symmetry(name):
    """Ties at 45 degrees break quarter turns and mirrorings: no report holds them against a net."""
    group = CopyGroup(name, interpolation="nearest")
    assert [element.name for element in group.elements] == ["e"]
    x = images(8, torch.float64)
    still = group.all_copies(x)
    for element in ("r", "m") if name == "D8" else ("r",):
        turned = group.all_copies(transform_image(x, element))
        gaps = (turned[:, :, None] - still[:, None]).abs().amax(dim=(0, 3, 4, 5))
        assert gaps.min(dim=1).values.max() > 0.01, element


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "shape"), [("C12", (7, 7)), ("C8", (8, 8)), ("C4", (5, 8)), ("D3", (13, 13))]
)
def test_the_nearest_pixel_is_the_same_in_every_dtype(name, shape, dtype):
    """Ties fall as in the published float32; bfloat16 holds whole numbers up to 256."""
    group = CopyGroup(name, interpolation="nearest", rectangular="crop", fill=-1.0)
    x = torch.arange(float(shape[0] * shape[1])).view(1, 1, *shape)
    assert torch.equal(group.all_copies(x.to(dtype)).float(), group.all_copies(x))


@pytest.mark.parametrize("name", ["C8", "D8", "D16", "C12"])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("disc_mask", [False, True])
def test_finer_groups_are_permuted_by_their_exact_elements(name, size, disc_mask):
    """Copies of a turned image are the copies of the image, in another order."""
    group = CopyGroup(name, fill=-0.4, disc_mask=disc_mask)
    x = images(size, torch.float64)
    still = group.all_copies(x)
    for element in group.elements:
        turned = group.all_copies(transform_image(x, element.name))
        gaps = (turned[:, :, None] - still[:, None]).abs().amax(dim=(0, 3, 4, 5))  # [T T]
        assert gaps.min(dim=1).values.max() < 1e-12
        assert sorted(gaps.argmin(dim=1).tolist()) == list(range(len(group)))


def test_copies_keep_dtype_and_gradient():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = images(8, dtype).requires_grad_()
        copies = CopyGroup("D8").all_copies(x)
        assert copies.dtype == dtype
        copies.float().sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_corners_take_the_fill_colour_and_a_flat_image_of_it_stays():
    x = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, 9, 9)
    group = CopyGroup("C8", fill=[1.0, 2.0, 3.0])
    torch.testing.assert_close(group.all_copies(x), x[:, None].expand(1, 8, 3, 9, 9))
    assert CopyGroup("C8", fill=5.0).all_copies(x)[0, 1, 0, 0, 0] == 5
    with pytest.raises(ValueError, match="fill has 2 values for 3 channels"):
        CopyGroup("C8", fill=[0.0, 1.0]).all_copies(x)


@pytest.mark.parametrize(("name", "height", "width"), [("C8", 9, 9), ("D8", 8, 8), ("D2", 6, 10)])
def test_outside_the_inscribed_circle_is_nothing_but_the_fill(name, height, width):
    """In every copy, turned between the pixels or not, and of the shorter side."""
    x = torch.rand(1, 3, height, width) + 1
    copies = CopyGroup(name, fill=-7.0, disc_mask=True).all_copies(x)
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    outside = rows[:, None].square() + columns.square() > (min(height, width) / 2) ** 2
    assert outside.any() and (copies[..., outside] == -7).all()
    assert (copies[..., height // 2, width // 2] > 0).all()


def test_rectangles_are_refused_or_padded_and_mirrors_take_them():
    wide = torch.randn(1, 3, 8, 12)
    assert CopyGroup("mirror").all_copies(wide).shape == (1, 2, 3, 8, 12)
    assert CopyGroup("D2").all_copies(wide).shape == (1, 4, 3, 8, 12)
    with pytest.raises(ValueError, match="8 x 12 pixels must be square; rectangular=pad"):
        CopyGroup("C4").all_copies(wide)
    padded = CopyGroup("C4", rectangular="pad", fill=7.0).all_copies(wide)
    assert padded.shape == (1, 4, 3, 12, 12) and torch.equal(padded[:, 0, :, 2:10], wide)
    assert (padded[:, 0, :, :2] == 7).all() and (padded[:, 0, :, 10:] == 7).all()
    with pytest.raises(ValueError, match="differ by an odd number"):
        CopyGroup("C4", rectangular="pad").all_copies(torch.randn(1, 3, 8, 11))


def test_cropped_rectangles_keep_their_frame():
    wide = torch.randn(1, 3, 6, 10)
    group = CopyGroup("C4", interpolation="nearest", rectangular="crop", fill=7.0)
    copies = group.all_copies(wide)
    assert torch.equal(copies[:, 2], wide.flip((-2, -1)))
    # The middle square turns as a square does, what lies above and below is lost.
    assert torch.equal(copies[:, 1, :, :, 2:8], wide[..., 2:8].rot90(1, (-2, -1)))
    assert (copies[:, 1, :, :, :2] == 7).all() and (copies[:, 1, :, :, 8:] == 7).all()
    assert [element.name for element in group.elements] == ["e", "rr"]
    with pytest.raises(ValueError, match="cannot be turned back"):
        group.undo(copies[:, 1].movedim(1, -1), 1)
    with pytest.raises(ValueError, match="goes with interpolation=nearest"):
        CopyGroup("C4", rectangular="crop")


def test_the_way_back_undoes_a_copy():
    x = images(8)
    group = CopyGroup("D4")
    for index in range(8):
        back, share = group.undo(group.copy(x, index).movedim(1, -1), index)
        assert torch.equal(back.movedim(-1, 1), x) and (share == 1).all()


@pytest.mark.parametrize("name", ["D", "4", "D0", "S4", "", "c4"])
def test_other_words_are_refused(name):
    with pytest.raises(ValueError, match="unknown group"):
        parse_group(name)


def test_other_options_are_refused():
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, nearest"):
        CopyGroup("D4", interpolation="cubic")
    with pytest.raises(ValueError, match="rectangular must be one of refuse, pad, crop"):
        CopyGroup("D4", rectangular="cut")
    for fill in ("black", [0.0, "x"], [], float("nan"), None, True):
        with pytest.raises(ValueError, match="fill must be a number, or a list with one per"):
            CopyGroup("C8", fill=fill)

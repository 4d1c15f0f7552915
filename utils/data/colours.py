"""Pillow's and torchvision's colour operators, for a whole batch on any device.

Images are float tensors [N 3 H W] that hold whole numbers from 0 to 255; every operator rounds as
Pillow does and agrees with it to one level, so that a batch augmented on the device has the
distribution of images augmented one by one. Strengths are tensors [N], one number per image.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def luma(images: Tensor) -> Tensor:
    """Pillow's grey [N 1 H W]: ITU-R 601 in 16-bit fixed point, exact in float32."""
    red, green, blue = images.unbind(1)
    grey = 19595 * red + 38470 * green + 7471 * blue + 0x8000
    return (grey / 65536).floor()[:, None]


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black: 1 leaves an image as it is."""
    return _levels(images * _each(factors))


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    mean = (luma(images).mean(dim=(1, 2, 3)) + 0.5).floor()
    return _blend(_each(mean), images, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's own greys."""
    return _blend(luma(images), images, factors)


def hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the colour circle by shifts in [-0.5, 0.5], through Pillow's 8-bit HSV."""
    h, s, v = _to_hsv(images)
    # As uint8 arithmetic has it: towards zero, then around the circle of 256.
    h = (h + (shifts * 255).trunc()[:, None, None]) % 256
    return _from_hsv(h, s, v)


def greyscale(images: Tensor) -> Tensor:
    """Grey in three channels."""
    return luma(images).expand_as(images)


def solarize(images: Tensor) -> Tensor:
    """Invert levels of 128 and more."""
    return torch.where(images >= 128, 255 - images, images)


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel_size: int) -> Tensor:
    """torchvision's blur: `kernel_size` taps, mirrored at the borders, rounded once."""
    radius = kernel_size // 2
    at = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (at / sigmas[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    return _filter(_filter(images, kernels, -1, "reflect"), kernels, -2, "reflect").round()


def pillow_reach(max_radius: float) -> int:
    """How many pixels to either side `pillow_blur` looks at for radii up to this one."""
    # On the CPU, whatever device a recipe is built on.
    return math.ceil(_box_radius(torch.tensor(float(max_radius), device="cpu")).item())


def pillow_blur(images: Tensor, radii: Tensor, reach: int) -> Tensor:
    """Pillow's GaussianBlur: three box blurs along the rows, then three along the columns.

    The boxes have fractional ends and are rounded one by one; borders repeat. `reach` is that of
    the largest radius (`pillow_reach`): the radii are on the device and are not looked at.
    """
    boxes = _box_radius(radii)[:, None]
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype).abs()
    # Weights in 24-bit fixed point, cut off: they decide how a tie is rounded.
    inner = (2**24 / (2 * boxes + 1)).floor()
    outer = ((2**24 - (2 * boxes.floor() + 1) * inner) / 2).floor()
    weights = torch.where(at <= boxes.floor(), inner, outer * (at <= boxes.floor() + 1))
    # Two halves of 12 bits each, so that float32 holds every sum exactly.
    high, low = (weights / 4096).floor(), weights % 4096
    for dim in (-1, -1, -1, -2, -2, -2):
        carried = _filter(images, low, dim, "replicate") + 2**23
        whole = _filter(images, high, dim, "replicate") + (carried / 4096).floor()
        images = (whole / 4096).floor()
    return images


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Levels 0 to 255 to normalised images; mean and std [3] are those of images in [0, 1]."""
    scale = 1 / (255 * std)
    return images * scale[:, None, None] - (mean / std)[:, None, None]


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _levels(values: Tensor) -> Tensor:
    return values.floor().clamp(0, 255)


def _blend(ground: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    return _levels(ground + _each(factors) * (images - ground))


def _filter(images: Tensor, kernels: Tensor, dim: int, border: str) -> Tensor:
    """Each image [3 H W] with its own kernel of [N K] along one dimension.

    A sum of shifted images: a convolution on a GPU may round its factors to TF32.
    """
    taps = kernels.shape[1]
    padding = (taps // 2,) * 2 + (0, 0)
    padded = pad(images, padding if dim == -1 else padding[::-1], mode=border)
    length = images.shape[dim]
    total = torch.zeros_like(images)
    for tap in range(taps):
        total = torch.addcmul(total, padded.narrow(dim, tap, length), _each(kernels[:, tap]))
    return total


def _box_radius(sigma: Tensor) -> Tensor:
    """Radius of the box that, three times over, has this standard deviation (as Pillow has it)."""
    variance = sigma**2 / 3
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    spread = (most - least).clamp(min=1)
    r, g, b = ((most - channel) / spread for channel in (red, green, blue))
    # Rounded where Pillow rounds, from double precision where there is any: one step of hue can be
    # five levels of a colour.
    double = torch.float32 if images.device.type == "mps" else torch.float64
    rd, gd, bd = r.to(double), g.to(double), b.to(double)
    h = torch.where(red == most, bd - gd, torch.where(green == most, 2 + rd - bd, 4 + gd - rd))
    h = ((h.float().to(double) / 6 + 1) % 1).float()
    h = (h.to(double) * 255).floor().to(images.dtype)
    s = (spread / most.clamp(min=1) * 255).floor()
    grey = most == least
    return h.masked_fill(grey, 0), s.masked_fill(grey, 0), most


def _from_hsv(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    share = s / 255
    sector = (h * 6 / 255).floor()
    rest = h * 6 / 255 - sector
    low = _half_up(v * (1 - share))
    falling = _half_up(v * (1 - share * rest))
    rising = _half_up(v * (1 - share * (1 - rest)))
    sector = sector.long() % 6
    choices = torch.stack([v, falling, low, low, rising, v])
    # Green runs through the same six pieces two sectors later, blue four sectors later.
    return torch.stack(
        [choices.gather(0, ((sector + offset) % 6)[None])[0] for offset in (0, 4, 2)], dim=1
    )


def _half_up(values: Tensor) -> Tensor:
    return (values + 0.5).floor()

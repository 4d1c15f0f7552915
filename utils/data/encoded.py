"""Image files that are decoded late: once it is known how much of their resolution is needed."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.images import ImageDataset, Subset, read_image

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a later torchvision drops it, says 0.29: then Pillow decodes
    decode_jpeg = None

JPEG = b"\xff\xd8\xff"
SCALES = (8, 4, 2)  # the reductions a JPEG decoder can do while it decodes, strongest first


class EncodedImage:
    """The bytes of an image file; `name` is used in messages.

    `size` is (height, width) as stored and costs no decoding. `ImageError` from either for what is
    no whole image.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name
        self._decoded: Image.Image | None = None
        if data.startswith(JPEG):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    self._mode = image.mode
                    self.size = image.size[::-1]
                return
            except Exception:  # the whole decoder below says it better
                pass
        self._mode = ""
        self._decoded = read_image(io.BytesIO(data), name=name)
        self.size = self._decoded.size[::-1]

    def decode(self, reduction: float = 1.0) -> Tensor:
        """RGB pixels, uint8 [3 H W].

        A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where `reduction`, by how much its
        pixels will be shrunk at least, allows it: a whole crop then costs less than its file.
        torchvision decodes, where it has a decoder, as its is faster than Pillow's on small files;
        what it does not take, Pillow does.
        """
        if self._decoded is not None:
            return pixels_of(self._decoded)
        scale = next((scale for scale in SCALES if reduction >= scale), 1)
        if self._mode in ("RGB", "L"):
            try:
                whole = scale == 1 and decode_jpeg is not None
                return self._whole() if whole else self._draft(scale)
            except Exception:  # Pillow says what is wrong, or reads it nevertheless
                pass
        return pixels_of(read_image(io.BytesIO(self.data), name=self.name))

    def _whole(self) -> Tensor:
        data = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB)

    def _draft(self, scale: int) -> Tensor:
        height, width = self.size
        with Image.open(io.BytesIO(self.data)) as image:
            image.draft("RGB", (max(1, width // scale), max(1, height // scale)))
            return pixels_of(image.convert("RGB"))


def encoded_image(dataset: ImageDataset, index: int) -> EncodedImage | Image.Image:
    """The image's file from a data set that has it (`read_bytes`), else the decoded image.

    Decoded too where EXIF data turn the image.
    """
    if isinstance(dataset, Subset):
        return encoded_image(dataset.dataset, int(dataset.indices[index]))
    read: Callable[[int], bytes] | None = getattr(dataset, "read_bytes", None)
    if read is None or getattr(dataset, "exif_orientation", False):
        return dataset.read(index)
    return EncodedImage(read(index), dataset.path(index))


def pixels_of(image: Image.Image) -> Tensor:
    """A Pillow image as uint8 [3 H W], its colours side by side in memory."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

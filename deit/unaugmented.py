"""Images as they are, for recipes that augment nothing."""

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, UnlessOfSize, to_normalized_tensor
from utils.ranges import check_count


class Unaugmented:
    """RGB image to a normalised tensor [3 S S]; one of another size is resized and cropped.

    Also of use as the `transform` of a probe, which then judges images as the training saw them.
    """

    def __init__(
        self,
        *,
        input_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_count("input_size", input_size, 1)
        self.input_size = input_size
        resize = v2.Resize(input_size, v2.InterpolationMode.BICUBIC, antialias=True)
        fitted = UnlessOfSize(input_size, resize, v2.CenterCrop(input_size))
        self.steps = v2.Compose([fitted, *to_normalized_tensor(mean, std)])

    def __call__(self, image: Image) -> Tensor:
        """Convert one image."""
        return self.steps(image)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.steps})"  # stored features are identified by it

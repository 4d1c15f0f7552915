"""Write the weights of a network as one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoints.files import reason
from utils.checkpoints.shards import set_usual_mode
from utils.errors import UserError
from utils.whole_file import whole_file


def export_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights with `metadata` (strings), whole or not at all; rank 0 only.

    Raises UserError if the disk does not take them.
    """
    whole = {name: value.contiguous().clone() for name, value in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            save_file(whole, partial, dict(metadata))
            set_usual_mode(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} not written ({reason(error)})") from None

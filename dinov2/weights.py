"""Starting a run from weights: a backbone alone, or a student or teacher with its heads."""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from vit.keys import strip_wrappers
from vit.weights import load_state, read_state

HEADS = ("dino_head", "ibot_head")
logger = logging.getLogger(__name__)


def read_start(path: str) -> dict[str, dict[str, Tensor]]:
    """The weights of a file, by part: backbone, and dino_head and ibot_head where it has them.

    Reads published teacher files, exported backbones, and the recipe's own state (its teacher).
    """
    state = read_state(path)
    teacher = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}}
    for name, tensor in (teacher or state).items():
        head, _, rest = strip_wrappers(name).partition(".")
        if head in HEADS:
            parts.setdefault(head, {})[rest] = tensor
        else:
            parts["backbone"][name] = tensor
    return parts


def load_start(parts: nn.ModuleDict, start: Mapping[str, Mapping[str, Tensor]], path: str) -> None:
    """Load a file's weights into backbone and heads, strictly.

    A file with heads must have those of `parts`; with a file without any they stay as they are.
    Raises ValueError that lists the keys that are missing, left over or of another shape.
    """
    ours, theirs = set(parts) - {"backbone"}, set(start) - {"backbone"}
    if theirs and ours != theirs:
        raise ValueError(
            f"{path}: has {' and '.join(sorted(theirs))}, the recipe {' and '.join(sorted(ours))}; "
            f"set recipe.separate_head={str('ibot_head' in theirs).lower()}"
            f"{', with an ibot_loss_weight above 0' if 'ibot_head' in theirs else ''}"
        )
    if not theirs:
        logger.info("%s has no heads: they start anew", path)
    for name, weights in start.items():
        try:
            load_state(parts[name], weights)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None

"""Maps of attention: how much the class token, or a patch on average, looks at each patch.

Queries and keys are read where a net calls torch's attention, so octic and plain blocks, timm's and
torchvision's nets serve as they are. Rollout: Abnar and Zuidema 2020, "Quantifying Attention Flow
in Transformers".
Letters: B images, H heads, T tokens, h w grid of patches, R rows: the queries that are read.
Blocks are numbered by their calls of attention.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from evaluation.features.dataset import evaluating
from evaluation.features.reading import patch_tokens
from evaluation.pictures.figures import grid, save, visible
from utils.errors import UserError
from utils.ranges import check_word
from utils.symmetry import invert, transform_image
from vit.backbone import Backbone

QUERIES = ("class", "patches")
COLOURS = "inferno"
UNSEEN = (
    "this net has no attention over all its patches that could be drawn (looked for calls of "
    "scaled_dot_product_attention and nn.MultiheadAttention)"
)


class AttentionRecorder(TorchFunctionMode):
    """Keeps the attention weights [B H R T] of each call while it is entered.

    `rows` are the queries wanted of all T. Attention written without
    `scaled_dot_product_attention` and without `nn.MultiheadAttention` goes unseen.
    """

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.rows = rows
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, recording where it is attention."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.weights.append(_weights(self.rows, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            # It turns this mode off for all that it calls, but can give the weights itself.
            asked = {"need_weights": True, "average_attn_weights": False}
            out, weights = func(*args, **{**kwargs, **asked})
            self.weights.append(weights[:, :, self.rows])
            return out, None
        return func(*args, **kwargs)


class Recorded(NamedTuple):
    """The attention of a net, where it is over all patches."""

    blocks: dict[int, Tensor]  # weights [B H R T] on the host, by the number of the block
    num_blocks: int  # with those that do not hold all patches any more, or attend unseen
    grid_size: tuple[int, int]
    first: int  # tokens in front of the patches; others may follow them

    @property
    def patches(self) -> slice:
        """Which tokens are the patches."""
        return slice(self.first, self.first + self.grid_size[0] * self.grid_size[1])


@torch.no_grad()
def attention_maps(
    net: Backbone, images: Tensor, *, block: int = -1, query: str = "class"
) -> Tensor:
    """Attention to the patches [B H h w] in one block, in multiples of uniform attention.

    block: negative: from the end of the blocks that hold all patches.
    query: "class", the class token, or "patches", the mean over the patches; one row of weights
    sums to 1 over all tokens, registers and the class token included, so 1 is what each gets where
    no token is preferred. Raises UserError for nets and blocks without such attention.
    """
    return _maps(net, images, block, query)[0]


@torch.no_grad()
def attention_rollout(net: Backbone, images: Tensor, *, query: str = "class") -> Tensor:
    """Attention to the patches through all blocks [B 1 h w], in multiples of uniform attention.

    The product of (A + 1) / 2 over the blocks that hold all patches, A being the mean over the
    heads. Raises UserError for nets without such attention.
    """
    return _rollout(net, images, query)[0]


@torch.no_grad()
def draw_attention(
    net: Backbone,
    images: Tensor,
    folder: Path,
    *,
    element: str = "r",
    block: int = -1,
    query: str = "class",
    rollout: bool = False,
) -> list[Path]:
    """Draw `attention.png`, also of the turned images [B 3 H H], and `attention_heads.png`.

    The first and the last map of a row of the former agree where the attention is equivariant. The
    latter holds the heads one by one; a rollout has none.
    """

    def maps_of(views: Tensor) -> tuple[Tensor, str]:
        return _rollout(net, views, query) if rollout else _maps(net, views, block, query)

    turned = transform_image(images, element)
    (maps, what), (turned_maps, _) = maps_of(images), maps_of(turned)
    paths = [
        save(
            _draw_turned(images, maps, turned, turned_maps, element, what), folder / "attention.png"
        )
    ]
    if not rollout:
        paths.append(save(_draw_heads(images, maps, what), folder / "attention_heads.png"))
    return paths


def _maps(net: Backbone, images: Tensor, block: int, query: str) -> tuple[Tensor, str]:
    """Maps of one block, and what they are."""
    rows = slice(0, 1) if query == "class" else slice(None)
    recorded = _record(net, images, rows, query)
    number = _number(block, recorded)
    weights = recorded.blocks[number]
    if query == "patches":
        weights = weights[:, :, recorded.patches]
    found = weights.mean(dim=2)[..., recorded.patches].unflatten(-1, recorded.grid_size)
    where = f"block {number}"
    if block == -1:
        is_last = number == recorded.num_blocks - 1
        where = "last block" if is_last else f"{where}, the last with all patches"
    return found * weights.shape[-1], f"attention of the {_who(query)}, {where}"


def _rollout(net: Backbone, images: Tensor, query: str) -> tuple[Tensor, str]:
    """Rollout over the blocks with all patches, and what it is."""
    recorded = _record(net, images, slice(None), query)
    blocks = list(recorded.blocks.values())
    tokens = blocks[0].shape[-1]
    identity = torch.eye(tokens, dtype=blocks[0].dtype)
    flow = identity
    for weights in blocks:
        flow = (weights.mean(dim=1) + identity) / 2 @ flow
    row = flow[:, 0] if query == "class" else flow[:, recorded.patches].mean(dim=1)
    what = f"rollout of attention, {_who(query)}"
    if len(blocks) < recorded.num_blocks:
        numbers = ", ".join(map(str, recorded.blocks))
        what = f"{what}, over the blocks with all patches ({numbers})"
    return row[:, None, recorded.patches].unflatten(-1, recorded.grid_size) * tokens, what


def _number(block: int, recorded: Recorded) -> int:
    """The block's own number; UserError if the net has none of that number, with all patches."""
    numbers = list(recorded.blocks)
    if block in numbers:
        return block
    if -len(numbers) <= block < 0:
        return numbers[block]
    if 0 <= block < recorded.num_blocks:
        first = next(number for number in range(block + 1) if number not in numbers)
        raise UserError(
            f"block {block} has no attention over all patches; block {first} is the first without"
        )
    raise UserError(f"block {block} asked of a net with attention in {recorded.num_blocks} blocks")


def _who(query: str) -> str:
    return "class token" if query == "class" else "patches"


def _record(net: Backbone, images: Tensor, rows: slice, query: str) -> Recorded:
    check_word("query", query, QUERIES)
    recorder = AttentionRecorder(rows)
    with evaluating(net) as device, recorder:
        try:
            height, width = patch_tokens(net, images.to(device)).shape[1:3]
        except UserError:
            if recorder.weights:
                raise
            raise UserError(UNSEEN) from None  # not what becomes of its patches
    cells, inner = height * width, getattr(net, "net", net)
    needed = cells + getattr(inner, "num_prefix_tokens", 0)
    blocks = {
        number: part.cpu()
        for number, part in enumerate(recorder.weights)
        if part.ndim == 4
        and part.shape[-1] >= needed
        and len(part) == len(images)
        # Some blocks ask for the class token alone: of the patches they say nothing.
        and part.shape[-2] == len(range(part.shape[-1])[rows])
    }
    if not blocks:
        raise UserError(UNSEEN)
    others = next(iter(blocks.values())).shape[-1] - cells
    if query == "class" and (not getattr(inner, "has_class_token", True) or not others):
        raise UserError("this net has no class token; query=patches draws the patches' attention")
    first = getattr(inner, "num_prefix_tokens", others)
    num_blocks = max(len(recorder.weights), getattr(net, "depth", 0))
    return Recorded(blocks, num_blocks, (height, width), first)


def _weights(
    rows: slice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax of q k / sqrt(width) + mask, for some rows [B H R T], in float32 at least."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query[..., rows, :] @ key.mT * scale
    if attn_mask is not None:
        mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])[..., rows, :]
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(dim=-1)


def _draw_turned(
    images: Tensor, maps: Tensor, turned: Tensor, turned_maps: Tensor, element: str, what: str
) -> Figure:
    mean, turned_mean = maps.mean(dim=1), turned_maps.mean(dim=1)
    back = transform_image(turned_mean, invert(element))
    columns = {
        "image": (images, None),
        "attention": (images, mean),
        f"turned ({element})": (turned, None),
        "its attention": (turned, turned_mean),
        "turned back": (images, back),
    }
    return _draw(columns, what if maps.shape[1] == 1 else f"{what}, mean of {maps.shape[1]} heads")


def _draw_heads(images: Tensor, maps: Tensor, what: str) -> Figure:
    columns = {"image": (images, None), "mean": (images, maps.mean(dim=1))}
    columns |= {f"head {head}": (images, part) for head, part in enumerate(maps.unbind(1))}
    return _draw(columns, what)


def _draw(columns: dict[str, tuple[Tensor, Tensor | None]], what: str) -> Figure:
    """One row per image; a column is images, or maps [B h w] laid over them."""
    rows = len(next(iter(columns.values()))[0])
    figure, axes = grid(rows, len(columns))
    figure.suptitle(what, fontsize=10)
    shown = torch.cat([maps.flatten() for _, maps in columns.values() if maps is not None])
    # A few patches take far more than all others: these few are cut off, so that others can be told
    # apart. At least twice uniform is shown, so that a net without preferences looks like one.
    top = max(float(np.quantile(shown.double().numpy(), 0.99)), 2.0)
    drawn = None
    for column, (title, (images, maps)) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=9)
        for row, picture in enumerate(visible(images).numpy()):
            axis = axes[row][column]
            if maps is None:
                axis.imshow(picture)
                continue
            height, width = picture.shape[:2]
            grey = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1)
            axis.imshow(grey)
            drawn = axis.imshow(
                maps[row].numpy(),
                cmap=COLOURS,
                vmin=0,
                vmax=top,
                alpha=0.7,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=axes[:, -1], shrink=0.9, aspect=15 * rows, extend="max")
    bar.set_label("times uniform attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure

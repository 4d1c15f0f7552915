"""What a token reduction is: hooks around and inside the blocks of a Vision Transformer.

A host (`baselines.token_reduction.hosts`) owns the loop over the blocks and calls the hooks. Each
pass of the network has its own `State`, so a pass does not change the reducer. Adds no parameters.

Letters in shapes: B images, T tokens, of which P prefix tokens come first (class token, registers,
distillation token), N patches of the full grid, h w that grid, H heads, d channels of a head, D
channels.
"""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.selection import rows_of


class Facts(NamedTuple):
    """What a reducer must know of the network it works in."""

    depth: int
    first: int  # the first block that may be reduced: after the octic blocks of a hybrid
    num_prefix: int
    has_class_token: bool
    head_dim: int


class Attended(NamedTuple):
    """Result of the attention of one block."""

    out: Tensor  # [B H M d] for the M tokens that are kept
    scores: Tensor | None = None  # what the reducer needs again after the attention
    rows: Tensor | None = None  # [B M] the tokens that are kept; None: all of them
    residual: Tensor | None = None  # [B M D] what the update is added to; None: the block's input


@dataclass
class State:
    """The state of one pass. Tensors are replaced, never modified in place."""

    num_prefix: int
    grid: tuple[int, int]
    dense: bool = False  # whether full-resolution features are wanted at the end
    record: dict[str, Tensor] | None = None  # filled for `inspect`; None otherwise
    attn_drop: float = 0.0  # dropout of attention weights in the block that runs
    origin: Tensor | None = None  # [B N] token that carries each patch, -1: dropped; None: its own
    held: Tensor | None = None  # [B N D] last value of the dropped patches
    size: Tensor | None = None  # [B T 1] number of patches that a token represents
    live: Tensor | None = None  # [B T] whether a token is real, not padding
    key_bias: Tensor | None = None  # [B 1 1 T] added to every attention score of a key
    memory: dict[str, Tensor] = field(default_factory=dict)  # the method's own

    @property
    def num_patches(self) -> int:
        """Patches of the full grid."""
        return self.grid[0] * self.grid[1]

    def copied(self) -> "State":
        """A state that a second run of a block can change without harm (recomputation)."""
        twin = copy.copy(self)
        twin.memory = dict(self.memory)
        return twin

    def note(self, name: str, tensor: Tensor) -> None:
        """Record a tensor, if there is a record."""
        if self.record is not None:
            self.record[name] = tensor

    @property
    def traced(self) -> bool:
        """Whether the origin of the patches is needed at the end."""
        return self.dense or self.record is not None

    def move(self, new_place: Tensor, x: Tensor) -> None:
        """Move tokens x [B T D]: new_place [B T] is the new position of each, -1: it is dropped.

        Keeps the origin map, and the last value of what is dropped.
        """
        if not self.traced:
            return
        batch, num_patches = x.shape[0], self.num_patches
        if self.origin is None:
            own = torch.arange(num_patches, device=x.device) + self.num_prefix
            self.origin = own.expand(batch, -1)
        present = self.origin >= 0
        place = new_place.gather(1, self.origin.clamp(min=0))
        place = torch.where(present, place, -1)
        if self.dense:
            now = rows_of(x, self.origin.clamp(min=0))
            held = now if self.held is None else self.held.to(now.dtype)
            # The value of a patch that stays is looked up when it is needed.
            self.held = torch.where(present[..., None], now, held)
        self.origin = place


class Reducer:
    """Base of the methods: every hook does nothing, every block runs unchanged.

    A method refuses networks in `bind`, and stores nothing of a pass in itself.
    """

    facts: Facts
    weighs_mean = True  # whether a network that pools by the mean counts tokens by their patches
    watches = False  # whether unchanged blocks are also run step by step for `inspect`

    def bind(self, facts: Facts) -> None:
        """Fit the options to a network; ValueError for blocks or tokens that it lacks."""
        self.facts = facts

    def __repr__(self) -> str:
        options = {key: value for key, value in vars(self).items() if key != "facts"}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    def start(self, state: State, x: Tensor) -> None:
        """The tokens [B T D] as they enter the first block that may be reduced."""

    def works_inside(self, index: int) -> bool:
        """Whether the block runs step by step: `attend` and `after_attention` are called in it."""
        return False

    def before_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """Map tokens [B T D] to those that enter the block."""
        return x

    def attend(
        self, state: State, index: int, q: Tensor, k: Tensor, v: Tensor, normed: Tensor
    ) -> Attended:
        """Attention of q, k, v [B H T d], made of normed tokens [B T D]."""
        return Attended(self.softmax_attention(state, q, k, v))

    def after_attention(
        self, state: State, index: int, x: Tensor, attended: Attended, k: Tensor
    ) -> Tensor:
        """Tokens [B T D] between attention and MLP; k [B H T d] are the block's keys."""
        return x

    def after_block(self, state: State, index: int, x: Tensor) -> Tensor:
        """Tokens [B T D] after the block."""
        return x

    def restore(self, state: State, x: Tensor) -> Tensor:
        """Tokens [B T D] at full resolution [B P+N D]; the state's pass must have been `dense`.

        Each patch has the value of the token that carries it; a dropped one keeps its last value.
        """
        if state.origin is None:
            if x.shape[1] != (whole := state.num_prefix + state.num_patches):
                raise ValueError(
                    f"{type(self).__name__} leaves {x.shape[1]} tokens of {whole}, and state.move "
                    "was not told where the patches went; features need it"
                )
            return x
        patches = rows_of(x, state.origin.clamp(min=0))
        if state.held is not None:
            dropped = (state.origin < 0)[..., None]
            patches = torch.where(dropped, state.held.to(patches.dtype), patches)
        return torch.cat([x[:, : state.num_prefix], patches], dim=1)

    def check_training(self, attn_drop: float) -> None:
        """ValueError if the method cannot be trained in a network with this dropout."""

    @staticmethod
    def softmax_attention(state: State, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Ordinary attention [B H T d], with the state's bias of keys."""
        bias = None if state.key_bias is None else state.key_bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=state.attn_drop)


def check_blocks(blocks: "list[int] | tuple[int, ...]", facts: Facts, what: str) -> None:
    """Refuse blocks that the network lacks or that are in its octic half."""
    for index in blocks:
        if not 0 <= index < facts.depth:
            raise ValueError(f"{what} {index}: the network has blocks 0 to {facts.depth - 1}")
        if index < facts.first:
            raise ValueError(
                f"{what} {index}: blocks 0 to {facts.first - 1} are octic and stay as they are; "
                f"the plain ones are {facts.first} to {facts.depth - 1}"
            )


def check_class_token(facts: Facts, what: str) -> None:
    """Refuse a network without class token."""
    if not facts.has_class_token:
        raise ValueError(
            f"{what} reads the class token's attention; the network has no class token"
        )

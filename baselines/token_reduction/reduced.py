"""Any ViT with a token reduction inside: the same weights, the same calls, fewer operations.

Letters in shapes: B images, T tokens that are left, P prefix tokens, N patches in a grid of h x w,
D channels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baselines.token_reduction.hosts import find_host
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reducer import Reducer, State
from baselines.wrapping import make_backbone
from vit.backbone import Encoded, Features, channels_of, take_indices
from vit.weights import state_for

NET = "net."


class Inspection(NamedTuple):
    """A forward pass with all its intermediate decisions."""

    logits: Any  # what a call gives
    tokens: Tensor  # [B T D] tokens that are left, after the final norm
    origin: Tensor  # [B h w] which of them carries each patch, -1: dropped
    record: dict[str, Tensor]  # what each block decided, as `block3.kept`; see each method


class Reduced(nn.Module):
    """A network whose tokens are reduced: logits = head(pool(blocks(embed(images)))) as before.

    net: timm's VisionTransformer (in `vit.adapters.TimmBackbone` or not), a ViT of `vit.models`, or
        an octic hybrid, whose octic blocks stay as they are.
    reducer: one of the seven methods; `baselines.token_reduction.presets.make_reducer` names them.

    No parameters are added, so the network's own files load into this one as well.
    Features and `forward_features` are at full resolution whatever was dropped or merged. A network
    that pools by the mean takes the mean of the tokens that are left, each weighted by the number
    of its patches if the method counts them.
    """

    def __init__(self, net: nn.Module, reducer: Reducer) -> None:
        super().__init__()
        self.host = find_host(net)
        self.net = self.host.net
        self.set_reducer(reducer)

    def set_reducer(self, reducer: Reducer) -> None:
        """Switch to another method, or other options, with the same weights."""
        reducer = copy.deepcopy(reducer)
        reducer.bind(self.host.facts)
        self.reducer = reducer

    # What is computed.

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        """Logits of images [B C H W], as the network itself gives them."""
        x, state = self._run(images, masks)
        return self.host.classify(self.net.norm(x), self._weights(state))

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Normalised tokens [B P+N D] at full resolution, of images [B C H W]."""
        x, state = self._run(x, masks, dense=True)
        return self.net.norm(self.reducer.restore(state, x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """The network's own pooling and head on tokens [B T D]."""
        return self.net.forward_head(x, pre_logits=pre_logits)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[Features]:
        """Normalised features of the asked blocks, maps at full resolution (Backbone contract)."""
        indices = take_indices(layers, self.depth)
        grid, first = self.host.grid(images), self.host.facts.num_prefix
        state = self._start(images, dense=True)
        embedded = self.host.embed(images)
        kept = self.host.run(embedded, state, self.reducer, indices, stop=max(indices))[2]
        normed = [self.net.norm(kept[index]) for index in indices]
        has_class = self.host.facts.has_class_token
        return [
            Features(
                cls=x[:, 0] if has_class else self.host.classless(x),
                patches=x[:, first:].unflatten(1, grid),
            )
            for x in normed
        ]

    def encode(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Encoded]:
        """Encode crops of any sizes, [Bi C Hi Wi] each, one after the other; order is kept."""
        if not self.host.facts.has_class_token:
            raise ValueError("encode() needs a class token; build the model with class_token=True")
        found, first = [], self.host.facts.num_prefix
        for crop, mask in zip(crops, masks or [None] * len(crops), strict=True):
            tokens, state = self._run(crop, mask, dense=True)
            raw = self.reducer.restore(state, tokens)
            x = self.net.norm(raw)
            parts = {"cls": x[:, 0], "registers": x[:, 1:first], "patches": x[:, first:]}
            found.append(Encoded(**parts, prenorm=raw))
        return found

    @torch.no_grad()
    def inspect(self, images: Tensor) -> Inspection:
        """A pass with all decisions of the method: for pictures, costs and tests."""
        record: dict[str, Tensor] = {}
        x, state = self._run(images, record=record)
        tokens = self.net.norm(x)
        origin = state.origin
        if origin is None:
            own = torch.arange(state.num_patches, device=x.device) + state.num_prefix
            origin = own.expand(len(x), -1)
        logits = self.host.classify(tokens, self._weights(state))
        return Inspection(logits, tokens, origin.unflatten(1, state.grid), record)

    def kept_patches(self, images: Tensor) -> list[Tensor]:
        """Booleans [B h w] after each block that drops tokens: which patches still have one."""
        record, grid, stages = self.inspect(images).record, self.host.grid(images), []
        left = grid[0] * grid[1] * len(images)
        for index in range(self.depth):
            origin = record.get(f"block{index}.origin")
            if origin is None:
                continue
            kept = origin >= 0
            if int(kept.sum()) < left:
                left = int(kept.sum())
                stages.append(kept.unflatten(1, grid))
        return stages

    def _run(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        *,
        dense: bool = False,
        record: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        state = self._start(images, dense=dense, record=record)
        x, state, _ = self.host.run(self.host.embed(images, masks), state, self.reducer)
        return x, state

    def _start(
        self, images: Tensor, *, dense: bool, record: dict[str, Tensor] | None = None
    ) -> State:
        if self.training:
            last = self.net.blocks[-1]
            self.reducer.check_training(self.host.attn_drop(last))
        grid = self.host.grid(images)
        return State(self.host.facts.num_prefix, grid, dense=dense, record=record)

    def _weights(self, state: State) -> Tensor | None:
        """Share of each patch token [B T-P] in a mean, if tokens have different shares."""
        parts = []
        if state.size is not None and self.reducer.weighs_mean:
            parts.append(state.size.squeeze(-1))
        if state.live is not None:
            parts.append(state.live)
        if not parts:
            return None
        weights = parts[0] if len(parts) == 1 else parts[0] * parts[1]
        return weights[:, state.num_prefix :]

    # The interface that probes and reports read.

    @property
    def embed_dim(self) -> int:
        """Channels of the features."""
        return int(self.net.embed_dim)

    num_features = head_hidden_size = embed_dim

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self.net.feature_info[-1]["reduction"])

    @property
    def depth(self) -> int:
        """Blocks that `features` can be asked for."""
        return self.host.facts.depth

    @property
    def switch(self) -> int:
        """Blocks whose maps obey a group's law: the octic ones."""
        return self.host.facts.first

    @property
    def num_prefix_tokens(self) -> int:
        """Class token, registers, distillation token."""
        return self.host.facts.num_prefix

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return channels_of(self.net)

    @property
    def num_classes(self) -> int:
        """Logits of the head, 0 where a call gives features."""
        return int(self.net.num_classes)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the network, with names seen from this wrapper."""
        config = dict(getattr(self.net, "pretrained_cfg", None) or {})
        heads = config.get("classifier", "head") or "head"
        named = [heads] if isinstance(heads, str) else list(heads)
        prefixed = [NET + name for name in named]
        return {**config, "classifier": prefixed[0] if len(prefixed) == 1 else tuple(prefixed)}

    default_cfg = pretrained_cfg

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that run unchanged: these may be sharded, compiled or recomputed alone."""
        return [
            block
            for index, block in enumerate(self.net.blocks)
            if index < self.switch or not self.reducer.works_inside(index)
        ]

    def get_classifier(self) -> Any:
        """The network's head."""
        return self.net.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a fresh head (0 classes: none)."""
        self.net.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, its reduction included."""
        self.net.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the network does not decay."""
        return {NET + name for name in self.net.no_weight_decay()}

    def rename_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's weights under our names: ours, or the bare network's in any spelling.

        Those of a bare network must fit it exactly: ValueError as of `vit.keys.check_fit`.
        """
        if any(name.startswith(NET) for name in state):
            return dict(state)
        return {NET + name: tensor for name, tensor in state_for(self.net, state).items()}

    def extra_repr(self) -> str:
        """The method and its options."""
        return f"(reducer): {self.reducer!r}"


def reduced(
    backbone: Callable[..., nn.Module] | nn.Module,
    *,
    method: str | Reducer = "tome",
    form: str = "sound",
    options: Mapping[str, Any] | None = None,
    **backbone_keywords: Any,
) -> Reduced:
    """Build `Reduced` around a backbone that is still to be made (config target).

    method, form, options: see `baselines.token_reduction.presets.make_reducer`. Other
    keywords go to the backbone: num_classes, img_size, drop_path_rate, ...
    """
    if "form" in (options or {}):
        raise ValueError("form is a keyword of its own, not one of options")
    reducer = make_reducer(method, form=form, **(options or {}))
    own = ("method", "form", "options")
    return Reduced(make_backbone(backbone, backbone_keywords, "Reduced", own), reducer)

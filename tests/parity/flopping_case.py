"""One golden case of the topic `flopping`: its tensors in our storage, and comparisons with them.

Stored mirror features come as pairs (sym, asym) [... C], channels-first ones as [B C h w], or, with
tokens transformed too, as four tensors x0 (channel sym, token sym), x1 (sym, asym), x2 (asym, sym),
x3 (asym, asym) [B n C].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.harness import NotBuilt, check, load, strip

# Keywords that a published net takes and makes nothing of, as it does with any that it has not.
SWALLOWED = {
    *("use_symmetrized_asym_feats", "use_invariant_downsampling", "use_fused_attn"),
    *("use_attn_mixer", "drop_rate", "attn_drop_rate", "global_pool", "norm_layer"),
}

Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Tensors = list[Tensor]


class Golden:
    """One stored case in one precision: its inputs as leaves, its state, its outputs."""

    def __init__(self, case: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
        self.case, self.kwargs = case, dict(case["kwargs"])
        self.name = f"{case['name']} ({dtype})"
        self.dtype = dtype
        self.tensors = load(case, folder, dtype)
        inputs = {key: value for key, value in self.tensors.items() if key.startswith("in.")}
        self.leaves = {key: value.requires_grad_() for key, value in sorted(inputs.items())}

    def take(self, name: str, default: Any) -> Any:
        """A keyword of the published constructor; what is left at the end is not built."""
        return self.kwargs.pop(name, default)

    def inputs(self) -> Tensors:
        left = self.kwargs.keys() - (SWALLOWED if self.case["kind"] == "model" else set())
        if left:
            raise NotBuilt(f"{self.name}: {', '.join(sorted(left))}")
        return list(self.leaves.values())

    def loaded(self, module: nn.Module, rename: Rename) -> nn.Module:
        """The module with the stored state, every key accounted for, in eval mode."""
        self.rename, self.module = rename, module.to(self.dtype).eval()
        module.load_state_dict(rename(strip(self.tensors, "state.")), strict=True)
        return module

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Compare the outputs and, where they are stored, all gradients."""
        names = sorted(key for key in self.tensors if key == "out" or key.startswith("out."))
        for name, ours in zip(names, outputs, strict=True):
            stored = self.tensors[name]
            check(f"{self.name} {name}", ours, stored, self.case["tolerance"], metric="close")
        if not self.case["grad"]:
            return
        cotangents = [self.tensors[name.replace("out", "cot")] for name in names]
        sum((out * cot).sum() for out, cot in zip(outputs, cotangents, strict=True)).backward()
        parameters = dict(self.module.named_parameters())
        for name in [key for key in self.tensors if key.startswith("grad_")]:
            kind, _, rest = name.partition(".")
            if kind == "grad_in":
                ours = self.leaves[f"in.{rest}"].grad
            else:
                state = {rest: self.tensors[f"state.{rest}"]}
                ours = parameters[next(iter(self.rename(state)))].grad
            self._check_gradient(name, ours, self.tensors[name])

    def _check_gradient(self, name: str, ours: Tensor | None, stored: Tensor) -> None:
        assert ours is not None, f"{self.name} {name}: there is none"
        rule = self.case["grad_tolerance"]
        tol = rule["rel"] * max(float(stored.abs().max()), rule["floor"])
        check(f"{self.name} {name}", ours.view(stored.shape), stored, tol, metric="absolute")


# The stored features in our storage, and back.


def channels(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)


def halves(x: Tensor) -> Tensors:
    return list(x.chunk(2, dim=-1))


def last(parts: Sequence[Tensor]) -> Tensor:
    """Channels-first pairs [B C h w] as a feature [B h w D]."""
    return torch.cat(list(parts), dim=1).permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensors:
    return list(x.permute(0, 3, 1, 2).chunk(2, dim=1))


def pairs(parts: Sequence[Tensor]) -> Tensor:
    """x0 .. x3 as pairs of tokens [B n 2 D]."""
    x0, x1, x2, x3 = parts
    return torch.stack([channels([x0, x2]), channels([x1, x3])], dim=-2)


def unpaired(x: Tensor) -> Tensors:
    even, odd = (halves(part) for part in x.unbind(-2))
    return [even[0], odd[0], even[1], odd[1]]


def one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def listed(x: Tensor) -> Tensors:
    return [x]


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are, without what is zero anyway."""
    return {name: tensor for name, tensor in state.items() if name != "zero_center"}

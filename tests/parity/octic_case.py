"""One golden case of the topic `octic`: its tensors in our storage, and comparisons with them.

Stored features come as five tensors A1 A2 B1 B2 [... C], E [... 2 2C]; side by side, E's rows one
after the other, they are our storage.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octic.groups import get_group
from tests.parity.harness import check, check_gradients, load
from tests.published_names import published_vit_name
from vit.weights import load_state

D4 = get_group("D4")
IRREPS = ("A1", "A2", "B1", "B2", "E")
DTYPES = ((torch.float64, "tol_float64"), (torch.float32, "tol_float32"))


class Case:
    """One golden case in one precision: inputs, state, and outputs to compare with."""

    def __init__(self, case: dict[str, Any], folder: Path, dtype: torch.dtype, tol: float) -> None:
        self.args = case["args"]
        self.name = case["name"]
        self.reference = case.get("reference", "")
        self.dtype, self.tol = dtype, tol
        self.tensors = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in load(case, folder).items()
        }
        self.checked: set[str] = set()
        self.leaves: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return any(key == name or key.startswith(name + ".") for key in self.tensors)

    def packed(self, name: str) -> Tensor:
        parts = [self.tensors[f"{name}.{irrep}"] for irrep in IRREPS]
        if name.startswith("in."):
            for irrep, part in zip(IRREPS, parts, strict=True):
                part.requires_grad_()
                self.leaves[f"{name[3:]}.{irrep}"] = part
        return torch.cat([*parts[:4], parts[4].flatten(-2)], dim=-1)

    def unpacked(self, name: str) -> Tensor:
        stacked = torch.stack([self.tensors[f"{name}.{i}"] for i in range(8)], dim=-2)
        return from_published_order(stacked).flatten(-2)

    def leaf(self, name: str) -> Tensor:
        """A plain input as a leaf whose gradient can be compared."""
        value = self.tensors[f"in.{name}"]
        self.leaves[name] = value.requires_grad_()
        return value

    def state(self) -> dict[str, Tensor]:
        return {
            k.removeprefix("state."): v for k, v in self.tensors.items() if k.startswith("state.")
        }

    def has_other_token_parts(self) -> bool:
        """Whether a stored token is not zero beyond its invariant part."""
        parts = {k: v for k, v in self.state().items() if re.match(r"\w+_tokens?\.[1-7]$", k)}
        return any(bool(value.any()) for value in parts.values())

    def loaded(self, module: nn.Module) -> nn.Module:
        module = module.to(self.dtype).eval()
        load_state(module, self.state())
        return module

    def check(self, name: str, ours: Tensor) -> None:
        self.checked.add(name)
        check(f"{self.name} {name}", ours, self.tensors[name], self.tol, metric="relative")

    def check_packed(self, name: str, ours: Tensor) -> None:
        for irrep, part in zip(IRREPS, split_packed(ours), strict=True):
            self.check(f"{name}.{irrep}", part)

    def check_unpacked(self, name: str, ours: Tensor) -> None:
        for i, part in enumerate(to_published_order(ours.unflatten(-1, (8, -1))).unbind(-2)):
            self.check(f"{name}.{i}", part)

    def check_gradients(self, loss: Tensor, module: nn.Module | None = None) -> None:
        """Compare the loss and every stored gradient of parameters and inputs."""
        if not self.has("grad"):
            return
        if self.has("grad.loss"):
            self.check("grad.loss", loss)
        loss.backward()
        named = list(module.named_parameters()) if module is not None else []
        parameters = {
            published_vit_name(name, octic=octic, deit=deit): parameter
            for name, parameter in named
            for octic in (False, True)
            for deit in (False, True)
        }
        ours = {
            kind + name: leaf.grad
            for kind, leaves in (("param.", parameters), ("in.", self.leaves))
            for name, leaf in leaves.items()
        }
        stored = {
            key.removeprefix("grad."): value
            for key, value in self.tensors.items()
            if key.startswith(("grad.param.", "grad.in."))
        }
        check_gradients(ours, stored, self.tol)
        self.checked |= {f"grad.{name}" for name in stored}

    def assert_complete(self) -> None:
        stored = {key for key in self.tensors if key.startswith(("out.", "grad."))}
        assert stored == self.checked, f"not compared: {sorted(stored - self.checked)}"


def from_published_order(components: Tensor) -> Tensor:
    """Components [... 8 C] in the published order to the storage order."""
    inverse = sorted(range(8), key=D4.published_order.__getitem__)
    return components[..., inverse, :]


def to_published_order(components: Tensor) -> Tensor:
    """Components [... 8 C] in the storage order to the published order."""
    return components[..., list(D4.published_order), :]


def split_packed(x: Tensor) -> list[Tensor]:
    copy = x.shape[-1] // 8
    lines, plane = x[..., : 4 * copy], x[..., 4 * copy :]
    return [*lines.split(copy, dim=-1), plane.unflatten(-1, (2, -1))]


def loss_of(*outputs: Tensor) -> Tensor:
    return sum(part.pow(2).mean() for part in outputs)

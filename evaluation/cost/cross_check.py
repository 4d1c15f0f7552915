"""Compare torch's count of multiply-adds with fvcore's, the counter of the published figures."""

from math import prod
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, one_line
from utils.flops import no_fast_path

# Operators that both count; fvcore counts others as well.
PRODUCTS = {
    *("conv", "linear", "matmul", "bmm", "addmm", "baddbmm", "einsum"),
    *("scaled_dot_product_attention", "irrep_linear"),
}


class Untraceable(ValueError):
    """A net that fvcore cannot count."""


def require_fvcore() -> None:
    """UserError if fvcore, or a package that it needs, is not installed."""
    try:
        import fvcore.nn  # noqa: F401
    except ImportError as error:
        lacks = (error.name or "fvcore").partition(".")[0]
        needed = "" if lacks == "fvcore" else f", which needs {lacks}"
        raise UserError(f"--fvcore needs the package fvcore{needed}: pip install {lacks}") from None


def count_with_fvcore(net: nn.Module, size: int) -> dict[str, Any]:
    """Count with fvcore, which traces one image: total, counts by operator, skipped operators.

    Its own rules apply (five operations per element of a layer norm, for example); attention and
    our matrix product, for which it has none, count the multiply-adds of their products. Raises
    Untraceable for a net whose code the tracer cannot follow.
    """
    require_fvcore()
    from fvcore.nn import FlopCountAnalysis

    device = next(net.parameters()).device
    image = torch.zeros(1, getattr(net, "in_chans", 3), size, size, device=device)
    analysis = FlopCountAnalysis(net.eval(), image)
    analysis.set_op_handle(
        **{
            "aten::scaled_dot_product_attention": _attention_products,
            "octic::irrep_linear": _irrep_products,
        }
    )
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with torch.no_grad(), no_fast_path():
        try:
            total = int(analysis.total())
        except (TypeError, RuntimeError) as error:
            # While it traces, sizes are tensors, and a net may do with them what numbers alone can.
            raise Untraceable(
                f"torch's tracer, which fvcore uses, cannot follow the net: {one_line(error)[:200]}"
            ) from error
        return {
            "total": total,
            "by_operator": {key: int(value) for key, value in analysis.by_operator().items()},
            "skipped": dict(analysis.unsupported_ops()),
        }


def explain_difference(name: str, ours: int, theirs: dict[str, Any]) -> str:
    """One line on how far fvcore's count is from ours, and which of its operators explain that."""
    more = {key: value for key, value in theirs["by_operator"].items() if key not in PRODUCTS}
    parts = ", ".join(f"{key} {value / 1e9:.3f}" for key, value in more.items()) or "nothing"
    rest = theirs["total"] - ours - sum(more.values())
    line = (
        f"fvcore: {name}: {theirs['total'] / 1e9:.3f} against {ours / 1e9:.3f}; "
        f"it counts besides: {parts}"
    )
    return line if not rest else f"{line}; not explained: {rest / 1e9:+.3f}"


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention_products(inputs: list[Any], outputs: list[Any]) -> int:
    *heads, queries, channels = _shape(inputs[0])
    keys, width = _shape(inputs[1])[-2], _shape(inputs[2])[-1]
    return prod(heads) * queries * keys * (channels + width)


def _irrep_products(inputs: list[Any], outputs: list[Any]) -> int:
    tokens, width = _shape(inputs[0])
    lines = _shape(inputs[1])  # [L C' C]
    count = tokens * prod(lines)
    plane = inputs[2].type()
    if str(plane) == "NoneType":
        return count
    rows, columns = plane.sizes()  # [Q' Q], for each of the rows of the two-dimensional irrep
    return count + tokens * rows * (width - lines[0] * lines[2])

"""How operators of the namespace `octic` are made, so that calling one costs little.

A small net spends its time on the host, which launches one operator after another. An operator of
`torch.library.custom_op` costs the host 20 us a call beside its work, 120 with the gradient of
`register_autograd`; one made here costs 1, and 8 with its gradient (docs/performance.md).
"""

from collections.abc import Callable

import torch


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Register the function below as `octic::<schema>` on every device; returns the operator.

    The function must not change its arguments, nor return one of them or a view; tests prove it by
    `torch.library.opcheck`. The operator has no gradient of its own: call it within the forward
    pass of a `torch.autograd.Function`.
    """
    name, arguments = schema.split("(", 1)

    def register(function: Callable) -> Callable:
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(f"octic::{name}", f"({arguments}", tags=tags)
        torch.library.impl(f"octic::{name}", "default")(function)
        return getattr(torch.ops.octic, name).default

    return register

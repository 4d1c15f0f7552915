"""Packed attention on a real GPU: the kernel that `auto` takes, eager and compiled."""

import pytest
import torch
from torch import Tensor

from vit.attention import attend
from vit.packing import pack

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [64, 12])
def test_auto_equals_one_call_per_length(compiled, width):
    """Of heads that the variable-length kernel takes, and of others."""
    parts = [
        torch.randn(2, tokens, 3, width, device="cuda", dtype=torch.bfloat16) for tokens in (50, 9)
    ]
    x, packing = pack(parts)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, packing)

    run = torch.compile(attended, fullgraph=True) if compiled else attended
    expected = attend(x, x, x, packing, backend="sdpa")
    torch.testing.assert_close(run(x, x, x), expected, rtol=2e-2, atol=2e-2)

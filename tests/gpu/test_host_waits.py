"""No part of a training step waits for the GPU: CUDA itself refuses the calls that would."""

import pytest
import torch

from tests.step_cases import CASES, make_case, take_steps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name):
    recipe, optimizer, batch = make_case(name, "cuda")
    take_steps(recipe, optimizer, batch, 1)  # kernels compile, the optimiser makes its state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(recipe, optimizer, batch, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")

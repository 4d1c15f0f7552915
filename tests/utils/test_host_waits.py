"""No part of a training step waits for the device: a step runs where there is nothing to read.

Tensors on the `meta` device have shapes and no values, so that whatever would fetch a value to the
host (`item`, `tolist`, `bool`, `nonzero`, a boolean index) fails there. The loop itself waits once,
in `utils.health.Health.agree`. tests/gpu/test_host_waits.py asks CUDA the same.
"""

import pytest
import torch

from tests.step_cases import CASES, make_case, take_steps


@pytest.fixture(autouse=True)
def autocast_on_meta(monkeypatch):
    """Autocast does not know `meta`; it computes nothing there."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda device_type, **options: autocast(
            "cpu" if device_type == "meta" else device_type, **options
        ),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing(name):
    recipe, optimizer, batch = make_case(name, "meta")
    take_steps(recipe, optimizer, batch, 2)


def test_a_step_that_reads_is_found():
    recipe, optimizer, batch = make_case("deit plain", "meta")
    recipe.after_step = lambda step: bool(recipe.model.head.bias.isfinite().all())
    with pytest.raises(RuntimeError, match="meta"):
        take_steps(recipe, optimizer, batch, 1)

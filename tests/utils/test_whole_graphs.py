"""The losses of both recipes are one graph: torch.compile meets nothing that breaks it."""

import pytest
import torch

from tests.step_cases import CASES, make_case


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_one_graph(name):
    torch.compiler.reset()
    recipe, _, batch = make_case(name, "cpu")
    compiled = torch.compile(recipe.losses, fullgraph=True, backend="aot_eager")
    found = {}
    for kind, losses in (("eager", recipe.losses), ("compiled", compiled)):
        torch.manual_seed(0)
        recipe.zero_grad(set_to_none=True)
        values = losses(recipe.prepare(dict(batch)), 0)
        values["loss"].backward()
        gradients = {n: p.grad for n, p in recipe.named_parameters() if p.grad is not None}
        found[kind] = {n: v.detach() for n, v in values.items()}, gradients
    torch.testing.assert_close(found["compiled"][0], found["eager"][0])
    for n, expected in found["eager"][1].items():
        error = (found["compiled"][1][n] - expected).norm()
        assert error <= 1e-3 * expected.norm() + 1e-6, n

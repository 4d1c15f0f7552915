"""A recipe of the user's own: what it lacks or gives wrongly is one line that names its class."""

from types import SimpleNamespace

import pytest
import torch

from tests.utils.loop_case import TinyRecipe, train_tiny
from utils.errors import UserError
from utils.recipe import check_recipe, checked_groups


def test_what_a_recipe_lacks_is_named():
    class Unfinished(torch.nn.Module):
        total_steps = accumulation = batch_size_per_gpu = 1

        def batches(self, first_step):
            return iter(())

    check_recipe(TinyRecipe())
    with pytest.raises(UserError, match="Unfinished is no recipe: it lacks schedules, exported, p"):
        check_recipe(Unfinished())
    with pytest.raises(UserError, match="nn.Module"):
        check_recipe(SimpleNamespace(**{name: None for name in dir(TinyRecipe())}))


def test_a_member_that_fails_is_not_called_lacking():
    """Its own error, at its first use, tells more."""

    class Failing(TinyRecipe):
        @property
        def batch_size_per_gpu(self):
            return self.no_such_number

        @batch_size_per_gpu.setter
        def batch_size_per_gpu(self, value):
            pass

    assert not hasattr(Failing(), "batch_size_per_gpu")
    check_recipe(Failing())


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (None, r"losses\(\) must return tensors by name, `loss` among them, not None$"),
        ({"los": torch.ones(())}, r"losses\(\) must return tensors by name, .*, not \['los'\]$"),
        ({"loss": torch.ones(()), "aux": 0.5}, r"\['aux'\] must be a tensor .*, not 0.5$"),
        ({"loss": torch.ones(2)}, r"\['loss'\] must be a tensor without dimensions, not .*\[2\]"),
    ],
)
def test_wrong_losses_end_the_first_step(tmp_path, monkeypatch, losses, said):
    monkeypatch.setattr(TinyRecipe, "losses", lambda recipe, batch, step: losses)
    with pytest.raises(UserError, match=f"^recipe: TinyRecipe: .*{said}"):
        train_tiny(tmp_path)


@pytest.mark.parametrize("parts", [None, [torch.nn.Identity()], {"net": [torch.ones(())]}])
def test_wrong_parts_end_the_first_step(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(TinyRecipe, "clipped_parts", lambda recipe: parts)
    said = r"^recipe: TinyRecipe: clipped_parts\(\) must return modules by name, not "
    with pytest.raises(UserError, match=said):
        train_tiny(tmp_path)


@pytest.mark.parametrize(
    ("schedules", "said"),
    [
        ({"lr": 0.1}, r"schedules\['lr'\] must be a function from a step to a number, not 0.1$"),
        ({"lr": lambda step: None}, r"schedules\['lr'\] must be a function .*, not None$"),
        (
            {},
            r"lr_schedule of a group must be one of its schedules, last_lr, not 'lr'",
        ),
    ],
)
def test_a_wrong_schedule_is_told_before_the_first_step(schedules, said):
    recipe = TinyRecipe()
    recipe.schedules = {"last_lr": lambda step: 0.1, **schedules}
    with pytest.raises(UserError, match=f"^recipe: TinyRecipe: {said}"):
        checked_groups(recipe)

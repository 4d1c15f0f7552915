"""Random numbers go on where they were saved, and no two processes or steps share them."""

import random
from itertools import product

import numpy as np
import torch

from tests.utils.loop_case import TinyRecipe, parts_of, train_tiny
from utils import distributed
from utils.checkpoints.checkpoint import Checkpoints
from utils.checkpoints.state import rank_seed, restore
from utils.optimizers import make_optimizer
from utils.precision import Precision
from utils.randomness import preserved_randomness, random_state, seed_everything, set_random_state


def draws() -> list[float]:
    """Some of each generator; a normal one leaves a second behind in NumPy's and Python's."""
    values = [torch.rand(()).item(), np.random.standard_normal(), random.gauss(0, 1)]
    return [*values, np.random.random_sample(), random.random()]


def test_every_generator_goes_on_where_a_checkpoint_was_saved(tmp_path):
    """Recipes mix images by any of the three."""
    seed_everything(3)
    draws()
    Checkpoints(tmp_path).save(1, {"progress": {"random": [random_state()]}})
    expected = [draws() for _ in range(3)]
    seed_everything(4)
    _, parts, _ = Checkpoints(tmp_path).load()
    set_random_state(parts["progress"]["random"][0])
    assert [draws() for _ in range(3)] == expected


def test_what_draws_in_between_changes_nothing():
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with preserved_randomness():
        assert draws() == expected
    assert draws() == expected


def test_no_two_ranks_steps_or_seeds_share_a_stream(monkeypatch):
    """Else drop path would leave out the same blocks everywhere."""
    found = set()
    for rank, seed, step in product(range(16), (0, 1, 2), (0, 1, 2, 1000)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.add(rank_seed(seed, step))
    assert len(found) == 16 * 3 * 4


def test_on_another_number_of_processes_the_streams_are_those_of_the_step(tmp_path, monkeypatch):
    """Not once more those that the run began with."""
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)
    train_tiny(tmp_path, max_steps=2)
    recipe = TinyRecipe()
    optimizer = make_optimizer(torch.optim.AdamW, recipe.param_groups(), recipe)
    seed_everything(rank_seed(3))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    restore(parts_of(tmp_path), recipe, optimizer, Precision("fp32"), seed=3, step=2)
    found = draws()
    seed_everything(rank_seed(3, 2))
    assert found == draws()

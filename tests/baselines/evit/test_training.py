"""The recipe drives the keep rate: in training, in the probes meanwhile, and after a resume."""

from functools import partial

import pytest
import torch

from baselines.evit import EViT
from deit.recipe import DeiT
from tests.deit.tiny import CLASSES, make_recipe

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def recipe(**options) -> DeiT:
    backbone = {"keep_rate": [1, 0.5], "shrink_start_epoch": 1, "shrink_epochs": 2, **SMALL}
    factory = partial(EViT, num_classes=CLASSES, **backbone)
    return make_recipe(backbone=factory, mixing=None, ema_decay=0.9, **options)


def batch() -> dict[str, torch.Tensor]:
    return {"images": torch.randn(4, 3, 16, 16), "targets": torch.arange(4) % CLASSES}


def test_the_recipe_tells_classifier_and_average_its_progress():
    """The rate is shown beside the losses, and the same net judges by it until the next step."""
    ours = recipe()
    length = ours.epoch_length
    for step, rate in ((0, 1.0), (length, 1.0), (2 * length, 0.75), (3 * length, 0.5)):
        losses = ours.losses(batch(), step)
        assert float(losses["keep_rate"]) == pytest.approx(rate)
        for net in (ours.model, ours.ema):
            assert net.token_counts(1000) == [1000, 1000 * rate]
    losses["loss"].backward()
    assert all(p.grad is not None for p in ours.model.parameters())


def test_blocks_are_dropped_in_the_middle_of_a_training():
    net = EViT(num_classes=CLASSES, keep_rate=[1, 0.5], shrink_epochs=2, **SMALL)
    net.follow_training(1, 1)
    counts = net.token_counts(1000)
    net.prune_intermediate_layers([0])
    assert net.token_counts(1000) == counts[:1]
    assert net(batch()["images"]).shape[0] == 4


def test_a_run_taken_up_again_judges_by_the_rate_of_its_last_step():
    ours = recipe()
    next(ours.batches(2 * ours.epoch_length + 1))
    assert ours.model.token_counts(1000) == [1000, 750]


def test_fine_tuning_in_evaluation_mode():
    """DeiT's: the classifier keeps to its evaluation mode, whatever the recipe's."""
    ours = recipe(train_mode=False, drop_path_rate=0.5)
    assert ours.training and not ours.model.training
    ours.eval()
    ours.train()
    assert not ours.model.training and recipe().model.training

"""What a step of DeiT III optimises, at which rates, and with what left out of the network."""

from functools import partial

import pytest
import timm
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import to_tensor

from deit.losses import Distillation
from deit.mixing import Mixing
from deit.recipe import DeiT
from deit.schedules import Schedules
from tests.deit.tiny import Noise, make_backbone, make_batch, make_recipe
from vit.adapters import timm_backbone


def test_rates_follow_the_effective_batch():
    schedules = Schedules(lr=0.5, lr_scaling="linear_wrt_512", min_lr=0.0, warmup_epochs=0)
    for size, accumulation in ((4, 1), (4, 3), (2, 6)):
        recipe = make_recipe(
            batch_size_per_gpu=size, accumulation=accumulation, schedules=schedules
        )
        assert recipe.schedules["lr"](0) == pytest.approx(0.5 * size * accumulation / 512)


def test_submodels_see_the_same_images_and_all_of_their_classes():
    """Without drop path both are the network itself: what each learns can be said by its logits."""
    recipe = make_recipe(cosub=True)
    for parameter in recipe.model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))  # images are told apart
    batch = make_batch(mixed=True)
    found = recipe.losses(batch, 0)["loss"]
    logits = recipe.model(batch["images"])
    present = (batch["targets"] > 0).float()
    bce = F.binary_cross_entropy_with_logits
    told, shared = bce(logits, present), bce(logits, logits.detach().sigmoid())
    torch.testing.assert_close(found, 0.5 * (told + shared))
    parameters = list(recipe.model.parameters())
    expected = torch.autograd.grad(0.5 * (told + shared), parameters)
    for ours, theirs in zip(torch.autograd.grad(found, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_targets_are_smoothed_mixed_or_not():
    recipe = make_recipe(loss="ce", smoothing=0.3)
    batch = make_batch()
    logits = recipe.model(batch["images"])
    expected = F.cross_entropy(logits, batch["targets"], label_smoothing=0.3)
    torch.testing.assert_close(recipe.losses(batch, 0)["loss"], expected)
    recipe = make_recipe(mixing=Mixing(), loss="ce", smoothing=0.3)
    targets = recipe.prepare(next(recipe.batches(0)))["targets"]
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert (targets >= 0.3 / 3 - 1e-6).all()


@pytest.mark.parametrize(("sampler", "copies"), [("shuffled", 1), ("repeated_augmentation", 3)])
def test_the_sampler_is_the_one_asked_for(sampler, copies):
    """Repeated augmentation shows an image three times; here one process sees all of them."""
    options = {"dataset": Noise(300), "batch_size_per_gpu": 3, "augmentation": to_tensor}
    recipe = make_recipe(sampler=sampler, **options)
    images = next(recipe.batches(0))["images"]
    assert len(images.flatten(1).unique(dim=0)) == 3 // copies


def test_a_network_without_stochastic_depth_is_told_of_none():
    told = []

    def backbone(**keywords):
        told.append(keywords)
        return make_backbone("plain")(**keywords)

    make_recipe(backbone=backbone, drop_path_rate=None)
    make_recipe(backbone=backbone, drop_path_rate=0.2)
    assert told == [{}, {"drop_path_rate": 0.2}]


@pytest.mark.parametrize("train_mode", [True, False])
def test_nothing_is_dropped_where_the_classifier_trains_in_evaluation_mode(train_mode):
    backbone = make_backbone("plain", drop_rate=0.5)
    recipe = make_recipe(backbone=backbone, drop_path_rate=0.5, train_mode=train_mode)
    for _ in range(2):  # after a probe, too
        first, second = (recipe.losses(make_batch(), 0)["loss"] for _ in range(2))
        assert torch.equal(first, second) != train_mode
        first.backward()
        recipe.eval().train()


@pytest.mark.parametrize("adapted", [True, False])
def test_of_timms_distilled_networks_each_head_learns_from_its_own_side(adapted):
    """The class token's from the labels alone, the distillation token's from the teacher alone."""
    name, size = "deit_tiny_distilled_patch16_224", {"img_size": 16, "patch_size": 4}
    size |= {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    make = timm_backbone if adapted else timm.create_model
    for alpha, learner in ((0.0, "head"), (1.0, "head_dist")):
        recipe = make_recipe(
            backbone=partial(make, name, **size),
            distillation=Distillation(teacher=make_backbone("plain"), alpha=alpha),
        )
        recipe.losses(make_batch(), 0)["loss"].backward()
        net = recipe.model.net if adapted else recipe.model
        for head in ("head", "head_dist"):
            assert getattr(net, head).weight.grad.any() == (head == learner), head
        assert recipe.exported.eval()(make_batch()["images"]).shape == (4, 3)  # both heads' mean


@pytest.mark.parametrize("options", [{}, {"cosub": True}, {"ema_decay": 0.0}])
def test_a_term_on_the_logits_takes_no_second_pass(options):
    class Pulled(DeiT):
        def losses_of(self, logits, student, batch):
            losses, term = super().losses_of(logits, student, batch), logits.square().mean()
            return {"loss": losses["loss"] + 2 * term, "square": term.detach()}

    torch.manual_seed(0)
    plain = make_recipe(**options)
    torch.manual_seed(0)
    ours = make_recipe(kind=Pulled, **options)
    passes = []
    ours.model.register_forward_hook(lambda net, args, out: passes.append(out))
    batch = make_batch()
    found = ours.losses(batch, 0)
    assert len(passes) == 1 and len(passes[0]) == (8 if options.get("cosub") else 4)
    square = passes[0].square().mean()
    torch.testing.assert_close(found["square"], square.detach())
    torch.testing.assert_close(found["loss"], plain.losses(batch, 0)["loss"] + 2 * square)

"""What --check refuses of aggregators is what the run refuses of them."""

import pytest
import torch

from evaluation.wrapped import check_wrapped, wrap_all
from utils.errors import UserError
from vit.models import deit_small_patch16_LS

KEYWORDS = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 4}
BACKBONE = {"_target_": "vit.models.deit_small_patch16_LS", **KEYWORDS}
WRAPPER = {"_target_": "baselines.posthoc.symmetrized.symmetrized", "group": "D4"}
TRAINING = {"_target_": "baselines.posthoc.training.PosthocTraining"}
CONFIG = {"wrapper": WRAPPER, "training": TRAINING, "trained": "none"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"aggregators": ["mean", "meann"]}, "aggregator must be one of .*did you mean 'mean'"),
        ({"wrapper": WRAPPER | {"group": "D3x"}}, "unknown group 'D3x'"),
        ({"wrapper": None}, "wrapper must be {_target_: ...}, not None"),
        ({"aggregators": None}, "aggregators must be a list of names, not None"),
        ({"aggregators": "mean"}, "aggregators must be a list of names, not 'mean'"),
        ({"trained": "heads"}, "trained must be one of .*did you mean 'head'"),
        ({"trained": "aggregator"}, "aggregator mean has nothing to train"),
    ],
)
def test_a_mistake_is_found_without_data_and_weights(words, said):
    config = {**CONFIG, "aggregators": ["mean"], **words}
    with pytest.raises(UserError, match=said):
        check_wrapped(BACKBONE, config)
    with pytest.raises(UserError, match=said):
        wrap_all(deit_small_patch16_LS(**KEYWORDS), config)


def test_a_training_that_cannot_be_is_a_mistake():
    with pytest.raises(UserError, match="batch_size must be"):
        check_wrapped(
            BACKBONE,
            {**CONFIG, "aggregators": [], "training": TRAINING | {"batch_size": 0}},
        )


def test_a_net_that_takes_its_classes_from_the_data_has_a_head_to_train():
    resnet = {"_target_": "vit.adapters.timm_backbone", "model_name": "resnet10t"}
    check_wrapped(resnet, {**CONFIG, "aggregators": ["learned_score"], "trained": "head"})


def test_learned_aggregators_are_trained_in_any_case_and_frozen_nets_share_the_backbone():
    classifier = deit_small_patch16_LS(**KEYWORDS)
    nets = wrap_all(classifier, {**CONFIG, "aggregators": ["mean", "learned_score"]})
    assert [net.trained for net in nets.values()] == ["none", "aggregator"]
    assert nets["mean"].model is classifier
    apart = wrap_all(classifier, {**CONFIG, "aggregators": ["mean"], "trained": "head"})["mean"]
    assert apart.model is not classifier
    assert torch.equal(apart.model.head.weight, classifier.head.weight)

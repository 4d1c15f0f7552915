"""The run files have the published settings: rate of every step, what decays, what is augmented."""

import math

import pytest

from baselines.gevit.models import gevit_digits_p4m
from deit.param_groups import param_groups
from utils.config.build import build, plain
from utils.config.compose import compose_config
from utils.config.files import CONFIGS

# Run -> peak rate, epochs of the warm-up the published code asked for, epochs, images, batch,
# weight decay, optimiser.
PUBLISHED = {
    "gevit_cifar10_mz2": (0.01, 10, 350, 45_000, 24, 1e-4, "torch.optim.SGD"),
    "gevit_pcam_p4": (0.01, 10, 100, 262_144, 16, 1e-4, "torch.optim.SGD"),
    "modern_gevit_pcam_patch12": (1e-3, 10, 50, 262_144, 256, 0.01, "torch.optim.AdamW"),
    "gevit_pcam_gcnn_p4m": (1e-3, 50, 15, 262_144, 256, 0.01, "torch.optim.AdamW"),
    "posthoc_vit_pcam": (0.01, 10, 50, 262_144, 1024, 1e-4, "torch.optim.SGD"),
}
AUGMENTED = {"modern_gevit_pcam_patch12", "gevit_pcam_gcnn_p4m", "posthoc_vit_pcam"}


def run_of(name: str) -> dict:
    return plain(compose_config(CONFIGS / "gevit" / f"{name}.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rate_of_every_step_is_the_published_one(name):
    """Along a line from zero, then a cosine; one warm-up is longer than its run."""
    peak, rise, epochs, images, batch, decay, optimizer = PUBLISHED[name]
    run = run_of(name)
    recipe = run["recipe"]
    assert (recipe["epochs"], recipe["batch_size_per_gpu"]) == (epochs, batch)
    assert run["optimizer"]["_target_"] == optimizer
    length = images // batch
    total = epochs * length
    warm = int(total * rise / epochs)

    def published(step: int) -> float:
        if step < warm:
            return peak * step / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    found = build(recipe["schedules"]).build(epochs=epochs, epoch_length=length, batch_size=batch)
    for step in range(0, total, max(1, total // 997)):
        assert found["lr"](step) == pytest.approx(published(step), abs=1e-9)
    assert found["weight_decay"](0) == decay


@pytest.mark.parametrize("name", [*PUBLISHED, "gevit_rotmnist_p4", "posthoc_vit_rotmnist"])
def test_every_parameter_decays_alike(name):
    """The published optimisers were handed all parameters at once."""
    asked = run_of(name)["recipe"]["decay_vectors"]
    groups = param_groups(gevit_digits_p4m(), decay_vectors=asked)
    assert not [p for g in groups if not g["weight_decay_multiplier"] for p in g["params"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_turned_where_they_were_and_judged_upright(name):
    run = run_of(name)
    augmentation = run["recipe"]["augmentation"]
    turned = augmentation["_target_"].endswith("RandomTurn")
    assert turned == (name in AUGMENTED)
    if turned:
        assert augmentation["turns"] == "quarter" and build(augmentation).mirrored == 0.5
    unturned = augmentation["augmentation"] if turned else augmentation
    assert run["probes"]["accuracy"]["transform"] == unturned

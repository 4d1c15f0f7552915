"""The rates of the recipe, exact and as published."""

import pytest
import torch

from deit.schedules import Schedules

RUN = {"epochs": 400, "epoch_length": 625, "batch_size": 2048}


def rate(step: int, **options) -> float:
    return Schedules(**options).build(**RUN)["lr"](step)


def test_published_rates():
    """Epochs 0 and 1 at the first value, epoch 6 at that of epoch 5, held within an epoch."""
    options = {"update": "one_epoch_late"}
    rates = [rate(625 * epoch + 624, **options) for epoch in (0, 1, 2, 5, 6, 399)]
    expected = [1e-6, 1e-6, 6.008e-4, 2.4002e-3, 2.998847e-3, 1.01844e-5]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert rate(0, **options) == 1e-6


def test_the_default_moves_with_every_step_and_meets_the_epochs():
    assert rate(1) > rate(0) == 1e-6
    for epoch in (0, 3, 5, 200, 399):
        assert rate(625 * epoch) == rate(625 * epoch + 300, update="every_epoch")
    assert rate(625 * 400) == rate(10**7) == 1e-5


def test_scaling_by_512():
    assert rate(625 * 5, lr_scaling="linear_wrt_512", min_lr=0.0) == pytest.approx(
        4 * rate(625 * 5, min_lr=0.0)
    )


def test_weight_decay_is_constant():
    decay = Schedules(weight_decay=0.05).build(**RUN)["weight_decay"]
    assert decay(0) == decay(10**6) == 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": "late"}, "one_epoch_late"),
        ({"lr_scaling": "x"}, "linear_wrt_512"),
        ({"shape": "tanh"}, "cosine, step"),
        ({"decay_epochs": 0}, "decay_epochs must be finite and above 0"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        Schedules(**options)


def test_a_batch_that_takes_the_rate_below_its_end():
    schedules = Schedules(lr=1e-4, lr_scaling="linear_wrt_512", min_lr=1e-5, warmup_epochs=0)
    assert schedules.build(epochs=1, epoch_length=9, batch_size=64)["lr"](0) == 1.25e-5
    with pytest.raises(
        ValueError, match=r"schedules\.min_lr 1e-05 .* schedules\.lr .* at 32 images"
    ):
        schedules.build(epochs=1, epoch_length=9, batch_size=32)


def test_steps_may_start_below_what_a_cosine_would_end_at():
    """Nothing but the warm-up and the factor tells their rates: `min_lr` is of the cosine alone."""
    assert rate(0, shape="step", lr=1e-6, min_lr=1e-5, warmup_epochs=0) == 1e-6


def test_a_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="more than the 3 epochs"):
        Schedules().build(epochs=3, epoch_length=2, batch_size=8)


@pytest.mark.parametrize("update", ["every_epoch", "one_epoch_late"])
def test_steps_are_those_of_timm(update):
    """Down by a factor after every 30 epochs, those of the warm-up counted, as DeiT calls it."""
    from timm.scheduler import StepLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = StepLRScheduler(
        optimizer, decay_t=30, decay_rate=0.1, warmup_t=5, warmup_lr_init=1e-6, warmup_prefix=False
    )
    late = update == "one_epoch_late"
    for epoch in (0, 1, 4, 5, 29, 30, 31, 60, 399):
        theirs.step(max(epoch - late, 0))
        ours = rate(625 * epoch + 100, shape="step", update=update)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)

"""Schedules are pure functions of the step with the stated first, peak and last values."""

import pytest

from utils.schedules import Constant, Cosine, Frozen, Linear, peak_lr, scale_lr


def test_cosine_starts_at_base_and_stays_at_final():
    schedule = Cosine(base=1.0, final=0.1, num_steps=10)
    values = [schedule(step) for step in range(10)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[5] == pytest.approx(0.55)
    assert schedule(10) == schedule(10_000) == 0.1


def test_warmup_ends_at_the_peak_which_comes_twice():
    schedule = Cosine(base=2.0, final=0.0, num_steps=20, warmup_steps=5)
    assert [schedule(step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert schedule(6) < 2.0


def test_a_warmup_of_one_step_is_its_start():
    assert Cosine(base=2.0, final=0.0, num_steps=4, warmup_steps=1)(0) == 0.0


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 5 steps does not fit into 4"):
        Cosine(base=1.0, final=0.0, num_steps=4, warmup_steps=5)


def test_linear_reaches_its_end_and_stays():
    schedule = Linear(start=0.04, end=0.07, num_steps=4)
    assert [schedule(step) for step in (0, 3, 4, 99)] == [0.04, 0.07, 0.07, 0.07]
    assert schedule(1) == pytest.approx(0.05)
    assert Linear(start=0.04, end=0.07, num_steps=0)(0) == 0.07


def test_frozen_does_not_shift_what_follows():
    schedule = Linear(start=1.0, end=5.0, num_steps=5)
    assert [Frozen(schedule, 2)(step) for step in range(4)] == [0.0, 0.0, 3.0, 4.0]


def test_constant():
    assert Constant(3.0)(0) == Constant(3.0)(10**6) == 3.0


def test_lr_scaling_rules():
    assert scale_lr(4e-3, "sqrt_wrt_1024", 256) == pytest.approx(2e-3)
    assert scale_lr(4e-3, "linear_wrt_256", 512) == pytest.approx(8e-3)
    assert scale_lr(4e-3, "none", 7) == 4e-3
    with pytest.raises(ValueError, match="lr_scaling must be one of sqrt_wrt_1024, linear"):
        scale_lr(1.0, "sqrt", 1)
    assert peak_lr(4e-6, "sqrt_wrt_1024", 256, min_lr=2e-6) == pytest.approx(2e-6)
    with pytest.raises(
        ValueError, match="min_lr 2e-06 is more than the 1e-06 that lr_scaling=sqrt"
    ):
        peak_lr(4e-6, "sqrt_wrt_1024", 64, min_lr=2e-6)

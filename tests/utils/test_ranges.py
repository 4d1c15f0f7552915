"""A value without a meaning is refused under the key as the user writes it."""

import math
from pathlib import Path

import pytest

from utils.config.build import build, plain
from utils.config.check import describe
from utils.config.compose import compose_config
from utils.errors import UserError
from utils.ranges import (
    OutOfRange,
    check_count,
    check_counts,
    check_flags,
    check_order,
    check_path,
    check_range,
    check_rate,
    check_share,
    check_sizes,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9, True, "1", None])
def test_what_no_range_holds(value) -> None:
    with pytest.raises(OutOfRange, match="^lr must be"):
        check_range("lr", value)


def test_ends() -> None:
    check_range("x", 0)
    check_range("x", 0.99996, 0, 1, ends="[)")
    check_share("x", 1)
    for low, high, ends, value in [(0, 1, "[)", 1), (0, math.inf, "()", 0), (0, 1, "(]", 0)]:
        with pytest.raises(OutOfRange, match="x must (lie in|be finite and above 0)"):
            check_range("x", value, low, high, ends=ends)


def test_counts_and_pairs() -> None:
    check_count("n", 1, 1)
    check_order("scale", [0.1, 0.1], 0, 1)
    for wrong in (0, -1, 1.0, True, None):
        with pytest.raises(OutOfRange, match="n must be a whole number from 1"):
            check_count("n", wrong, 1)
    for pair, said in [((0.5, 0.1), "lesser value first"), ((0.1,), "two values")]:
        with pytest.raises(OutOfRange, match=said):
            check_order("scale", pair, 0, 1)


def test_several_values_at_once() -> None:
    check_counts(1, n=1, m=2)
    check_flags(a=True, b=False)
    with pytest.raises(OutOfRange, match="m must be a whole number from 1, not None"):
        check_counts(1, n=1, m=None)
    for word in ("no", 1, None):
        with pytest.raises(OutOfRange, match="b must be true or false"):
            check_flags(a=True, b=word)


def test_a_path_is_text() -> None:
    check_path("weights", "5")
    check_path("weights", Path("5"))
    for wrong in (5, True, [], None):
        with pytest.raises(OutOfRange, match="weights must be text, a path, not .*: quote it"):
            check_path("weights", wrong)


def test_sizes_may_be_left_open() -> None:
    check_sizes(a=None, b=1)
    with pytest.raises(OutOfRange, match="b must be a whole number from 1, not 0"):
        check_sizes(a=None, b=0)


def test_a_rate_leaves_some() -> None:
    check_rate("keep", 1)
    for wrong in (0, 1.1, True):
        with pytest.raises(OutOfRange, match="keep must"):
            check_rate("keep", wrong)


def test_the_key_is_named_where_the_config_has_it() -> None:
    nodes = {"recipe": {"schedules": {"_target_": "deit.schedules.Schedules", "lr": -1.0}}}
    with pytest.raises(UserError, match=r"^recipe.schedules.lr must be finite and at least 0"):
        build(nodes)


SMALL = ["backbone.depth=2", "backbone.embed_dim=16", "backbone.num_heads=2"]
CASES = {
    "deit/quickstart.yaml": [
        ("recipe.schedules.lr=-0.01", "recipe.schedules.lr must be finite and at least 0"),
        ("recipe.schedules.lr=nan", "recipe.schedules.lr must be"),
        ("recipe.schedules.min_lr=1", "recipe.schedules.min_lr 1 is more than lr 0.005"),
        ("recipe.schedules.weight_decay=-1", "recipe.schedules.weight_decay must be"),
        ("recipe.schedules.warmup_epochs=-1", "recipe.schedules.warmup_epochs must be"),
        ("recipe.schedules.warmup_lr=1e9", "recipe.schedules.warmup_lr 1e.09 is more than lr"),
        ("recipe.schedules.warmup_epochs=50", "recipe.schedules.warmup_epochs 50 is more than"),
        ("recipe.ema_decay=2", r"recipe.ema_decay must lie in \[0, 1\), not 2"),
        ("recipe.ema_decay=1", "recipe.ema_decay must lie in"),
        ("recipe.epochs=-3", "recipe.epochs must be finite and above 0"),
        ("recipe.layerwise_decay=-1", "recipe.layerwise_decay must lie in"),
        ("recipe.mixing.mixup=-1", "recipe.mixing.mixup must be"),
        ("recipe.mixing.switch_probability=2", "recipe.mixing.switch_probability must lie in"),
        ("recipe.augmentation.scale=[1.0,0.5]", "recipe.augmentation.scale takes the lesser"),
        ("recipe.augmentation.flip_probability=3", "recipe.augmentation.flip_probability must"),
        ("recipe.effective_batch_size=-64", "recipe.effective_batch_size must be a whole"),
        ("recipe.num_workers=-1", "recipe.num_workers must be a whole number from 0, not -1"),
        ("recipe.sampler=none", "recipe.sampler must be one of .*not 'none'"),
        ("recipe.seed=-1", "recipe.seed must be a whole number"),
        ("optimizer.betas=[2,3]", r"optimizer.betas must lie in \[0, 1\)"),
        ("training.precision=fp8", "training.precision=fp8 is unknown"),
        ("training.sharding=all", "training.sharding=all is unknown"),
        ("training.log_every=0", "training.log_every must be a whole number from 1"),
        ("training.log_every=-5", "training.log_every must be"),
        ("training.nan_patience=0", "training.nan_patience must be"),
        ("training.clip_grad=-1", "training.clip_grad must be"),
        ("training.hang_timeout_s=-1", "training.hang_timeout_s must be"),
        ("training.max_steps=0", "training.max_steps must be"),
        ("checkpoint.every=-1", "checkpoint.every must be"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last must be"),
        ("probe_every=-1", "probe_every must be"),
        ("device=tpu", "device=tpu is unknown"),
        ("probes.accuracy.num_workers=-1", "probes.accuracy.num_workers must be a whole number"),
        ("probes.accuracy.eval_crop_ratio=0", "probes.accuracy.eval_crop_ratio must be finite"),
        ("backbone.init_values=nan", "backbone.init_values must be a number, not nan"),
        ("backbone.init_values=-1", "backbone: init_values must be finite and at least 0"),
        ("backbone.qkv_bias=no", "backbone: qkv_bias must be true or false, not 'no'"),
    ],
    "dinov2/quickstart.yaml": [
        ("recipe.schedules.lr=-1", "recipe.schedules.lr must be"),
        ("recipe.schedules.min_lr=1", "recipe.schedules.min_lr 1 is more than lr"),
        ("recipe.schedules.weight_decay=[0.1,-1]", "recipe.schedules.weight_decay must be"),
        ("recipe.schedules.momentum=[0.9,1.1]", "recipe.schedules.momentum must lie in"),
        ("recipe.schedules.teacher_temp=[0,0.1]", "recipe.schedules.teacher_temp must be finite"),
        ("recipe.schedules.freeze_last_layer_epochs=-1", "freeze_last_layer_epochs must be"),
        ("recipe.koleo_loss_weight=-1", "recipe.koleo_loss_weight must be"),
        ("recipe.patch_embed_lr_multiplier=-1", "recipe.patch_embed_lr_multiplier must be"),
        ("recipe.accumulation=0", "recipe.accumulation must be a whole number from 1"),
        ("recipe.crops.global_crops_scale=[1,0.3]", "recipe.crops.global_crops_scale takes"),
        ("recipe.crops.local_crops_scale=[0,0.3]", "recipe.crops.local_crops_scale must lie in"),
        ("recipe.crops.blur_probabilities=[2,0,0]", "recipe.crops.blur_probabilities must lie"),
        ("recipe.crops.flip_probability=-1", "recipe.crops.flip_probability must lie in"),
        ("recipe.num_workers=-1", "recipe.num_workers must be"),
        ("optimizer.eps=-1", "optimizer"),
        ("optimizer=null", "optimizer must be given, not None"),
        ("optimizer.lr=9", "optimizer.lr has no effect.* say recipe.schedules.lr"),
        ("optimizer.weight_decay=9", "say recipe.schedules.weight_decay"),
        ("data.train=null", "data.train must be given"),
        ("data.val=5", "data.val must be a data set.* or null, not 5"),
        ("probes.knn=5", "probes.knn must be a probe.* or null, not 5"),
        (f"seed={10**20}", "seed must lie in"),
    ],
}


@pytest.mark.parametrize(
    ("file", "word", "said"), [(file, *case) for file, cases in CASES.items() for case in cases]
)
def test_check_refuses_what_a_run_would(file: str, word: str, said: str) -> None:
    """`--check` builds what reads no data: one line, which begins with the key."""
    config = compose_config(file, [*SMALL, word])
    with pytest.raises(UserError, match=said) as caught:
        describe(plain(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["backbone", "recipe"])
def test_check_refuses_a_training_without(tmp_path: Path, key: str) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"defaults: [/train, _self_]\n{key}: null\n")
    with pytest.raises(UserError, match=f"{key} must be given, not None"):
        describe(plain(compose_config(run)))


def test_check_of_a_net_that_takes_height_and_width() -> None:
    words = [*SMALL, "backbone.img_size=[32,32]"]
    lines = describe(plain(compose_config("deit/quickstart.yaml", words)))
    assert lines[0].endswith("at 32 x 32") and lines[-1] == "the config is valid"


SCENES = {"train": None, "test": None}  # refused before they are looked at
PARTS = "evaluation.segmentation"
REFUSED = [
    (
        "evaluation.probes.knn.KnnProbe",
        {},
        ("num_workers", -1),
        ("crop_size", 0),
        ("on_error", "x"),
    ),
    ("evaluation.probes.logreg.LogregProbe", {}, ("tol", math.inf), ("batch_size", 0)),
    ("evaluation.probes.linear.LinearProbe", {}, ("seed", -1), ("eval_period", -1)),
    ("evaluation.probes.throughput.ThroughputProbe", {}, ("input_size", 0)),
    (f"{PARTS}.probe.SegmentationProbe", SCENES, ("resolution", -1), ("in_memory_gb", -1)),
    (f"{PARTS}.dense_linear.PixelLinearProbe", SCENES, ("num_steps", 0), ("hflip_probability", 2)),
    (f"{PARTS}.patch_logreg.PatchLogreg", {}, ("tol", -1), ("hold_gb", math.inf)),
    ("baselines.posthoc.training.PosthocTraining", {}, ("lr", math.inf), ("weight_decay", -1)),
]


@pytest.mark.parametrize(
    ("target", "given", "key", "value"),
    [(target, given, *pair) for target, given, *pairs in REFUSED for pair in pairs],
)
def test_a_part_refuses_when_it_is_built(target: str, given: dict, key: str, value) -> None:
    node = {"_target_": target, **given, key: value}
    with pytest.raises(UserError, match=f"^probe.{key} must"):
        build({"probe": node})


def test_no_number_is_nan() -> None:
    node = {"_target_": "evaluation.probes.linear.LinearProbe", "learning_rates": [0.1, math.nan]}
    with pytest.raises(UserError, match="probe.learning_rates must be a number, not .0.1, nan"):
        build({"probe": node})

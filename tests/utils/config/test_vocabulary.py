"""A YAML in DINOv2's words is translated key by key; nothing in it is lost or taken in silence."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config.build import check_targets
from utils.config.compose import compose_config
from utils.config.vocabulary import TABLE, is_dinov2, translate
from utils.errors import UserError

# Every key of the DINOv2 config with another value than its default, and what it becomes.
CHANGED = {
    "MODEL.WEIGHTS": ("w.pth", {"training.weights": "w.pth"}),
    "compile": (False, {"training.compile": False}),
    "dino.loss_weight": (0.5, {"recipe.dino_loss_weight": 0.5}),
    "dino.koleo_loss_weight": (0.2, {"recipe.koleo_loss_weight": 0.2}),
    "dino.head_n_prototypes": (128, {"recipe.dino_head.num_prototypes": 128}),
    "dino.head_bottleneck_dim": (64, {"recipe.dino_head.bottleneck_dim": 64}),
    "dino.head_nlayers": (2, {"recipe.dino_head.num_layers": 2}),
    "dino.head_hidden_dim": (32, {"recipe.dino_head.hidden_dim": 32}),
    "ibot.loss_weight": (0.5, {"recipe.ibot_loss_weight": 0.5}),
    "ibot.mask_sample_probability": (0.4, {"recipe.masks.sample_probability": 0.4}),
    "ibot.mask_ratio_min_max": ([0.2, 0.4], {"recipe.masks.ratio_min_max": [0.2, 0.4]}),
    "ibot.separate_head": (True, {"recipe.separate_head": True}),
    "ibot.head_n_prototypes": (128, {"recipe.ibot_head.num_prototypes": 128}),
    "ibot.head_bottleneck_dim": (64, {"recipe.ibot_head.bottleneck_dim": 64}),
    "ibot.head_nlayers": (2, {"recipe.ibot_head.num_layers": 2}),
    "ibot.head_hidden_dim": (32, {"recipe.ibot_head.hidden_dim": 32}),
    "train.batch_size_per_gpu": (32, {"recipe.batch_size_per_gpu": 32}),
    "train.dataset_path": (
        "ImageNet:split=TRAIN:root=/r:extra=/e",
        {
            "data.train.string": "ImageNet:split=TRAIN:root=/r:extra=/e",
            "data.val.string": "ImageNet:split=VAL:root=/r:extra=/e",
        },
    ),
    "train.output_dir": ("out", {"output_dir": "out"}),
    "train.centering": ("sinkhorn_knopp", {"recipe.centering": "sinkhorn_knopp"}),
    "train.OFFICIAL_EPOCH_LENGTH": (100, {"recipe.epoch_length": 100, "checkpoint.every": 300}),
    "train.num_workers": (3, {"recipe.num_workers": 3}),
    "student.arch": (
        "hybrid_vit_huge",
        {"backbone._target_": "octic.models.hybrid_dinov2_vit_huge_patch16"},
    ),
    "student.patch_size": (14, {"backbone.patch_size": 14}),
    "student.drop_path_rate": (0.1, {"recipe.drop_path_rate": 0.1}),
    "student.drop_path_uniform": (False, {"backbone.drop_path_uniform": False}),
    "student.layerscale": (0.1, {"backbone.init_values": 0.1}),
    "student.qkv_bias": (False, {"backbone.qkv_bias": False}),
    "student.num_register_tokens": (4, {"backbone.num_register_tokens": 4}),
    "student.interpolate_antialias": (True, {"backbone.position_antialias": True}),
    "student.interpolate_offset": (0.0, {"backbone.position_offset": 0.0}),
    "student.pretrained_weights": ("w.pth", {"training.weights": "w.pth"}),
    "teacher.momentum_teacher": (0.9, {"recipe.schedules.momentum": [0.9, 1.0]}),
    "teacher.final_momentum_teacher": (0.99, {"recipe.schedules.momentum": [0.992, 0.99]}),
    "teacher.warmup_teacher_temp": (0.05, {"recipe.schedules.teacher_temp": [0.05, 0.07]}),
    "teacher.teacher_temp": (0.06, {"recipe.schedules.teacher_temp": [0.04, 0.06]}),
    "teacher.warmup_teacher_temp_epochs": (5, {"recipe.schedules.teacher_temp_warmup_epochs": 5}),
    "optim.epochs": (500, {"recipe.epochs": 500}),
    "optim.warmup_epochs": (80, {"recipe.schedules.warmup_epochs": 80}),
    "optim.weight_decay": (0.05, {"recipe.schedules.weight_decay": [0.05, 0.4]}),
    "optim.weight_decay_end": (0.2, {"recipe.schedules.weight_decay": [0.04, 0.2]}),
    "optim.base_lr": (0.002, {"recipe.schedules.lr": 0.002}),
    "optim.min_lr": (0.0, {"recipe.schedules.min_lr": 0.0}),
    "optim.scaling_rule": ("linear_wrt_256", {"recipe.schedules.lr_scaling": "linear_wrt_256"}),
    "optim.clip_grad": (1.0, {"training.clip_grad": 1.0}),
    "optim.freeze_last_layer_epochs": (2, {"recipe.schedules.freeze_last_layer_epochs": 2}),
    "optim.patch_embed_lr_mult": (0.5, {"recipe.patch_embed_lr_multiplier": 0.5}),
    "optim.layerwise_decay": (1.0, {"recipe.layerwise_decay": 1.0}),
    "optim.adamw_beta1": (0.8, {"optimizer.betas": [0.8, 0.999]}),
    "optim.adamw_beta2": (0.95, {"optimizer.betas": [0.9, 0.95]}),
    "crops.global_crops_scale": ([0.4, 1.0], {"recipe.crops.global_crops_scale": [0.4, 1.0]}),
    "crops.global_crops_size": (
        518,
        {"recipe.crops.global_crops_size": 518, "backbone.img_size": 518},
    ),
    "crops.local_crops_number": (6, {"recipe.crops.local_crops_number": 6}),
    "crops.local_crops_scale": ([0.1, 0.4], {"recipe.crops.local_crops_scale": [0.1, 0.4]}),
    "crops.local_crops_size": (98, {"recipe.crops.local_crops_size": 98}),
    "evaluation.eval_period_iterations": (1250, {"probe_every": 1250}),
    "compute_precision.student.backbone.sharding_strategy": (
        "NO_SHARD",
        {"training.sharding": "replicate"},
    ),
    "compute_precision.student.backbone.mixed_precision.param_dtype": (
        "fp16",
        {"training.precision": "fp16"},
    ),
}
# The published train files, as their authors wrote them.
PUBLISHED = {
    "vitl16": ("vit_large", 64, {}),
    "hybrid_vitl16": ("hybrid_vit_large", 32, {}),
    "vitl16_inv_early": ("vit_large_inv_early", 32, {}),
    "vith16": ("vit_huge", 32, {"patch_size": 14}),
    "hybrid_vith16": ("hybrid_vit_huge", 32, {"patch_size": 14}),
    "vith16_inv_early": ("vit_huge_inv_early", 32, {"patch_size": 14}),
}
DATASET = "ImageNet:split=TRAIN:root=/r:extra=/e"


def nested(flat: dict[str, object]) -> dict:
    config = OmegaConf.create()
    for key, value in flat.items():
        OmegaConf.update(config, key, value, force_add=True)
    return OmegaConf.to_container(config)


def translated(content: dict, **keywords) -> tuple[dict, list[str]]:
    return translate(content, name="run", source=Path("run.yaml"), **keywords)


def published(name: str) -> dict:
    arch, batch, train = PUBLISHED[name]
    return {
        "train": {"dataset_path": DATASET, "batch_size_per_gpu": batch, **train},
        "student": {"block_chunks": 0, "arch": arch},
    }


@pytest.mark.parametrize("key", TABLE)
def test_every_key_is_taken_over_or_noted(key: str) -> None:
    before, silent = translated({"train": {"dataset_path": DATASET}})
    value, becomes = CHANGED.get(key, (TABLE[key].default, {}))
    run, notes = translated(nested({"train.dataset_path": DATASET, key: value}))
    assert bool(becomes) != bool(TABLE[key].note) or TABLE[key].only
    assert silent == [] and len(notes) == bool(TABLE[key].note)
    for ours, expected in becomes.items():
        if ours == "backbone._target_":
            continue  # a group: see the published files
        assert OmegaConf.select(OmegaConf.create(run), ours) == expected
    if not becomes:
        assert run == before


def test_defaults_are_theirs_whatever_ours_are(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{dataset_path: '{DATASET}'}}\n")
    config = compose_config(path)
    assert config.name == "run" and config.output_dir == "runs/run"
    assert config.recipe.epochs == 100 and config.recipe.epoch_length == 1250
    assert list(config.recipe.crops.blur_probabilities) == [0.0, 0.9, 0.5]
    assert config.recipe.schedules.lr == 0.004 and config.recipe.drop_path_rate == 0.3
    assert config.backbone._target_ == "vit.models.dinov2_vit_large_patch16"
    assert (config.backbone.patch_size, config.backbone.init_values) == (16, 1e-5)
    assert config.backbone.position_offset == 0.1
    assert (config.checkpoint.every, config.probe_every) == (3750, 12500)
    assert set(config.data.train) == {"_target_", "string"}
    check_targets(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_equal_our_published_configs(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / f"{name}.yaml"
    OmegaConf.save(OmegaConf.create(published(name)), path)
    theirs, ours = compose_config(path), compose_config(f"dinov2/{name}.yaml")
    assert "student.block_chunks has no effect" in capsys.readouterr().err
    check_targets(theirs)
    assert theirs.name == name
    assert theirs.backbone._target_ == ours.backbone._target_
    assert theirs.backbone.patch_size == 16
    assert OmegaConf.to_container(theirs.recipe) == OmegaConf.to_container(ours.recipe)
    assert theirs.optimizer == ours.optimizer
    assert theirs.training.clip_grad == ours.training.clip_grad
    assert theirs.checkpoint == ours.checkpoint and theirs.probe_every == ours.probe_every


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_an_evaluation_judges_the_weights_that_the_file_names(key: str) -> None:
    run, _ = translated(nested({key: "w.pth", "student.arch": "vit_large"}), base="evaluate")
    assert run["weights"] == "w.pth" and "recipe" not in run


def test_octic_layer_scale_starts_where_the_file_says() -> None:
    octic = {"student": {"arch": "hybrid_vit_large"}}
    assert translated(octic)[0]["backbone"]["init_values"] == 1e-5
    octic["student"]["interpolate_offset"] = 0.1
    run, notes = translated(octic)
    assert "position_offset" not in run["backbone"] and "interpolate_offset" in notes[0]


def test_overrides_in_both_vocabularies_and_other_data(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: {arch: vit_large}\n")
    config = compose_config(
        path,
        [
            "student.arch=hybrid_vit_small",
            "optim.epochs=7",
            "train.num_workers=2",
            "recipe.accumulation=3",
            "data=digits",
            "launcher=local",
        ],
    )
    assert config.backbone._target_ == "octic.models.hybrid_dinov2_vit_small_patch16"
    assert (config.recipe.epochs, config.recipe.num_workers, config.recipe.accumulation) == (
        7,
        2,
        3,
    )
    assert config.data.train._target_ == "utils.data.embedded.digits"
    assert config.launcher.kind == "local"
    check_targets(config)


def test_text_needs_no_quotes_on_dinov2s_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: {arch: vit_large}\n")
    string = "ImageNet22k:root=/a b:extra=/it's"
    config = compose_config(path, [f"train.dataset_path={string}"])
    assert config.data.train.string == string
    assert config.data.val is None, "no images to judge on, rather than those trained on"
    with pytest.raises(UserError, match="must be a whole number"):
        compose_config(path, ["optim.epochs='a:b'"])
    with pytest.raises(UserError, match="quotes of its own"):
        compose_config(path, ["optim.epochs=a b:c={"])


def test_data_path_from_the_environment(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "run.yaml"
    string = "ImageNet:split=TRAIN:root=${IMAGENET_PATH}:extra=${EXTRA_PATH}"
    path.write_text(f"train: {{dataset_path: '{string}'}}\n")
    monkeypatch.setenv("IMAGENET_PATH", "/i")
    monkeypatch.delenv("EXTRA_PATH", raising=False)
    with pytest.raises(UserError, match="^environment variable EXTRA_PATH is not set .*run.yaml"):
        compose_config(path)
    assert compose_config(path, ["data=imagenet", "data.root=/r"]).data.val.root == "/r"
    monkeypatch.setenv("EXTRA_PATH", "/e")
    assert compose_config(path).data.val.string == "ImageNet:split=VAL:root=/i:extra=/e"


def test_without_a_data_path_the_data_is_our_imagenet(tmp_path: Path, monkeypatch) -> None:
    """Its metadata are not demanded, and it has a split to judge on."""
    for name in ("IMAGENET_PATH", "EXTRA_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "run.yaml"
    path.write_text("student: {arch: vit_large}\n")
    assert compose_config(path).data.root is None, "the run, or --check, says what is missing"
    monkeypatch.setenv("IMAGENET_PATH", "/i")
    config = compose_config(path)
    assert config.data == compose_config(path, ["data=imagenet"]).data
    assert (config.data.train.root, config.data.train.extra) == ("/i", None)
    assert config.data.val.split == "val"
    check_targets(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("student:\n  arhc: x\n", "run.yaml:2: 'student.arhc' is no key of DINOv2's config"),
        ("student: {arhc: x}\n", "did you mean 'student.arch'?"),
        ("student: {arch: d8_vit_large}\n", "unknown student.arch 'd8_vit_large'; did you mean"),
        ("student: {arch: vit_larg}\n", "did you mean 'vit_large'?"),
        ("student: 3\n", "'student' is no key"),
        ("student: {}\nfoo: 3\n", "run.yaml:2: 'foo' is no key"),
        (
            "student: {ffn_layer: swiglu}\n",
            "student.ffn_layer=swiglu is not offered; it can be mlp",
        ),
        ("student: {proj_bias: false}\n", "student.proj_bias=False is not offered"),
        ("optim: {epochs: many}\n", "optim.epochs must be a whole number"),
        ("student: {arch: vit_large}\nrecipe: {}\n", "'recipe' of ours: use one"),
        ("defaults: [/train, _self_]\nstudent: {arch: x}\n", "unknown key 'student'"),
    ],
)
def test_what_is_not_theirs_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        compose_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_ours_is_not_taken_for_theirs() -> None:
    assert is_dinov2({"student": {}}) and is_dinov2({"MODEL": {"WEIGHTS": ""}})
    for content in (
        {"defaults": [], "optim": {}},
        {"name": "x"},
        {"training": {}},
        {},
    ):
        assert not is_dinov2(content)

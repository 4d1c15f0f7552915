"""Translate run files of the DINOv2 code key by key into ours.

Such a file lists differences from DINOv2's default config, so the translation starts from those
defaults, not from ours. A key without effect is accepted with a note; an unknown key, or a value
that is not offered, is refused by name.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.schema import kind, line_of, same_kind
from utils.errors import UserError
from utils.nearest import nearest


class Key(NamedTuple):
    """A DINOv2 key: its default, our key or None, why it has no effect, the values offered."""

    default: Any
    ours: str | None = None
    note: str = ""
    only: tuple[Any, ...] = ()


_DEAD = "nothing reads it in DINOv2 either"


def _head(theirs: str, ours: str) -> dict[str, Key]:
    return {
        f"{theirs}.head_n_prototypes": Key(65536, f"{ours}.num_prototypes"),
        f"{theirs}.head_bottleneck_dim": Key(256, f"{ours}.bottleneck_dim"),
        f"{theirs}.head_nlayers": Key(3, f"{ours}.num_layers"),
        f"{theirs}.head_hidden_dim": Key(2048, f"{ours}.hidden_dim"),
    }


def _precision() -> dict[str, Key]:
    """The keys of compute_precision; all parts share one precision, of the student's backbone."""
    note = "all parts share training.precision and training.sharding, taken from student.backbone"
    keys = {}
    for net, reduce in (("teacher", "fp16"), ("student", "fp32")):
        for part in ("backbone", "dino_head", "ibot_head"):
            where = f"compute_precision.{net}.{part}"
            asked = (net, part) == ("student", "backbone")
            types = {
                "param_dtype": "bf16" if asked else "fp16",
                "reduce_dtype": "bf16" if asked else reduce,
                "buffer_dtype": "fp32",
            }
            keys[f"{where}.sharding_strategy"] = Key("SHARD_GRAD_OP", None, "" if asked else note)
            for name, value in types.items():
                silent = asked and name == "param_dtype"
                keys[f"{where}.mixed_precision.{name}"] = Key(value, None, "" if silent else note)
    return keys


# Keys without `ours` and without a note are read by the functions below.
TABLE: dict[str, Key] = {
    "compile": Key(True),
    "MODEL.WEIGHTS": Key(""),
    "compute_precision.grad_scaler": Key(
        True, None, "a scaler is used with training.precision=fp16 alone"
    ),
    **_precision(),
    "dino.loss_weight": Key(1.0, "recipe.dino_loss_weight"),
    "dino.koleo_loss_weight": Key(0.1, "recipe.koleo_loss_weight"),
    **_head("dino", "recipe.dino_head"),
    "ibot.loss_weight": Key(1.0, "recipe.ibot_loss_weight"),
    "ibot.mask_sample_probability": Key(0.5, "recipe.masks.sample_probability"),
    "ibot.mask_ratio_min_max": Key([0.1, 0.5], "recipe.masks.ratio_min_max"),
    "ibot.separate_head": Key(False, "recipe.separate_head"),
    **_head("ibot", "recipe.ibot_head"),
    "train.batch_size_per_gpu": Key(64, "recipe.batch_size_per_gpu"),
    "train.dataset_path": Key(""),
    "train.output_dir": Key("."),
    "train.centering": Key("centering", "recipe.centering"),
    "train.OFFICIAL_EPOCH_LENGTH": Key(1250, "recipe.epoch_length"),
    "train.num_workers": Key(10, "recipe.num_workers"),
    "train.saveckp_freq": Key(20, None, _DEAD),
    "train.seed": Key(0, None, f"{_DEAD}; ours is seed"),
    "train.cache_dataset": Key(True, None, _DEAD),
    "train.patch_size": Key(14, None, f"{_DEAD}: the patch size is student.patch_size"),
    "student.arch": Key("vit_large"),
    "student.patch_size": Key(16, "backbone.patch_size"),
    "student.drop_path_rate": Key(0.3, "recipe.drop_path_rate"),
    "student.drop_path_uniform": Key(True, "backbone.drop_path_uniform"),
    "student.layerscale": Key(1e-5),
    "student.ffn_layer": Key("mlp", only=("mlp",)),
    "student.block_chunks": Key(0, None, "it only groups the blocks for FSDP"),
    "student.qkv_bias": Key(True, "backbone.qkv_bias"),
    "student.proj_bias": Key(True, only=(True,)),
    "student.ffn_bias": Key(True, only=(True,)),
    "student.num_register_tokens": Key(0, "backbone.num_register_tokens"),
    "student.interpolate_antialias": Key(False),
    "student.interpolate_offset": Key(0.1),
    "student.pretrained_weights": Key(""),
    "teacher.momentum_teacher": Key(0.992),
    "teacher.final_momentum_teacher": Key(1.0),
    "teacher.warmup_teacher_temp": Key(0.04),
    "teacher.teacher_temp": Key(0.07),
    "teacher.warmup_teacher_temp_epochs": Key(30, "recipe.schedules.teacher_temp_warmup_epochs"),
    "optim.epochs": Key(100, "recipe.epochs"),
    "optim.warmup_epochs": Key(10, "recipe.schedules.warmup_epochs"),
    "optim.weight_decay": Key(0.04),
    "optim.weight_decay_end": Key(0.4),
    "optim.base_lr": Key(0.004, "recipe.schedules.lr"),
    "optim.lr": Key(0.0, None, "the rule sets it from optim.base_lr and the batch, in DINOv2 too"),
    "optim.min_lr": Key(1e-6, "recipe.schedules.min_lr"),
    "optim.scaling_rule": Key("sqrt_wrt_1024", "recipe.schedules.lr_scaling"),
    "optim.clip_grad": Key(3.0, "training.clip_grad"),
    "optim.freeze_last_layer_epochs": Key(1, "recipe.schedules.freeze_last_layer_epochs"),
    "optim.patch_embed_lr_mult": Key(0.2, "recipe.patch_embed_lr_multiplier"),
    "optim.layerwise_decay": Key(0.9, "recipe.layerwise_decay"),
    "optim.adamw_beta1": Key(0.9),
    "optim.adamw_beta2": Key(0.999),
    "crops.global_crops_scale": Key([0.32, 1.0], "recipe.crops.global_crops_scale"),
    "crops.global_crops_size": Key(224, "recipe.crops.global_crops_size"),
    "crops.local_crops_number": Key(8, "recipe.crops.local_crops_number"),
    "crops.local_crops_scale": Key([0.05, 0.32], "recipe.crops.local_crops_scale"),
    "crops.local_crops_size": Key(96, "recipe.crops.local_crops_size"),
    "evaluation.eval_period_iterations": Key(12500, "probe_every"),
}
_SECTIONS = {key.split(".")[0] for key in TABLE}
# Keys that change only the speed keep our default unless the file sets them.
_SPEED = {"train.num_workers"}
_SIZES = ("small", "base", "large", "huge")
_ARCHS = {
    spelling.format(size): model.format(size)
    for spelling, model in (
        ("vit_{}", "dinov2_vit_{}_patch16"),
        ("hybrid_vit_{}", "hybrid_dinov2_vit_{}_patch16"),
        ("vit_{}_inv_early", "d8_inv_early_dinov2_vit_{}_patch16"),
    )
    for size in _SIZES
}


def is_theirs(key: str) -> bool:
    """Whether a dotted key belongs to one of DINOv2's sections."""
    return key.split(".")[0] in _SECTIONS


def is_text(key: str) -> bool:
    """Whether a DINOv2 key takes any text; DINOv2's command line needs no quotes around it."""
    return key in TABLE and isinstance(TABLE[key].default, str)


def is_dinov2(content: Mapping[str, Any]) -> bool:
    """Whether a file is a DINOv2 config; UserError if it mixes DINOv2's sections with ours."""
    theirs = [str(key) for key in content if is_theirs(str(key))]
    ours = sorted(
        {"recipe", "backbone", "training", "data", "optimizer", "launcher"} & set(content)
    )
    if not theirs or "defaults" in content:
        return False
    if ours:
        raise UserError(
            f"{theirs[0]!r} is a word of DINOv2's configs, {ours[0]!r} of ours: use one"
        )
    return True


def translate(
    content: dict[str, Any],
    *,
    name: str,
    source: Path,
    base: str = "train",
    groups: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Our run file for a DINOv2 config, and a note for each given key that has no effect.

    `groups`: groups chosen on the command line; they replace the file's backbone and data.
    Raises `UserError` for unknown keys and for values that are not offered.
    """
    given = dict(_leaves(content))
    for key, value in given.items():
        _check(key, value, source)
    values = {key: entry.default for key, entry in TABLE.items()} | given
    notes = [f"{key} has no effect: {TABLE[key].note}" for key in given if TABLE[key].note]
    groups = groups or {}
    backbone = groups.get("backbone") or _backbone(str(values["student.arch"]))
    run: dict[str, Any] = {"name": name}
    for key, entry in TABLE.items():
        if entry.ours and (key not in _SPEED or key in given):
            _put(run, entry.ours, values[key])
    notes += _put_backbone(run, values, given, octic=not backbone.startswith(("dinov2_", "deit_")))
    if base != "train":
        run = {"name": name, "backbone": run["backbone"]}
        defaults: list[Any] = [f"/{base}", {"override /backbone": backbone}]
        weights = values["MODEL.WEIGHTS"] or values["student.pretrained_weights"]
        if weights:
            run["weights"] = weights
    else:
        _put_training(run, values, given)
        defaults = [
            f"/{base}",
            {"override /backbone": backbone},
            {"override /recipe": "dinov2_published"},
        ]
        if "data" not in groups:
            string = str(values["train.dataset_path"])
            # DINOv2's own default, ImageNet, is our group: there its metadata are not demanded.
            defaults.append({"override /data": None if string else "imagenet"})
            if string:
                _put_data(run, string, source)
    if "train.output_dir" in given and given["train.output_dir"] != ".":
        run["output_dir"] = given["train.output_dir"]
    return {"defaults": [*defaults, "_self_"], **run}, notes


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in TABLE:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None or f"{prefix}{key}" in TABLE or f"{prefix}{key}" not in _SECTIONS:
            yield f"{prefix}{key}", value


def _check(key: str, value: Any, source: Path) -> None:
    if key not in TABLE:
        where = f"{source}{line_of(source, key)}"
        raise UserError(f"{where}: {key!r} is no key of DINOv2's config{nearest(key, TABLE)}")
    entry = TABLE[key]
    if not same_kind(value, entry.default):
        raise UserError(f"{key} must be {kind(entry.default)}, got {value!r}")
    if entry.only and value not in entry.only:
        offered = " or ".join(str(word).lower() for word in entry.only)
        raise UserError(f"{key}={value} is not offered; it can be {offered}")


def _backbone(arch: str) -> str:
    if arch not in _ARCHS:
        raise UserError(
            f"unknown student.arch {arch!r}{nearest(arch, _ARCHS)} (known: {', '.join(_ARCHS)})"
        )
    return _ARCHS[arch]


def _put_backbone(
    run: dict[str, Any], values: dict[str, Any], given: dict[str, Any], *, octic: bool
) -> list[str]:
    run["backbone"]["img_size"] = values["crops.global_crops_size"]
    run["backbone"]["init_values"] = values["student.layerscale"]
    plain_only = {
        "position_offset": "student.interpolate_offset",
        "position_antialias": "student.interpolate_antialias",
    }
    if not octic:
        run["backbone"] |= {ours: values[theirs] for ours, theirs in plain_only.items()}
        return []
    return [
        f"{key} has no effect: octic models take none, there as here"
        for key in plain_only.values()
        if key in given
    ]


def _put_training(run: dict[str, Any], values: dict[str, Any], given: dict[str, Any]) -> None:
    pairs = {
        "weight_decay": ("optim.weight_decay", "optim.weight_decay_end"),
        "momentum": ("teacher.momentum_teacher", "teacher.final_momentum_teacher"),
        "teacher_temp": ("teacher.warmup_teacher_temp", "teacher.teacher_temp"),
    }
    for ours, theirs in pairs.items():
        run["recipe"]["schedules"][ours] = [values[key] for key in theirs]
    _put(run, "optimizer.betas", [values["optim.adamw_beta1"], values["optim.adamw_beta2"]])
    training, student = run["training"], "compute_precision.student.backbone"
    training["weights"] = values["MODEL.WEIGHTS"] or values["student.pretrained_weights"] or None
    if "compile" in given:
        training["compile"] = given["compile"]
    if f"{student}.mixed_precision.param_dtype" in given:
        training["precision"] = given[f"{student}.mixed_precision.param_dtype"]
    if f"{student}.sharding_strategy" in given:
        sharded = given[f"{student}.sharding_strategy"] != "NO_SHARD"
        training["sharding"] = "shard" if sharded else "replicate"
    epoch = values["train.OFFICIAL_EPOCH_LENGTH"]
    if epoch > 0:
        run["checkpoint"] = {"every": 3 * epoch}


def _put_data(run: dict[str, Any], string: str, source: Path) -> None:
    """Set data.train to DINOv2's dataset string, and data.val to the same with split=VAL.

    Departs from octic-vits: a name in capitals, such as ${IMAGENET_PATH}, is read from the
    environment, because the config keys it refers to in octic-vits do not exist.
    """
    variable = r"\$\{([A-Z][A-Z0-9_]*)\}"
    for name in re.findall(variable, string):
        if name not in os.environ:
            raise UserError(
                f"environment variable {name} is not set (train.dataset_path of {source}); set it, "
                "or data=imagenet data.root=FOLDER"
            )
    string = re.sub(variable, r"${oc.env:\1}", string)
    target = "utils.data.strings.parse_dataset"
    run["data"] = {"train": {"_target_": target, "string": string}}
    validation = re.sub(r"split=\w+", "split=VAL", string)
    run["data"]["val"] = (
        {"_target_": target, "string": validation} if validation != string else None
    )


def _put(run: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        run = run.setdefault(parent, {})
    run[last] = value

"""Translate the flags of DeiT's training code into overrides of the run files in configs/deit/.

Flags that are simply other names for a config key are in `utils.config.flags`. Here are those with
DeiT's own values, those that depend on each other, and those without effect.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    backbone_words,
    help_page,
    meanings,
    passed_on,
    read_command,
    tell,
)
from utils.config.compose import compose_config, parse_config
from utils.config.files import CONFIGS, run_of_model
from utils.config.flags import quoted, read_arguments
from utils.errors import UserError
from utils.nearest import nearest

DEFAULT, RUNS = "deit/imagenet.yaml", "deit"
LAMB = ["optimizer._target_='timm.optim.Lamb'"]
SGD = [
    *("optimizer._target_='torch.optim.SGD'", "~optimizer.betas", "~optimizer.eps"),
    "optimizer.nesterov=true",
]
OPTIMIZERS = {
    **{"fusedlamb": LAMB, "lamb": LAMB, "sgd": SGD},
    "adamw": ["optimizer._target_='torch.optim.AdamW'"],
}
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DATA_SETS = {
    "IMNET": ["data=imagenet"],
    "CIFAR": ["data=cifar100"],
    "CIFAR-10": ["data=cifar10"],
    "INAT": ["data=inaturalist", "data.year=2018"],
    "INAT19": ["data=inaturalist", "data.year=2019"],
    **{domain: ["data=domainnet", f"data.domain={domain}"] for domain in DOMAINS},
}
CLASSES = {"IMNET": 1000, "CIFAR": 100, "CIFAR-10": 10, "INAT": 8142, "INAT19": 1010}
CLASSES |= dict.fromkeys(DOMAINS, 345)
DISTILLATIONS = ("none", "soft", "hard")
CATEGORY = "--inat-category"
AUGMENTATION = "recipe.augmentation"
OPTIONS = {
    "--model": Option("backbone", "any of configs/backbone, or of timm"),
    "--data-set": Option("data", "IMNET, CIFAR, INAT, INAT19, ...; sets the number of classes too"),
    "--nb-classes": Option("backbone.num_classes", "of the classifier"),
    "--inat-category": Option("data.category", "rank that is told apart"),
    "--opt": Option("optimizer", f"{', '.join(OPTIMIZERS)}, or a class such as torch.optim.AdamW"),
    "--opt-betas": Option("optimizer.betas", "two numbers"),
    "--momentum": Option("optimizer.momentum", "of sgd"),
    "--sched": Option("recipe.schedules.shape", "of the learning rate: cosine, step"),
    "--decay-epochs": Option("recipe.schedules.decay_epochs", "of --sched step"),
    "--decay-rate": Option("recipe.schedules.decay_rate", "of --sched step"),
    "--unscale-lr": Option("recipe.schedules.lr_scaling", "the rate as it is; the default", "none"),
    "--drop": Option("backbone.drop_rate", "dropout before the classifier"),
    "--no-model-ema": Option("recipe.ema_decay", "no average of the weights", "0"),
    "--use-amp": Option("training.precision", "with a loss scaler, as published", "fp16"),
    "--no-use-amp": Option("training.precision", "as mirror ResMLPs were trained", "tf32"),
    "--symmetrized-asym-feats": Option("backbone.invariant", "of mirror nets", "power_spectrum"),
    "--attn-mixer": Option("backbone.attention_mixer", "of mirror nets", "true"),
    "--mixup": Option("recipe.mixing.mixup", "Beta parameter of mixup"),
    "--cutmix": Option("recipe.mixing.cutmix", "Beta parameter of CutMix"),
    "--cutmix-minmax": Option("recipe.mixing.cutmix_minmax", "two numbers"),
    "--mixup-prob": Option("recipe.mixing.probability", "that a batch is mixed"),
    "--mixup-switch-prob": Option("recipe.mixing.switch_probability", "that it is CutMix"),
    "--mixup-mode": Option("recipe.mixing.mode", "batch, pair or elem"),
    "--smoothing": Option("recipe.smoothing", "of labels; without --bce-loss, recipe.loss=ce"),
    "--distillation-type": Option("recipe.distillation.kind", ", ".join(DISTILLATIONS)),
    "--distillation-alpha": Option("recipe.distillation.alpha", "the teacher's share of the loss"),
    "--distillation-tau": Option("recipe.distillation.tau", "temperature of soft"),
    "--teacher-model": Option("recipe.distillation.teacher", "a network of timm (regnety_160)"),
    "--teacher-path": Option("recipe.distillation.weights", "its weights (timm's own)"),
    "--aa": Option(f"{AUGMENTATION}.auto_augment", "RandAugment, unless --ThreeAugment"),
    "--train-interpolation": Option(f"{AUGMENTATION}.interpolation", "without 3-Augment"),
    "--reprob": Option(f"{AUGMENTATION}.erase_probability", "random erasing, without 3-Augment"),
    "--remode": Option(f"{AUGMENTATION}.erase_mode", "what is filled in, without 3-Augment"),
    "--recount": Option(f"{AUGMENTATION}.erase_count", "boxes per image, without 3-Augment"),
    "--eval-crop-ratio": Option("probes.accuracy.eval_crop_ratio", "of the images judged"),
}
PAIRS = ("--opt-betas", "--cutmix-minmax")  # flags with two values
SAME = {
    "--num_workers": "--num-workers",
    "--data_path": "--data-path",
    "--job_dir": "--output-dir",
    "--dr": "--decay-rate",
    "--use_volta32": "--use-volta32",
}
# Flag -> how many words follow it, and why nothing depends on it.
NO_EFFECT = {
    "--ThreeAugment": (0, "3-Augment is what this recipe does"),
    "--train-mode": (0, "that is the default"),
    "--model-ema": (0, "the average is kept unless recipe.ema_decay is 0"),
    "--model-ema-force-cpu": (0, "the average stays where the model is"),
    "--dist-eval": (0, "the images judged are always shared out over the processes"),
    **dict.fromkeys(
        ("--fused-attn", "--no-fused-attn"), (0, "attention is fused wherever it can be")
    ),
    **dict.fromkeys(("--no-symmetrized-asym-feats", "--no-attn-mixer"), (0, "that is the default")),
    "--no-zip-dataloader": (0, "archives are not read; data=shards and data=lmdb are"),
    "--high-precision-matmul": (0, "TF32 goes with every training.precision but fp32"),
    **dict.fromkeys(("--pin-mem", "--no-pin-mem"), (0, "memory is pinned where there is a GPU")),
    "--distributed": (0, "the launcher knows"),
    **dict.fromkeys(("--world_size", "--dist_url", "--local_rank"), (1, "the launcher knows")),
    "--start_epoch": (1, "the run folder knows"),
    **dict.fromkeys(("--cooldown-epochs", "--patience-epochs"), (1, "neither in DeiT")),
}
REFUSED = {
    **dict.fromkeys(
        ("--eval", "--rot-eval", "--flop-eval"),
        "judging is experiments/eval_deit.py --model NAME --eval FILE",
    ),
    **dict.fromkeys(
        ("--test_speed", "--only_test_speed", "--visualize_mask", "--n_visualization"),
        "experiments/eval_deit.py does that, with the same flags",
    ),
    **dict.fromkeys(("--lr-noise", "--lr-noise-pct", "--lr-noise-std"), "noise is not offered"),
    "--resplit": "split augmentation is not offered",
    "--zip-dataloader": "archives are not read; data=shards and data=lmdb are",
}


def parse_deit_training(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config of a training's command line; a mistake prints one line and exits with code 2."""
    page = help_page(meanings(OPTIONS, {name: why for name, (_, why) in NO_EFFECT.items()}))
    words, notes = read_command(argv, read_deit_training, page=page)
    config = plain(parse_config(DEFAULT, words, runs=RUNS))
    tell(notes)
    return config


def read_deit_training(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides and notes for `[flags] [key=value ...]`; words that are not DeiT's pass unchanged.

    Raises UserError for a flag without its value, an unknown value, and a flag that is not offered.
    """
    given, rest, notes = _sort(argv)
    words = [
        *_data_words(given, rest, notes),
        *_optimizer_words(given),
        *_mixing_words(given),
        *_distillation_words(given),
        *_loss_words(given, rest),
    ]
    model = given.pop("--model", [""])[0]
    augmentation = {name: given.pop(name) for name in list(given) if _is_augmentation(name)}
    words += [word for name, values in given.items() for word in _words(name, values)]
    if model:
        words = [*_model_words(model, words, rest), *words]
        notes += _other_recipe(model, rest)
    if augmentation:
        target = _composed([*words, *rest])["recipe"]["augmentation"]["_target_"]
        three = str(target).endswith("ThreeAugment")
        if three and "--aa" in augmentation and "--ThreeAugment" not in argv:
            words.append(f"{AUGMENTATION}._target_='deit.augment.TimmAugmentation'")
            three = False
        if three:
            notes += [
                f"{name} has no effect with 3-Augment, in DeiT either" for name in augmentation
            ]
        else:
            words += [word for name in augmentation for word in _words(name, augmentation[name])]
    # In front, so that an explicit key=value takes precedence.
    return [*words, *rest], notes


def _sort(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Split a command line: flags of this file with their values, all other words, and notes."""
    waiting, given, rest, notes = list(argv), dict[str, list[str]](), list[str](), list[str]()
    while waiting:
        word = waiting.pop(0)
        name, _, inline = word.partition("=")
        name = SAME.get(name, name)
        if name in REFUSED:
            raise UserError(f"{name}: {REFUSED[name]}")
        if name in OPTIONS:
            count = 0 if OPTIONS[name].value else 1 + (name in PAIRS)
            given[name] = _take(name, count, inline, waiting)
        elif name in NO_EFFECT:
            count, why = NO_EFFECT[name]
            _take(name, count, inline, waiting)
            notes.append(f"{name} has no effect: {why}")
        elif name == "--resume":
            rest += [name, *_resumed(inline, waiting)]
        else:
            rest += passed_on(f"{name}={inline}" if "=" in word else name, waiting)
    return given, rest, notes


def _take(name: str, count: int, inline: str, waiting: list[str]) -> list[str]:
    if inline and not count:
        raise UserError(f"{name} takes no value, got {inline!r}")
    values = [inline] if inline else waiting[:count]
    if len(values) < count or any(value.startswith("--") for value in values):
        raise UserError(f"{name} needs {'a value' if count == 1 else f'{count} values'}")
    if not inline:
        del waiting[:count]
    return values


def _resumed(inline: str, waiting: list[str]) -> list[str]:
    """The words for --resume, which here takes a run folder, not a file as in DeiT."""
    follows = not inline and waiting and not waiting[0].startswith("-") and "=" not in waiting[0]
    given = waiting.pop(0) if follows else inline
    if not given:
        return []
    if not Path(given).is_dir():
        raise UserError(
            f"--resume {given}: a run goes on in its folder, --output-dir FOLDER; weights of a "
            "file to start from are --finetune FILE"
        )
    return [f"output_dir={quoted(given)}"]


def _words(name: str, values: Sequence[str]) -> list[str]:
    key, value = OPTIONS[name].key, OPTIONS[name].value
    if value:
        return [f"{key}={value}"]
    if name == "--drop" and _is_zero(values[0]):  # 0 is every network's default, if it has dropout
        return []
    return [f"{key}={_value(*values)}"]


def _value(*values: str) -> str:
    """A value in Hydra's override grammar: numbers bare, text quoted, several as a list."""
    if len(values) > 1:
        return f"[{','.join(map(_value, values))}]"
    try:
        float(values[0])
    except ValueError:
        return quoted(values[0])
    return values[0]


def _is_zero(value: str) -> bool:
    return not value.strip("0.")


def _one_of(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    if value not in known:
        raise UserError(
            f"unknown {name} {value!r}{nearest(value, known)} (known: {', '.join(known)})"
        )
    return value


def _data_words(given: dict[str, list[str]], rest: Sequence[str], notes: list[str]) -> list[str]:
    """The data and, but for ranks above the species, the number of their classes."""
    said = given.pop("--data-set", None)
    name = _one_of("--data-set", said[0], DATA_SETS) if said else ""
    elsewhere = any(w.startswith(("data=", "--data=", "--config")) or w == "--data" for w in rest)
    ranked = name.startswith("INAT") or (not name and elsewhere)
    if CATEGORY in given and not ranked:
        del given[CATEGORY]
        notes.append(f"{CATEGORY} has no effect: only INAT and INAT19 have such ranks")
    if not name:
        return []
    if given.get(CATEGORY, ["name"]) != ["name"]:
        return DATA_SETS[name]
    packed = name == "IMNET" and is_packed(rest)
    return [*DATA_SETS[name] * (not packed), f"backbone.num_classes={CLASSES[name]}"]


def is_packed(words: Iterable[str]) -> bool:
    """Whether EViT's flag asks for ImageNet's images in two files, in the place of its tree."""
    return not {"--use-lmdb", "--use_lmdb"}.isdisjoint(words)


def _optimizer_words(given: dict[str, list[str]]) -> list[str]:
    if "--opt" not in given:
        return []
    name = given.pop("--opt")[0]
    if "." in name:
        return [f"optimizer._target_={quoted(name)}"]
    if name == "sgd":
        given.setdefault("--momentum", ["0.9"])
    return OPTIMIZERS[_one_of("--opt", name, OPTIMIZERS)]


def _mixing_words(given: dict[str, list[str]]) -> list[str]:
    """Turn mixing off if neither mixup nor CutMix is on, whatever the other mixing flags are."""
    both = [given.get(name, ["1"])[0] for name in ("--mixup", "--cutmix")]
    if "--cutmix-minmax" in given or not all(map(_is_zero, both)):
        return []
    for name in [name for name in given if OPTIONS[name].key.startswith("recipe.mixing.")]:
        del given[name]
    return ["recipe.mixing=null"]


def _loss_words(given: Mapping[str, list[str]], rest: Sequence[str]) -> list[str]:
    """Choose the cross entropy for --smoothing, as DeiT does unless --bce-loss is given."""
    smooth = not _is_zero(given.get("--smoothing", ["0"])[0])
    return ["recipe.loss=ce"] if smooth and "--bce-loss" not in rest else []


def _distillation_words(given: dict[str, list[str]]) -> list[str]:
    """The teacher's whole node; without --distillation-type there is no teacher, as in DeiT."""
    own = {name: given.pop(name)[0] for name in list(given) if _is_distillation(name)}
    kind = _one_of("--distillation-type", own.get("--distillation-type", "none"), DISTILLATIONS)
    if kind == "none":
        if len(own) > ("--distillation-type" in own):
            raise UserError(f"{', '.join(own)}: there is no teacher without --distillation-type")
        return ["recipe.distillation=null"] if own else []
    path = own.get("--teacher-path")
    teacher = {
        "_target_": "vit.adapters.timm_backbone",
        "_partial_": "true",
        "model_name": quoted(own.get("--teacher-model", "regnety_160")),
        "num_classes": "${oc.select:backbone.num_classes,1000}",
        "pretrained": "false" if path else "true",
    }
    node = {
        "_target_": "deit.losses.Distillation",
        "teacher": _mapping(teacher),
        "weights": quoted(path) if path else "null",
        "kind": kind,
        "alpha": _value(own.get("--distillation-alpha", "0.5")),
        "tau": _value(own.get("--distillation-tau", "1.0")),
    }
    return [f"recipe.distillation={_mapping(node)}"]


def _mapping(node: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in node.items()) + "}"


def _is_distillation(name: str) -> bool:
    return OPTIONS[name].key.startswith("recipe.distillation.")


def _is_augmentation(name: str) -> bool:
    return OPTIONS[name].key.startswith(f"{AUGMENTATION}.")


def _model_words(model: str, words: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The backbone, and the run's name where no run file of the model gives one."""
    chosen = backbone_words(model)
    every = [*chosen, *words, *rest]
    named = any(w == "--name" or w.startswith(("name=", "--name=", "--config")) for w in rest)
    if not named and not (CONFIGS / RUNS / f"{model}.yaml").is_file():
        chosen.append(f"name={quoted(model)}")
    if chosen[0] != "backbone=timm":
        return chosen
    backbone = _composed(every)["backbone"]
    if "num_classes" not in backbone:
        chosen.append("backbone.num_classes=1000")
    if "img_size" in backbone and not _takes_image_size(model):
        chosen.append("~backbone.img_size")
    return chosen


def _other_recipe(model: str, rest: Sequence[str]) -> list[str]:
    """A note where the run of a model is by another recipe than the one that is taken."""
    chosen = ("--config", "recipe=", "name=", "--name")
    if any(word.startswith(chosen) for word in rest):
        return []
    files = [
        str(path.relative_to(CONFIGS.parent))
        for path in sorted(CONFIGS.glob("*/*.yaml"))
        if f"- override /backbone: {model}\n" in path.read_text()
    ]
    if not files or any(file.startswith(f"configs/{RUNS}/") for file in files):
        return []
    return [
        f"{model}: its own recipe is --config-file {' or '.join(files)}; what is not given here is "
        f"that of configs/{DEFAULT}"
    ]


def _takes_image_size(model: str) -> bool:
    """Whether a network of timm is made for one size of images."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            timm.create_model(model, img_size=224)
    except TypeError as error:
        return "img_size" not in str(error)
    except Exception:  # whatever it is, building the network will say it
        return True
    return True


def _composed(words: Sequence[str]) -> dict[str, Any]:
    """The config that these words ask for so far."""
    arguments = read_arguments(list(words), DEFAULT)
    file = arguments.config_file or run_of_model(arguments.overrides, RUNS) or DEFAULT
    return plain(compose_config(file, arguments.overrides))

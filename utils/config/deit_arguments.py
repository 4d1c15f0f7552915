"""Translate the flags of DeiT's training code into overrides of the run files in configs/deit/.

`utils.config.deit_flags` lists them. Here they are read: those with DeiT's own values, those that
depend on each other, and those without effect on the run that is asked for.
"""

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.config.build import plain, resolve
from utils.config.command_line import (
    backbone_words,
    help_page,
    meanings,
    read_command,
    sorted_words,
    tell,
)
from utils.config.compose import compose_config, parse_config
from utils.config.deit_flags import (
    AUGMENTATION,
    CATEGORY,
    CLASSES,
    CONDITIONAL,
    DATA_SETS,
    DISTILLATIONS,
    NO_EFFECT,
    OPTIMIZERS,
    OPTIONS,
    PAIRS,
    REFUSED,
    SAME,
    SPECTRUM,
    TEACHER,
    is_packed,
    lacks_spectrum,
)
from utils.config.files import CONFIGS, run_of_model
from utils.config.flags import quoted, read_arguments
from utils.errors import UserError
from utils.nearest import nearest

DEFAULT, RUNS = "deit/imagenet.yaml", "deit"


def parse_deit_training(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config of a training's command line; a mistake prints one line and exits with code 2."""
    page = help_page(meanings(OPTIONS, {name: why for name, (_, why) in NO_EFFECT.items()}))
    words, notes = read_command(argv, read_deit_training, page=page)
    config = plain(parse_config(DEFAULT, words, runs=RUNS, further=lambda config: notes))
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
        *_mixing_words(given, notes),
        *_distillation_words(given, notes),
        *_loss_words(given, rest),
    ]
    model = given.pop("--model", [""])[0]
    conditional = {name: given.pop(name) for name in list(given) if name in CONDITIONAL}
    words += [word for name, values in given.items() for word in _words(name, values)]
    if model:
        words = [*_model_words(model, words, rest), *words]
        notes += _other_recipe(model, rest)
    if conditional:
        config = _composed([*words, *rest])
        words += _conditional_words(conditional, notes, config, "--ThreeAugment" in argv)
    # In front, so that an explicit key=value takes precedence.
    return [*words, *rest], notes


def _sort(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Split a command line: flags of this file with their values, all other words, and notes."""
    given, rest, notes = dict[str, list[str]](), list[str](), list[str]()
    takes = {name: count for name, (count, _) in NO_EFFECT.items()}
    for name, option in OPTIONS.items():
        takes[name] = 0 if option.value else 1 + (name in PAIRS)
    for name, values in sorted_words(_with_run_folder(argv), takes, same=SAME):
        if name in OPTIONS:
            given[name] = values
        elif name:
            notes.append(f"{name} has no effect: {NO_EFFECT[name][1]}")
        elif (refused := values[0].partition("=")[0]) in REFUSED:
            raise UserError(f"{refused}: {REFUSED[refused]}")
        else:
            rest += values
    return given, rest, notes


def _with_run_folder(argv: Sequence[str]) -> list[str]:
    """The words with the run folder that follows --resume as output_dir; in DeiT a file follows."""
    spread, words = list[str](), list[str]()
    for word in argv:
        spread += word.split("=", 1) if word.startswith("--resume=") else [word]
    for before, word in pairwise(["", *_without_empty(spread)]):
        override = word.startswith("-") or ("=" in word and not Path(word).is_dir())
        if before != "--resume" or override:
            words.append(word)
        elif Path(word).is_dir():
            words.append(f"output_dir={quoted(word)}")
        else:
            raise UserError(
                f"--resume {word}: a run goes on in its folder, --output-dir FOLDER; weights of a "
                "file to start from are --finetune FILE"
            )
    return words


def _without_empty(argv: Sequence[str]) -> list[str]:
    """The words without --resume '' and the like, which are DeiT's own defaults."""
    words = list[str]()
    known = {"--resume", *OPTIONS, *NO_EFFECT}
    for word in argv:
        if word == "" and words and SAME.get(words[-1], words[-1]) in known:
            words.pop()
        else:
            words.append(word)
    return words


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


def _optimizer_words(given: dict[str, list[str]]) -> list[str]:
    if "--opt" not in given:
        return []
    name = given.pop("--opt")[0]
    if "." in name:
        return [f"optimizer._target_={quoted(name)}"]
    if name == "sgd":
        given.setdefault("--momentum", ["0.9"])
    return OPTIMIZERS[_one_of("--opt", name, OPTIMIZERS)]


def _mixing_words(given: dict[str, list[str]], notes: list[str]) -> list[str]:
    """Turn mixing off if neither mixup nor CutMix is on, whatever the other mixing flags are."""
    both = [given.get(name, ["1"])[0] for name in ("--mixup", "--cutmix")]
    if "--cutmix-minmax" in given or not all(map(_is_zero, both)):
        return []
    for name in [name for name in given if OPTIONS[name].key.startswith("recipe.mixing.")]:
        del given[name]
        if name not in ("--mixup", "--cutmix"):
            notes.append(f"{name} has no effect: neither mixup nor CutMix is on")
    return ["recipe.mixing=null"]


def _loss_words(given: Mapping[str, list[str]], rest: Sequence[str]) -> list[str]:
    """Choose the cross entropy for --smoothing, as DeiT does unless --bce-loss is given."""
    smooth = not _is_zero(given.get("--smoothing", ["0"])[0])
    return ["recipe.loss=ce"] if smooth and "--bce-loss" not in rest else []


def _distillation_words(given: dict[str, list[str]], notes: list[str]) -> list[str]:
    """The teacher's whole node; without --distillation-type there is no teacher, as in DeiT.

    UserError where it is missing beside other values than DeiT's own: it was forgotten.
    """
    own = {name: given.pop(name)[0] for name in list(given) if name in TEACHER}
    told = TEACHER | own
    kind = _one_of("--distillation-type", told["--distillation-type"], DISTILLATIONS)
    if kind == "none":
        meant = [name for name in own if own[name] != TEACHER[name]]
        if meant and "--distillation-type" not in own:
            raise UserError(f"{', '.join(meant)}: there is no teacher without --distillation-type")
        notes += [
            f"{name} has no effect: there is no teacher"
            for name in own
            if name != "--distillation-type"
        ]
        return ["recipe.distillation=null"] if own else []
    if kind == "hard" and "--distillation-tau" in own:
        notes.append("--distillation-tau has no effect: it is of --distillation-type soft")
    path = told["--teacher-path"]
    teacher = {
        "_target_": "vit.adapters.timm_backbone",
        "_partial_": "true",
        "model_name": quoted(told["--teacher-model"]),
        "num_classes": "${oc.select:backbone.num_classes,1000}",
        "pretrained": "false" if path else "true",
    }
    node = {
        "_target_": "deit.losses.Distillation",
        "teacher": _mapping(teacher),
        "weights": quoted(path) if path else "null",
        "kind": kind,
        "alpha": _value(told["--distillation-alpha"]),
        "tau": _value(told["--distillation-tau"]),
    }
    return [f"recipe.distillation={_mapping(node)}"]


def _mapping(node: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in node.items()) + "}"


def _conditional_words(
    given: Mapping[str, list[str]], notes: list[str], config: Any, three_augment: bool
) -> list[str]:
    """Words for flags of `CONDITIONAL`, and notes on those without an effect in this config.

    --aa takes the place of 3-Augment, unless the command line asks for that too.
    """
    words, idle = list[str](), _idle_flags(config)
    if "--aa" in given and "--aa" in idle and not three_augment:
        words.append(f"{AUGMENTATION}._target_='deit.augment.TimmAugmentation'")
        idle = {name: why for name, why in idle.items() if not _is_augmentation(name)}
    for name, values in given.items():
        if name in idle:
            notes.append(f"{name} has no effect{idle[name]}")
        else:
            words += _words(name, values)
    return words


def _is_augmentation(name: str) -> bool:
    return OPTIONS[name].key.startswith(f"{AUGMENTATION}.")


def _idle_flags(config: Mapping[str, Any]) -> dict[str, str]:
    """Those of `CONDITIONAL` that have no effect in this config, and why."""
    idle = dict[str, str]()
    if str(_at(config, f"{AUGMENTATION}._target_")).endswith("ThreeAugment"):
        of_others = filter(_is_augmentation, CONDITIONAL)
        idle |= dict.fromkeys(of_others, " with 3-Augment, in DeiT either")
    target = _at(config, "optimizer._target_")
    for name in ("--opt-eps", "--momentum"):
        keyword = OPTIONS[name].key.rpartition(".")[2]
        if target and not _takes(target, keyword):
            idle[name] = f": {target} has no {keyword}"
    if _at(config, "recipe.schedules.shape") != "step":
        idle |= dict.fromkeys(("--decay-epochs", "--decay-rate"), ": it is of --sched step")
    mixing = _at(config, "recipe.mixing")
    if mixing and not (mixing["mixup"] and (mixing["cutmix"] or mixing["cutmix_minmax"])):
        idle["--mixup-switch-prob"] = ": only one of mixup and CutMix is on"
    if lacking := lacks_spectrum(str(_at(config, "backbone._target_")).rpartition(".")[2]):
        idle[SPECTRUM] = lacking
    return idle


def _at(config: Any, key: str) -> Any:
    """The value of a key; None where the config has no such key."""
    for name in key.split("."):
        config = (config or {}).get(name)
    return config


def _takes(target: str, keyword: str) -> bool:
    parameters = inspect.signature(resolve(target, "optimizer")).parameters.values()
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def _model_words(model: str, words: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The backbone, and the run's name where no run file of the model gives one."""
    chosen = backbone_words(model, rest)
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

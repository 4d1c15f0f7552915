"""The flags of DeiT's evaluation, as overrides of configs/eval/deit.yaml."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from utils.build import nearest, plain
from utils.config import CONFIGS, fail, parse_config
from utils.errors import UserError
from utils.flags import FLAGS

CONFIG = "eval/deit.yaml"


class Option(NamedTuple):
    """A flag of the evaluation: the key it sets, the value (None: the next word), what it means."""

    key: str
    help: str
    value: str | None = None


OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--eval": Option("weights", "file of weights, or a run folder; every key must fit"),
    "--data-path": Option("data.root", "folder of the images: ImageNet, unless data=... says what"),
    "--data-set": Option("data", "DeiT's word: IMNET, CIFAR, INAT or INAT19; as data=..."),
    "--input-size": Option("probes.accuracy.input_size", "side of the images; the net's own"),
    "--eval-crop-ratio": Option("probes.accuracy.eval_crop_ratio", "of the central crop"),
    "--batch-size": Option("probes.accuracy.batch_size", "images per process"),
    "--num-workers": Option("probes.accuracy.num_workers", "processes that read images"),
    "--precision": Option("probes.accuracy.precision", "of the net: fp32, bf16 or fp16"),
    "--rot-eval": Option("probes.accuracy.rot_eval", "images turned at random", "true"),
    "--flop-eval": Option("probes.accuracy.flop_eval", "images mirrored", "true"),
    "--symmetries": Option("probes.accuracy.symmetries", "table of all eight symmetries", "true"),
}
SAME = {
    **{"--data_path": "--data-path", "--batch": "--batch-size", "--weights": "--eval"},
    **{"--num_workers": "--num-workers", "--pretrained-weights": "--eval"},
}
SWITCHES = {"--dist-eval": "the images are always shared out over the processes"}
DATA_SETS = {
    "IMNET": ["data=imagenet"],
    "CIFAR": ["data=cifar100"],
    "INAT": ["data=inaturalist", "data.year=2018"],
    "INAT19": ["data=inaturalist", "data.year=2019"],
}
TAKES_VALUE = {name for flag in FLAGS if flag.kind is not None for name in flag.names} | {
    "--config-file",
    "--config",
}


def parse_deit_evaluation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(_help())
    try:
        words, notes = read_deit_arguments(argv)
    except UserError as error:
        fail(error)
    config = plain(parse_config(default=CONFIG, argv=words, base="evaluate"))
    for note in notes:
        print(note)
    return config


def read_deit_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides for `[flags] [key=value ...]`, and notes; other flags pass as they are."""
    words, rest, notes = list(argv), [], []
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        name = SAME.get(name, name)
        if name in SWITCHES:
            notes.append(f"{name} has no effect: {SWITCHES[name]}")
        elif name in OPTIONS:
            option = OPTIONS[name]
            value = option.value or inline or (words.pop(0) if words else "")
            if not value or (option.value is None and value.startswith("--")):
                raise UserError(f"{name} needs a value: {option.help}")
            rest += _overrides(name, option.key, value)
        else:
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
    return rest, notes


def _overrides(name: str, key: str, value: str) -> list[str]:
    if name == "--model":
        return _backbone(value)
    if name == "--data-set":
        if value not in DATA_SETS:
            known = ", ".join(DATA_SETS)
            raise UserError(f"unknown --data-set {value!r}{nearest(value, DATA_SETS)} ({known})")
        return DATA_SETS[value]
    if name in ("--eval", "--data-path", "--precision"):
        value = "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    return [f"{key}={value}"]


def _backbone(name: str) -> list[str]:
    """Our config of that name, else timm's model; the config's own complaint for neither."""
    if not (CONFIGS / "backbone" / f"{name}.yaml").is_file():
        import timm  # late: --help and our own models need none of it

        if timm.is_model(name.split(".")[0]):
            return ["backbone=timm", f"backbone.model_name={name}"]
    return [f"backbone={name}"]


def _help() -> str:
    lines = [
        f"{sys.modules['__main__'].__doc__ or ''}",
        "flags of the evaluation (they come before those below of the same name):",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"  {name:<18} {option.help} ({option.key})")
    lines += [f"  {name:<18} accepted: {why}" for name, why in SWITCHES.items()]
    return "\n".join(lines) + "\n\nall other flags and keys:\n"

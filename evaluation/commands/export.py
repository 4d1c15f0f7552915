"""The flags of experiments/export.py, as overrides of configs/export.yaml."""

from collections.abc import Sequence
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    help_page,
    meanings,
    names_backbone,
    quoted,
    read_command,
    read_words,
    spell_model,
)
from utils.config.compose import parse_config
from utils.errors import UserError, fail
from utils.ranges import check_count, check_word

OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights, or a run folder; every key must fit"),
    "--size": Option("size", "pixels a side; default: what the net was built for", text=False),
    "--format": Option("format", "torch_export, onnx or hub"),
    "--output": Option("output", "logits or features; default: logits where the net has classes"),
    "--push": Option("push", "user/name on the Hugging Face hub, for --format hub"),
}
SAME = {"--pretrained-weights": "--weights", "--input-size": "--size"}
CHOICES = {
    "format": ("torch_export", "onnx", "hub"),
    "output": ("auto", "features", "logits"),
}


def parse_export(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an export's command line asks for; a mistake prints one line, exit code 2.

    `backbone` is None if no model is named: then the weights must name theirs.
    """
    page = help_page(meanings(OPTIONS), usage="export.py OUTPUT [flags] [key=value ...]")
    words, named = read_command(argv, _read, page=page)
    config = plain(parse_config(default="export.yaml", argv=words, base="export"))
    try:
        _check(config)
        if not named:
            if not config["weights"]:
                raise UserError("which net? give --model NAME, or --weights of a run of ours")
            config["backbone"] = None
    except UserError as error:
        fail(error)
    return config


def _read(argv: Sequence[str]) -> tuple[list[str], bool]:
    words = read_export_arguments(argv)
    return words, _names_a_model(words)


def read_export_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `OUTPUT [flags] [key=value ...]`; other flags pass as they are."""
    found = read_words(argv, OPTIONS, same=SAME, num_places=1, spell=spell_model)
    return [*found.overrides, *(f"output_dir={quoted(place)}" for place in found.places)]


def _names_a_model(words: Sequence[str]) -> bool:
    if names_backbone(words):
        return True
    below = next((word for word in words if word.lstrip("+").startswith("backbone.")), None)
    if below:
        raise UserError(f"{below} changes a net that is not named; give --model NAME too")
    return "--check" in words


def _check(config: dict[str, Any]) -> None:
    for key, known in CHOICES.items():
        check_word(key, config[key], known)
    if config["size"] is not None:
        check_count("size", config["size"], 1)
    if config["push"] and config["format"] != "hub":
        raise UserError("--push uploads the hub's format; add --format hub")

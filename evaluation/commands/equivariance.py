"""The flags of experiments/test_equivariance.py, as overrides of configs/equivariance.yaml."""

from collections.abc import Sequence
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    folder_of_model,
    help_page,
    meanings,
    names_backbone,
    read_command,
    read_words,
    spell_model,
)
from utils.config.compose import parse_config

OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights; every key must fit"),
    "--pretrained-weights": Option("weights", "the same"),
    "--dtype": Option("dtype", "float32 or float64"),
    "--images": Option("images", "photographs, random, or a folder of images"),
}


def parse_equivariance(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a report's command line asks for; a mistake prints one line, exit code 2."""
    page = help_page(meanings(OPTIONS), usage="test_equivariance.py [flags] [key=value ...]")
    words = read_command(argv, _read, page=page)
    named = any(word.startswith(("backbone", "--config", "weights=")) for word in words)
    default = "equivariance.yaml" if named else "equivariance/kinds.yaml"
    # If several nets are measured in a row, none overwrites the results of another.
    words = [*folder_of_model(words, "equivariance"), *words]
    config = plain(parse_config(default=default, argv=words, base="equivariance"))
    return config | {"backbone_named": names_backbone(words)}


def _read(argv: Sequence[str]) -> list[str]:
    return read_words(argv, OPTIONS, spell=spell_model).overrides

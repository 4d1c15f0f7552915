"""The flags of experiments/extract_features.py, as overrides of configs/extract.yaml."""

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

OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights; every key must fit"),
    "--data-path": Option("data.root", "folder of the images"),
    "--split": Option("split", "all (data=folder), train or val"),
    "--feature": Option("feature", "cls, cls_patchmean or patches"),
    "--layers": Option("layers", "blocks, -1 the last; several, as -2,-1, side by side"),
    "--input-size": Option("crop_size", "side of the images; the net's own", text=False),
    "--dtype": Option("dtype", "float32 or float16, of the file"),
    "--precision": Option("precision", "of the net: fp32, bf16 or fp16"),
    "--batch-size": Option("batch_size", "images per process", text=False),
    "--num-workers": Option("num_workers", "processes that read images", text=False),
    "--overwrite": Option("overwrite", "replace features that are there", "true"),
}
SAME = {"--pretrained-weights": "--weights", "--batch": "--batch-size"}


def parse_extraction(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake prints one line, exit code 2."""
    page = help_page(meanings(OPTIONS), usage="extract_features.py OUTPUT [flags] [key=value ...]")
    words = read_command(argv, read_extraction_arguments, page=page)
    config = plain(parse_config(default="extract.yaml", argv=words, base="extract"))
    return config | {"backbone_named": names_backbone(words)}


def read_extraction_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `OUTPUT [flags] [key=value ...]`; other flags pass as they are."""
    found = read_words(argv, OPTIONS, same=SAME, num_places=1, spell=_spell)
    return [*found.overrides, *(f"output_dir={quoted(place)}" for place in found.places)]


def _spell(name: str, value: str, words: Sequence[str]) -> list[str] | None:
    return [f"layers=[{value}]"] if name == "--layers" else spell_model(name, value, words)

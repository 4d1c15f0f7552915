"""The command lines of the equivariance report and of the pictures, as overrides of configs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from utils.build import nearest, plain
from utils.command_line import (
    Option,
    Words,
    backbone_words,
    folder_of_model,
    help_page,
    meanings,
    names_backbone,
    quoted,
    read_words,
)
from utils.config import CONFIGS, fail, parse_config
from utils.errors import UserError

# Images each picture is drawn of where no data=... says so; those of other pictures are their own.
DATA = {
    **dict.fromkeys(("pca", "attention", "token_mask"), "photographs"),
    "neighbours": "digits",
}
SHARED = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights; every key must fit"),
    "--pretrained-weights": Option("weights", "the same"),
}
REPORT = SHARED | {
    "--dtype": Option("dtype", "float32 or float64"),
    "--images": Option("images", "photographs, random, or a folder of images"),
}


def parse_equivariance(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a report's command line asks for; a mistake is one line and exit code 2."""
    usage = "test_equivariance.py [flags] [key=value ...]"
    words = _read(argv, REPORT, usage, num_places=0).overrides
    named = any(word.startswith(("backbone", "--config", "weights=")) for word in words)
    default = "equivariance.yaml" if named else "equivariance/kinds.yaml"
    # Several nets in a row: none takes the place of another's results.
    words = [*folder_of_model(words, "equivariance"), *words]
    config = plain(parse_config(default=default, argv=words, base="equivariance"))
    return config | {"backbone_named": names_backbone(words)}


def parse_drawing(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a drawing's command line asks for; a mistake is one line and exit code 2."""
    pictures = sorted(path.stem for path in (CONFIGS / "picture").glob("*.yaml"))
    usage = f"draw.py {'|'.join(pictures)} OUTPUT [flags] [key=value ...]"
    places, words, _ = _read(argv, SHARED, usage, num_places=2)
    if "--help" not in words and "-h" not in words:
        if not places or places[0] not in pictures:
            what = f"no picture {places[0]!r}{nearest(places[0], pictures)}" if places else "which?"
            fail(f"{what} (pictures: {', '.join(pictures)})")
        words = [f"picture={places[0]}", *(_of_picture(word) for word in words)]
        if not any(word.startswith("data=") for word in words) and places[0] in DATA:
            words.insert(1, f"data={DATA[places[0]]}")
        words += [f"output_dir={quoted(place)}" for place in places[1:]]
    config = plain(parse_config(default="draw.yaml", argv=words, base="draw"))
    return config | {"backbone_named": names_backbone(words)}


def _read(
    argv: Sequence[str] | None, options: Mapping[str, Option], usage: str, *, num_places: int
) -> Words:
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_page(meanings(options), usage=usage))
    try:
        return read_words(argv, options, num_places=num_places, spell=_spell)
    except UserError as error:
        fail(error)


def _spell(name: str, value: str) -> list[str] | None:
    return backbone_words(value) if name == "--model" else None


def _of_picture(word: str) -> str:
    """`style=capi` is `picture.style=capi`: a key that no config has is meant for the picture."""
    import yaml

    key = word.partition("=")[0]
    content = yaml.safe_load((CONFIGS / "draw.yaml").read_text())
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    ours = key.split(".")[0] in {*content, *groups} or "=" not in word or not key[:1].isalpha()
    return word if ours else f"picture.{word}"

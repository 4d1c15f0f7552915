"""The flags of experiments/draw.py, as overrides of configs/draw.yaml."""

from collections.abc import Sequence
from typing import Any

import yaml

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
from utils.config.files import CONFIGS
from utils.errors import UserError
from utils.nearest import nearest

# Images each picture is drawn of where no data=... says so; those of other pictures are their own.
DATA = {
    **dict.fromkeys(("pca", "attention", "token_mask"), "photographs"),
    "neighbours": "digits",
}
OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights; every key must fit"),
    "--pretrained-weights": Option("weights", "the same"),
}


def parse_drawing(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a drawing's command line asks for; a mistake prints one line, exit code 2."""
    usage = f"draw.py {'|'.join(known_pictures())} OUTPUT [flags] [key=value ...]"
    words = read_command(argv, read_drawing, page=help_page(meanings(OPTIONS), usage=usage))
    config = plain(parse_config(default="draw.yaml", argv=words, base="draw"))
    return config | {"backbone_named": names_backbone(words)}


def read_drawing(argv: Sequence[str]) -> list[str]:
    """Overrides for `PICTURE OUTPUT [flags] [key=value ...]`; other flags pass as they are."""
    places, words, _ = read_words(argv, OPTIONS, num_places=2, spell=spell_model)
    if {"-h", "--help"} & set(words):
        return words
    pictures = known_pictures()
    if not places or places[0] not in pictures:
        what = f"no picture {places[0]!r}{nearest(places[0], pictures)}" if places else "which?"
        raise UserError(f"{what} (pictures: {', '.join(pictures)})")
    words = [f"picture={places[0]}", *(_of_picture(word) for word in words)]
    if not any(word.startswith("data=") for word in words) and places[0] in DATA:
        words.insert(1, f"data={DATA[places[0]]}")
    return words + [f"output_dir={quoted(place)}" for place in places[1:]]


def known_pictures() -> list[str]:
    """The pictures by their config files."""
    return sorted(path.stem for path in (CONFIGS / "picture").glob("*.yaml"))


def _of_picture(word: str) -> str:
    """The override; a key that no config has, as `style=capi`, becomes `picture.style=capi`."""
    key = word.partition("=")[0]
    content = yaml.safe_load((CONFIGS / "draw.yaml").read_text())
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    ours = key.split(".")[0] in {*content, *groups} or "=" not in word or not key[:1].isalpha()
    return word if ours else f"picture.{word}"

"""The command lines of the equivariance report and of the pictures, as overrides of configs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.deit_arguments import read_deit_arguments
from utils.build import nearest, plain
from utils.config import CONFIGS, fail, parse_config
from utils.errors import UserError
from utils.flags import FLAGS

TAKES_VALUE = {name for flag in FLAGS if flag.kind is not None for name in flag.names} | {
    "--config-file",
    "--config",
}
# Images each picture is drawn of where no data=... says so; those of other pictures are their own.
DATA = {"pca": "photographs", "attention": "photographs", "neighbours": "digits"}


class Option(NamedTuple):
    """A flag that takes the next word: the key it sets, and what it means."""

    key: str
    help: str


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
    places, words = _read(argv, REPORT, usage, places=0)
    named = any(word.startswith(("backbone", "--config", "weights=")) for word in words)
    default = "equivariance.yaml" if named else "equivariance/kinds.yaml"
    return plain(parse_config(default=default, argv=words, base="equivariance"))


def parse_drawing(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a drawing's command line asks for; a mistake is one line and exit code 2."""
    pictures = sorted(path.stem for path in (CONFIGS / "picture").glob("*.yaml"))
    usage = f"draw.py {'|'.join(pictures)} OUTPUT [flags] [key=value ...]"
    places, words = _read(argv, SHARED, usage, places=2)
    if "--help" not in words and "-h" not in words:
        if not places or places[0] not in pictures:
            what = f"no picture {places[0]!r}{nearest(places[0], pictures)}" if places else "which?"
            fail(f"{what} (pictures: {', '.join(pictures)})")
        words = [f"picture={places[0]}", *(_of_picture(word) for word in words)]
        if not any(word.startswith("data=") for word in words) and places[0] in DATA:
            words.insert(1, f"data={DATA[places[0]]}")
        words += [f"output_dir={_quoted(place)}" for place in places[1:]]
    return plain(parse_config(default="draw.yaml", argv=words, base="draw"))


def _read(
    argv: Sequence[str] | None, options: Mapping[str, Option], usage: str, *, places: int
) -> tuple[list[str], list[str]]:
    """Words that stand for themselves, and overrides with all other flags as they are."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(_help(options, usage))
    try:
        return _split(words, options, places)
    except UserError as error:
        fail(error)


def _split(
    words: list[str], options: Mapping[str, Option], places: int
) -> tuple[list[str], list[str]]:
    standing: list[str] = []
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        if name in options:
            value = inline or (words.pop(0) if words else "")
            if not value or value.startswith("--"):
                raise UserError(f"{name} needs a value: {options[name].help}")
            if name == "--model":
                rest += read_deit_arguments([name, value])[0]
            else:
                rest.append(f"{options[name].key}={_quoted(value)}")
        elif word.startswith(("-", "~")) or "=" in word:
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
        elif len(standing) < places:
            standing.append(word)
        else:
            rest.append(word)  # the parser behind this one says what is wrong with it
    return standing, rest


def _of_picture(word: str) -> str:
    """`style=capi` is `picture.style=capi`: a key that no config has is meant for the picture."""
    import yaml

    key = word.partition("=")[0]
    content = yaml.safe_load((CONFIGS / "draw.yaml").read_text())
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    ours = key.split(".")[0] in {*content, *groups} or "=" not in word or not key[:1].isalpha()
    return word if ours else f"picture.{word}"


def _quoted(value: str) -> str:
    """Text in the grammar of overrides."""
    return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def _help(options: Mapping[str, Option], usage: str) -> str:
    lines = [f"{sys.modules['__main__'].__doc__ or ''}", f"usage: {usage}", ""]
    lines.append("flags of this command (they come before those below of the same name):")
    lines += [f"  {name:<22} {option.help} ({option.key})" for name, option in options.items()]
    return "\n".join(lines) + "\n\nall other flags and keys:\n"

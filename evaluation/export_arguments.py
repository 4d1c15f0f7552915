"""The flags of experiments/export.py, as overrides of configs/export.yaml."""

import sys
from collections.abc import Sequence
from typing import Any

from evaluation.deit_arguments import TAKES_VALUE, Option
from utils.build import nearest, plain
from utils.config import CONFIGS, fail, parse_config
from utils.errors import UserError

OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights, or a run folder; every key must fit"),
    "--size": Option("size", "pixels a side; default: what the net was built for"),
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
    """The config an export's command line asks for; a mistake is one line and exit code 2.

    `backbone` is None where no model is named: then the weights must say what they are of.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(_help())
    try:
        words = read_export_arguments(argv)
        named = _names_a_model(words)
    except UserError as error:
        fail(error)
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


def read_export_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `OUTPUT [flags] [key=value ...]`; other flags pass as they are."""
    words, rest, folder = list(argv), [], ""
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        name = SAME.get(name, name)
        if name in OPTIONS:
            option = OPTIONS[name]
            value = inline or (words.pop(0) if words else "")
            if not value or value.startswith("--"):
                raise UserError(f"{name} needs a value: {option.help}")
            if name == "--model":
                rest += _backbone(value)
            else:
                rest.append(f"{option.key}={value if name == '--size' else _quoted(value)}")
        elif word.startswith("-") or "=" in word:
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
        elif folder:
            raise UserError(f"two output folders, {folder!r} and {word!r}; key=value sets a key")
        else:
            folder = word
    return [*rest, f"output_dir={_quoted(folder)}"] if folder else rest


def _backbone(name: str) -> list[str]:
    """Our config of that name, else timm's model or one in the hub's format."""
    if not (CONFIGS / "backbone" / f"{name}.yaml").is_file():
        import timm  # late: --help and our own models need none of it

        if ":" in name or timm.is_model(name.split(".")[0]):
            return ["backbone=timm", f"backbone.model_name={_quoted(name)}"]
    return [f"backbone={name}"]


def _names_a_model(words: Sequence[str]) -> bool:
    if any(word.startswith("backbone=") for word in words) or "--config-file" in words:
        return True
    below = next((word for word in words if word.lstrip("+").startswith("backbone.")), None)
    if below:
        raise UserError(f"{below} changes a net that is not named; give --model NAME too")
    return "--check" in words


def _check(config: dict[str, Any]) -> None:
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise UserError(
                f"unknown {key} {config[key]!r}{nearest(config[key], known)} ({', '.join(known)})"
            )
    if config["size"] is not None and (not isinstance(config["size"], int) or config["size"] < 1):
        raise UserError(f"size is a number of pixels, such as 224, not {config['size']!r}")
    if config["push"] and config["format"] != "hub":
        raise UserError("--push uploads the hub's format; add --format hub")


def _quoted(value: str) -> str:
    """Text in the grammar of overrides."""
    return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def _help() -> str:
    lines = [
        f"{sys.modules['__main__'].__doc__ or ''}",
        "usage: export.py OUTPUT [flags] [key=value ...]",
        "",
        "flags of the export (they come before those below of the same name):",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"  {name:<12} {option.help} ({option.key})")
    return "\n".join(lines) + "\n\nall other flags and keys:\n"

"""The flags of experiments/extract_features.py, as overrides of configs/extract.yaml."""

import sys
from collections.abc import Sequence
from typing import Any

from evaluation.deit_arguments import TAKES_VALUE, Option
from utils.build import plain
from utils.config import CONFIGS, fail, parse_config
from utils.errors import UserError

OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's"),
    "--weights": Option("weights", "file of weights; every key must fit"),
    "--data-path": Option("data.root", "folder of the images"),
    "--split": Option("split", "all (data=folder), train or val"),
    "--feature": Option("feature", "cls, cls_patchmean or patches"),
    "--layers": Option("layers", "blocks, -1 the last; several, as -2,-1, side by side"),
    "--dtype": Option("dtype", "float32 or float16, of the file"),
    "--precision": Option("precision", "of the net: fp32, bf16 or fp16"),
    "--batch-size": Option("batch_size", "images per process"),
    "--num-workers": Option("num_workers", "processes that read images"),
    "--overwrite": Option("overwrite", "replace features that are there", "true"),
}
SAME = {"--pretrained-weights": "--weights", "--batch": "--batch-size"}


def parse_extraction(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(_help())
    try:
        words = read_extraction_arguments(argv)
    except UserError as error:
        fail(error)
    return plain(parse_config(default="extract.yaml", argv=words, base="extract"))


def read_extraction_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `OUTPUT [flags] [key=value ...]`; other flags pass as they are."""
    words, rest, folder = list(argv), [], ""
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        name = SAME.get(name, name)
        if name in OPTIONS:
            option = OPTIONS[name]
            value = option.value or inline or (words.pop(0) if words else "")
            if not value or (option.value is None and value.startswith("--")):
                raise UserError(f"{name} needs a value: {option.help}")
            rest += _overrides(name, option.key, value)
        elif word.startswith(("-", "+", "~")) or "=" in word:
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
        elif folder:
            raise UserError(f"two output folders, {folder!r} and {word!r}; key=value sets a key")
        else:
            folder = word
    return [*rest, f"output_dir={_quoted(folder)}"] if folder else rest


def _overrides(name: str, key: str, value: str) -> list[str]:
    if name == "--model":
        if not (CONFIGS / "backbone" / f"{value}.yaml").is_file():
            import timm  # late: --help and our own models need none of it

            if timm.is_model(value.split(".")[0]):
                return ["backbone=timm", f"backbone.model_name={_quoted(value)}"]
        return [f"backbone={value}"]
    if name == "--layers":
        return [f"layers=[{value}]"]
    numeric = name in ("--batch-size", "--num-workers", "--overwrite")
    return [f"{key}={value if numeric else _quoted(value)}"]


def _quoted(value: str) -> str:
    """Text in the grammar of overrides."""
    return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def _help() -> str:
    lines = [
        f"{sys.modules['__main__'].__doc__ or ''}",
        "usage: extract_features.py OUTPUT [flags] [key=value ...]",
        "",
        "flags of the extraction (they come before those below of the same name):",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"  {name:<14} {option.help} ({option.key})")
    return "\n".join(lines) + "\n\nall other flags and keys:\n"

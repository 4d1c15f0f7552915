"""The flags of the comparison of costs, as overrides of configs/complexity.yaml."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    files_beside,
    help_page,
    meanings,
    quoted,
    read_command,
    read_words,
)
from utils.config.compose import parse_config
from utils.config.files import CONFIGS
from utils.errors import UserError, fail, one_line
from utils.nearest import nearest

CONFIG = "complexity.yaml"


OPTIONS = {
    "--models": Option("models", "names of ours or of timm's, with commas between; all: all ours"),
    "--table": Option("table", "a published cost table instead, row by row: token_reduction"),
    "--rows": Option("rows", "of the table: names of methods or models, with commas between"),
    "--counts": Option("counts", "of the table, what depends on the weights: all, none or auto"),
    "--amp": Option("amp", "autocast to bfloat16", "true"),
    "--compile": Option("compile", "torch.compile of each block, as in training", "true"),
    "--graphs": Option("graphs", "replay each step as a CUDA graph", "true"),
    "--batch-size": Option("batch_size", "images of a step", text=False),
    "--size": Option("size", "pixels a side; without it, each net's own", text=False),
    "--steps": Option("steps", "timed steps of each net", text=False),
    "--warmup": Option("warmup", "steps before them", text=False),
    "--rounds": Option("rounds", "of turns that the timed steps are dealt out over", text=False),
    "--no-training": Option("passes", "time no training step", "[inference]"),
    "--no-inference": Option("passes", "time no inference", "['training step']"),
    "--check": Option("passes", "count parameters and multiply-adds, time nothing", "[]"),
    "--threads": Option("threads", "of a CPU", text=False),
    "--operators": Option("operators", "count the operators that run, views aside", "true"),
    "--fvcore": Option("fvcore", "count by fvcore too, and say what it counts besides", "true"),
    "--json": Option("json_file", "file for all figures with their protocol"),
    "--picture": Option("picture_file", "file for a picture: .png, .pdf or .svg"),
    "--picture-y": Option("picture_y", "what it shows over multiply-adds: throughput, accuracy"),
}


def parse_complexity(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config a command line asks for; a mistake prints one line, exit code 2."""
    words = read_command(argv, read_complexity_arguments, page=help_page(meanings(OPTIONS)))
    config = plain(parse_config(default=CONFIG, argv=words, base="complexity"))
    try:
        _check_names(config)
        files = files_beside(words, "backbone")
        own = {name: _read(files[name]) for name in config["models"] if name in files}
    except UserError as error:
        fail(error)
    keywords = config["keywords"] or {}
    for name, node in own.items():
        keywords = {**keywords, name: {**node, **(keywords.get(name) or {})}}
    return {**config, "keywords": keywords}


def _check_names(config: Mapping[str, Any]) -> None:
    """UserError for nets that have no names, and for what is said of a net in another form."""
    models = config["models"]
    if not models or not all(isinstance(name, str) for name in models):
        raise UserError(f"models must be a list of names of nets, not {models!r}")
    for name, twin in config["twins"].items():
        if not isinstance(twin, str | None):
            raise UserError(f"twins.{name} must be the name of a net, or null, not {twin!r}")
    for name, keywords in (config["keywords"] or {}).items():
        if not isinstance(keywords, Mapping | None):
            raise UserError(f"keywords.{name} must be a mapping, or null, not {keywords!r}")


def _read(file: Path) -> dict[str, Any]:
    try:
        node = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: bad YAML: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{file} has no _target_, so it describes no net")
    return node


def read_complexity_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `[flags] [key=value ...]`; other flags pass as they are."""
    words = read_words(argv, OPTIONS, spell=_spell).overrides
    passes = list(dict.fromkeys(word for word in words if word.startswith("passes=")))
    others = [word for word in words if not word.startswith("passes=")]
    # Neither pass, by both flags, is a count alone.
    return others + (["passes=[]"] if len(passes) > 1 else passes)


def _spell(name: str, value: str, words: Sequence[str]) -> list[str] | None:
    if name == "--table":
        known = sorted(path.stem for path in (CONFIGS / "table").glob("*.yaml"))
        if value not in known:
            raise UserError(
                f"no published table {value!r}{nearest(value, known)} ({', '.join(known)})"
            )
        return [f"table={value}"]
    if name != "--models":
        return None
    names = [model.strip() for model in value.split(",") if model.strip()]
    if not names:
        raise UserError("--models needs names, with commas between them")
    return [f"models=[{','.join(map(quoted, names))}]"]

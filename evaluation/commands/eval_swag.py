"""The flags of `imagenet_1k_eval.py` (Expedit-SWAG), as overrides of configs/eval/swag.yaml.

Departs from Expedit-SWAG: the resolution is the model's own unless -r is given, EViT's blocks are
those of the model's size unless --drop_loc is given, truth values are parsed, and a flag that the
model does not read is refused; there, each of these silently changed the result or crashed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.build import plain
from utils.config.check import networks
from utils.config.command_line import (
    Option,
    Takes,
    help_page,
    meanings,
    quoted,
    read_command,
    read_words,
    refuse_unknown_flags,
    sorted_words,
    tell,
)
from utils.config.compose import parse_config
from utils.errors import UserError, fail
from utils.nearest import nearest
from utils.online_weights import is_address

CONFIG = "eval/swag.yaml"
IMAGENET = "utils.data.imagenet.ImageNetTree"  # of DIR, unless it has img_val
USAGE = "eval_swag.py -m MODEL [flags of its method] [--weights FILE] [flags] [key=value ...] DIR"


class Size(NamedTuple):
    """The size of a model, to check a command line before the model is built."""

    depth: int
    patch: int
    pixels: int


SIZES = {
    "vit_b16_in1k": Size(12, 16, 384),
    "vit_l16_in1k": Size(24, 16, 512),
    "vit_h14_in1k": Size(32, 14, 518),
}
# Prefix of the model's name -> the method of `baselines.token_reduction.presets`.
PREFIXES = {
    **{"hourglass_": "hourglass", "tome_": "tome", "e_": "evit", "act_": "act"},
    **{"smyrf_": "smyrf", "ats_": "ats", "evo_": "evo_vit"},
}
MODELS = [prefix + size for prefix in ("", *PREFIXES) for size in SIZES]


def whole(text: str) -> int:
    """A whole number."""
    return int(text)


def number(text: str) -> float:
    """A number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def truth(text: str) -> bool:
    """True or false."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return words[text.lower()]


class Own(NamedTuple):
    """A flag of one method: the reducer's keyword, the parser of its values, and its help."""

    method: str
    key: str
    read: Callable[[str], Any]
    help: str
    many: bool = False
    switch: bool = False


OWN = {
    "--clustering_location": Own("hourglass", "location", whole, "block before which to cluster"),
    "--num_cluster": Own("hourglass", "num_clusters", whole, "clusters, a square number"),
    "--cluster_iters": Own("hourglass", "iterations", whole, "steps of the clustering (5)"),
    "--cluster_temperture": Own("hourglass", "temperature", number, "of its softmax (1.0)"),
    "--cluster_window_size": Own("hourglass", "window", whole, "of its candidates, odd (5)"),
    "--tome_r": Own("tome", "r", whole, "tokens merged in each block"),
    "--base_keep_rate": Own("evit", "keep_rate", number, "share of patches kept each time (0.7)"),
    "--drop_loc": Own("evit", "locations", whole, "blocks that drop (3; by the size)", many=True),
    "--fuse_token": Own("evit", "fuse_token", truth, "keep the dropped as one", switch=True),
    "--act_plug_in_index": Own("act", "start", whole, "first block with it (0)"),
    "--act_plug_out_index": Own("act", "stop", whole, "block behind the last; -1: the end"),
    "--act_group_q": Own("act", "group_queries", truth, "cluster queries (True)"),
    "--act_group_k": Own("act", "group_keys", truth, "cluster keys (False)"),
    "--act_q_hashes": Own("act", "query_hashes", whole, "hashes of queries (32)"),
    "--act_k_hashes": Own("act", "key_hashes", whole, "hashes of keys (32)"),
    "--smyrf_plug_in_index": Own("smyrf", "start", whole, "first block with it (0)"),
    "--smyrf_plug_out_index": Own("smyrf", "stop", whole, "block behind the last; -1: the end"),
    "--smyrf_n_hashes": Own("smyrf", "num_hashes", whole, "rounds (32)"),
    "--smyrf_q_cluster_size": Own("smyrf", "query_cluster_size", whole, "queries of a chunk (64)"),
    "--smyrf_k_cluster_size": Own("smyrf", "key_cluster_size", whole, "keys of a chunk (64)"),
    "--ats_blocks_indexes": Own("ats", "locations", whole, "blocks that sample", many=True),
    "--ats_num_tokens": Own("ats", "num_samples", whole, "samples (as many as patches)"),
    "--ats_drop_tokens": Own("ats", "drop_tokens", truth, "shorten the sequence", switch=True),
    "--evo_prune_ratio": Own("evo_vit", "keep_rate", number, "share that is KEPT (0.5)"),
    "--evo_prune_location": Own("evo_vit", "location", whole, "first block that selects"),
}
OPTIONS = {
    "--weights": Option("weights", "file of SWAG's or torchvision's, or a run folder"),
    "--batch-size": Option("probes.accuracy.batch_size", "images per process (200)", text=False),
    "--workers": Option("probes.accuracy.num_workers", "processes that read (4)", text=False),
}
SAME = {
    **{"-b": "--batch-size", "--batch_size": "--batch-size", "-j": "--workers"},
    **{"--eval": "--weights", "--pretrained-weights": "--weights"},
}
SHORT = {"-l": "--clustering_location", "-n": "--num_cluster", "-m": "--model"}
SHORT |= {"-r": "--resolution", "-p": "--print-freq"}
TAKEN = {
    "--model": f"{', '.join(SIZES)}; before it {', '.join(PREFIXES)} for a method (vit_b16_in1k)",
    "--resolution": "side of the images; the model's own where it is not given",
    "--form": "published (as measured) or sound (faults mended); published where not given",
}
# What a sweep may list: `--tome_r 10,20`.
LISTS = {name: option.key for name, option in OPTIONS.items()} | {
    name: name.lstrip("-")
    for name in (*TAKEN, *(name for name, own in OWN.items() if not (own.many or own.switch)))
}
LISTS |= {same: LISTS[name] for same, name in (SAME | SHORT).items() if name in LISTS}
IGNORED = {
    "--print-freq": "progress shows itself",
    "--world-size": "processes come from torchrun or Slurm",
    "--rank": "processes come from torchrun or Slurm",
    "--dist-url": "processes come from torchrun or Slurm",
    "--dist-backend": "processes come from torchrun or Slurm",
    "--gpu": "device=cuda:N chooses one",
}
WITHOUT_VALUE = {"--multiprocessing-distributed": "processes come from torchrun or Slurm"}


def parse_swag_evaluation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake prints one line, exit code 2."""
    own = {name: f"{flag.method}: {flag.help}" for name, flag in OWN.items()}
    rows = TAKEN | meanings(OPTIONS, IGNORED | WITHOUT_VALUE) | own
    short = {name: f"{word}, " for word, name in {**SAME, **SHORT}.items() if word[1] != "-"}
    page = help_page({short.get(name, "") + name: rows[name] for name in rows}, usage=USAGE)
    words, notes = read_command(argv, read_swag_arguments, page=page)

    def look(config: Mapping[str, Any]) -> list[str]:
        _check_folder(config)
        return notes

    config = plain(parse_config(default=CONFIG, argv=words, base="evaluate", further=look))
    try:
        _check_net(config)
        _check_folder(config)
    except UserError as error:
        fail(error)
    tell(notes)
    return config


def _check_net(config: Mapping[str, Any]) -> None:
    """UserError for options that the net refuses, and for a file of weights that is not there.

    So they are said before images are looked for; the net is built on the meta device.
    """
    from evaluation.nets import weights_file  # late: it imports torch

    networks(dict(config))
    weights = None if is_address(config["weights"]) else weights_file(config["weights"])
    if weights and not Path(weights).is_file():
        raise UserError(f"--weights: there is no {weights}")


def _check_folder(config: Mapping[str, Any]) -> None:
    """UserError for a folder of images that is here and holds neither spelling of the split."""
    images = config["data"].get("val") or {}
    if images.get("_target_") != IMAGENET or not images.get("root"):
        return
    root = Path(images["root"]).expanduser()
    tried = [root / "img_val", root / "val"]
    if root.is_dir() and not any(folder.is_dir() for folder in tried):
        raise UserError(f"there are no images to judge: neither {tried[0]} nor {tried[1]}")


def with_model_spelt_out(argv: Sequence[str]) -> list[str]:
    """Replace -m by --model, because every other experiment reads -m as --multirun."""
    return ["--model" if word == "-m" else word for word in argv]


def read_swag_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides for `[flags] [key=value ...] [DIR]`, and notes; flags of all scripts pass."""
    refuse_unknown_flags(argv, (*TAKEN, *OPTIONS, *SAME, *OWN, *IGNORED, *WITHOUT_VALUE))
    taken, rest, notes = _take(argv)
    found = read_words(rest, OPTIONS, same=SAME, ignored=WITHOUT_VALUE, num_places=len(argv))
    model = str(taken.pop("--model", ["vit_b16_in1k"])[0])
    pixels = taken.pop("--resolution", None)
    form = str(taken.pop("--form", ["published"])[0])
    words = _model_words(model, pixels[0] if pixels else None, form, taken)
    return [*words, *_data_words(found.places), *found.overrides], notes + found.notes


def _take(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Split a command line: flags that are no plain aliases, with their values; the rest; notes."""
    taken, rest, notes = dict[str, list[str]](), list[str](), list[str]()
    takes: dict[str, Takes] = dict.fromkeys((*TAKEN, *IGNORED), 1)
    for name, own in OWN.items():
        takes[name] = None if own.switch else _is_whole if own.many else 1
    told = TAKEN | {name: own.help for name, own in OWN.items()}
    for name, values in sorted_words(argv, takes, same=SAME | SHORT, told=told):
        if name in IGNORED:
            notes.append(f"{name} has no effect: {IGNORED[name]}")
        elif name:
            taken[name] = values or ["true"]
        else:
            rest += values
    return taken, rest, notes


def _model_words(
    model: str, pixels: str | None, form: str, given: Mapping[str, list[str]]
) -> list[str]:
    """Overrides for the backbone: SWAG's own, or one with a method around it."""
    if model not in MODELS:
        raise UserError(
            f"-m {model}: no such model{nearest(model, MODELS)} (known: {', '.join(SIZES)}, and "
            f"{', '.join(PREFIXES)} before them)"
        )
    prefix = next((prefix for prefix in PREFIXES if model.startswith(prefix)), "")
    method, base = PREFIXES.get(prefix), model.removeprefix(prefix)
    size = SIZES[base]
    side = size.pixels if pixels is None else _resolution(pixels, size, base)
    options = _options(model, method, given)
    if form not in ("published", "sound"):
        raise UserError(f"--form is published or sound, not {form!r}")
    _check(model, method, options, size, side // size.patch)
    words = [f"probes.accuracy.input_size={side}"]
    if method is None:
        return [f"backbone=swag_{base}", f"backbone.img_size={side}", *words]
    inner = "backbone.backbone"
    return [
        *("backbone=reduced", f"{inner}._target_=baselines.token_reduction.swag.swag_{base}"),
        f"+{inner}.img_size={side}",
        *(f"backbone.method={method}", f"backbone.form={form}"),
        *(f"+backbone.options.{key}={json.dumps(value)}" for key, value in options.items()),
        *words,
    ]


def _options(model: str, method: str | None, given: Mapping[str, list[str]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, words in given.items():
        own = OWN[name]
        if own.method != method:
            raise UserError(f"{name} is a flag of {own.method}, which -m {model} does not use")
        try:
            values = [own.read(word) for word in words]
        except (ValueError, KeyError):
            kind = (own.read.__doc__ or "").rstrip(".").lower()
            raise UserError(f"{name} must be {kind}, got {' '.join(words)!r}") from None
        options[own.key] = values if own.many else values[0]
    if options.get("stop") == -1:
        del options["stop"]
    if method == "ats":
        # As published: the sequence is shortened only if the switch is given.
        options.setdefault("drop_tokens", False)
    return options


def _check(
    model: str, method: str | None, options: Mapping[str, Any], size: Size, side: int
) -> None:
    """UserError for options that the published code accepted silently, or that crashed it late."""
    needed = {"hourglass": ("location", "num_clusters"), "tome": ("r",), "ats": ("locations",)}
    flags = {(own.method, own.key): name for name, own in OWN.items()}
    for key in needed.get(method or "", ()):
        if key not in options:
            raise UserError(f"-m {model} needs {flags[method or '', key]}")
    if method == "hourglass":
        _check_clusters(options["num_clusters"], side)
    for key in ("location", "locations", "start"):
        blocks = options.get(key, [])
        for block in blocks if isinstance(blocks, list) else [blocks]:
            if not 0 <= block < size.depth:
                raise UserError(
                    f"{flags[method or '', key]} {block}: {model} has blocks 0 to {size.depth - 1}"
                )


def _check_clusters(count: int, side: int) -> None:
    root = math.isqrt(max(count, 0))
    if count < 1 or root * root != count:
        near = sorted({max(1, root) ** 2, (root + 1) ** 2})
        raise UserError(
            f"--num_cluster {count} is no square number, near it are {' and '.join(map(str, near))}"
        )
    if root > side:
        raise UserError(f"--num_cluster {count} is more than the {side * side} patches")


def _resolution(text: str, size: Size, base: str) -> int:
    if not _is_whole(text) or int(text) < size.patch or int(text) % size.patch:
        raise UserError(
            f"--resolution {text} is no multiple of the patch {size.patch} of {base}; its own "
            f"images have {size.pixels} pixels a side"
        )
    return int(text)


def _data_words(places: Sequence[str]) -> list[str]:
    """Overrides for DIR: its img_val, as published, or else DIR as an ImageNet tree with val."""
    if not places:
        return []
    if len(places) > 1:
        raise UserError(f"one folder of images, not {' and '.join(map(repr, places))}")
    published = Path(places[0]) / "img_val"
    if not published.is_dir():
        return [f"data.root={quoted(places[0])}"]
    root = quoted(str(published))
    return ["data=folder", f"data.root={root}", f"data.val_root={root}"]


def _is_whole(word: str) -> bool:
    return word.lstrip("-").isdecimal()

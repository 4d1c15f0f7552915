"""The flags of DeiT's evaluation, as overrides of configs/eval/deit.yaml."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    backbone_words,
    folder_of_model,
    help_page,
    meanings,
    names_backbone,
    read_command,
    read_words,
    tell,
)
from utils.config.compose import parse_config
from utils.config.deit_flags import (
    CATEGORY,
    DATA_SETS,
    NO_EFFECT,
    SPECTRUM,
    is_packed,
    lacks_spectrum,
)
from utils.config.deit_flags import OPTIONS as OF_TRAINING
from utils.errors import UserError, fail
from utils.nearest import nearest

CONFIG = "eval/deit.yaml"


OPTIONS = {
    "--model": Option("backbone", "any registered model of ours or of timm's; the one of --eval"),
    "--eval": Option("weights", "file of weights, or a run folder; every key must fit"),
    "--data-path": Option("data.root", "folder of the images: ImageNet, unless data=... says what"),
    "--data-set": Option("data", "DeiT's or DHVT's word: IMNET, CIFAR, INAT, clipart, ..."),
    "--input-size": Option(
        "probes.accuracy.input_size", "side of the images; the net's own", text=False
    ),
    "--eval-crop-ratio": Option(
        "probes.accuracy.eval_crop_ratio", "of the central crop", text=False
    ),
    "--batch-size": Option("probes.accuracy.batch_size", "images per process", text=False),
    "--num-workers": Option(
        "probes.accuracy.num_workers", "processes that read images", text=False
    ),
    "--precision": Option("probes.accuracy.precision", "of the net: fp32, bf16 or fp16"),
    "--use-amp": Option("probes.accuracy.precision", "as --precision fp16", "fp16"),
    "--no-use-amp": Option("probes.accuracy.precision", "as --precision fp32", "fp32"),
    **{name: OF_TRAINING[name] for name in (CATEGORY, SPECTRUM, "--attn-mixer")},
    "--rot-eval": Option("probes.accuracy.rot_eval", "images turned at random", "true"),
    "--flop-eval": Option("probes.accuracy.flop_eval", "images mirrored", "true"),
    "--symmetries": Option("probes.accuracy.symmetries", "table of all eight symmetries", "true"),
    "--test-speed": Option("+probe@probes.throughput", "images per second too", "throughput"),
    "--only-test-speed": Option("+probe@probes.throughput", "nothing else", "throughput"),
    "--visualize-mask": Option(
        "+probe@probes.token_mask", "pictures of the patches that EViT keeps", "token_mask"
    ),
    "--n-visualization": Option("probes.token_mask.num_images", "of how many images", text=False),
}
SAME = {
    **{"--data_path": "--data-path", "--batch": "--batch-size", "--num_workers": "--num-workers"},
    **dict.fromkeys(("--weights", "--pretrained-weights", "--resume"), "--eval"),
    **{"--test_speed": "--test-speed", "--only_test_speed": "--only-test-speed"},
    **{"--visualize_mask": "--visualize-mask", "--n_visualization": "--n-visualization"},
}
# What a sweep may list: `--eval a.pth,b.pth`.
LISTS = {name: option.key for name, option in OPTIONS.items() if option.value is None}
LISTS |= {name: LISTS[same] for name, same in SAME.items() if same in LISTS}
# DeiT and related code train and evaluate by one command; these of its flags change no figure.
SWITCHES = {
    name: NO_EFFECT[name][1]
    for name in (
        *("--dist-eval", "--pin-mem", "--no-pin-mem", "--fused-attn", "--no-fused-attn"),
        *("--no-symmetrized-asym-feats", "--no-attn-mixer", "--no-zip-dataloader"),
    )
} | {
    "--compile": "judging compiles nothing",
    "--high-precision-matmul": "--precision says in what the net computes",
}


def parse_deit_evaluation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake prints one line, exit code 2."""
    page = help_page(meanings(OPTIONS, SWITCHES))
    words, notes = read_command(argv, read_deit_arguments, page=page)
    # If several models are evaluated in a row, none overwrites the results of another.
    words = [*folder_of_model(words, "eval_deit"), *words]
    config = plain(
        parse_config(default=CONFIG, argv=words, base="evaluate", further=lambda _: notes)
    )
    if "accuracy" not in (config["probes"] or {}):  # null where only speed is asked for
        fail("the run file has no probes.accuracy: its `defaults` must begin with /eval/deit")
    tell(notes)
    return config | {"backbone_named": names_backbone(words, CONFIG)}


def read_deit_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides for `[flags] [key=value ...]`, and notes; other flags pass as they are."""
    found = read_words(_named_once(argv), OPTIONS, same=SAME, ignored=SWITCHES, spell=_spell)
    # --test-speed and --only-test-speed together give the same probe only once.
    words = dict.fromkeys(found.overrides)
    if is_packed(words):
        words.pop("data=imagenet", None)
    model = next((word[len("backbone=") :] for word in words if word.startswith("backbone=")), "")
    if SPECTRUM in argv and model and (lacking := lacks_spectrum(model)):
        words.pop(f"{OPTIONS[SPECTRUM].key}={OPTIONS[SPECTRUM].value}")
        found.notes.append(f"{SPECTRUM} has no effect{lacking}")
    return list(words), found.notes


def _named_once(argv: Sequence[str]) -> list[str]:
    """The words without the bare --eval that goes with DeiT's --resume FILE."""
    resumed = any(word.partition("=")[0] == "--resume" for word in argv)
    return [
        word
        for word, after in pairwise([*argv, "--"])
        if not (resumed and word == "--eval" and (after.startswith("--") or "=" in after))
    ]


def _spell(name: str, value: str, words: Sequence[str]) -> list[str] | None:
    if name == "--model":
        return backbone_words(value, words)
    if name == "--only-test-speed":
        return [f"{OPTIONS[name].key}={value}", "probes.accuracy=null"]
    if name == "--data-set":
        if value not in DATA_SETS:
            known = ", ".join(DATA_SETS)
            raise UserError(f"unknown --data-set {value!r}{nearest(value, DATA_SETS)} ({known})")
        return DATA_SETS[value]
    return None

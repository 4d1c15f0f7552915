"""The flags of the post-hoc experiment, the published script's among them, as overrides."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.config.build import plain
from utils.config.command_line import (
    Option,
    backbone_words,
    help_page,
    meanings,
    quoted,
    read_command,
    read_words,
)
from utils.config.compose import parse_config
from utils.errors import UserError

CONFIG = "posthoc.yaml"
ROTATIONS, FLIPS = "n_rotations", "flips"

OPTIONS = {
    "--model": Option("backbone", "the classifier: any registered model of ours or of timm's"),
    "--weights": Option("weights", "its weights: a file, or a run folder; every key must fit"),
    "--aggregators": Option("aggregators", "names with commas between; all of them by default"),
    "--group": Option("wrapper.group", "D4, C4, mirror, C8, D8, ..."),
    "--trained": Option("trained", "none, head or all; learned aggregators train in any case"),
    "--n_rotations": Option(ROTATIONS, "rotations of the group (published; 4)", text=False),
    "--flips": Option(FLIPS, "and their mirror images (published)", "true"),
    "--finetune_model": Option("trained", "train all of it (published)", "all"),
    "--finetune_mlp_head": Option("trained", "train the head (published)", "head"),
    "--pcam": Option("data", "PatchCamelyon and its small ViT (published)", "pcam"),
    "--only_3_and_8": Option("classes", "digits 3 and 8 alone (published)", "[3,8]"),
    "--less_data": Option("data_share", "a tenth of the training images (published)", "0.1"),
    "--epochs": Option("training.epochs", "of each training", text=False),
    "--lr": Option("training.lr", "learning rate", text=False),
    "--batch-size": Option("batch_size", "images per pass of the classifier", text=False),
}
SAME = {"--model_path": "--weights", "--eval": "--weights", "--n-rotations": "--n_rotations"}


def parse_posthoc(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config the experiment's command line asks for; a mistake prints one line, exit code 2."""
    published = {"--model_path": "the same as --weights (published)"}
    page = help_page(meanings(OPTIONS) | published)
    words = read_command(argv, read_posthoc_arguments, page=page)
    return plain(parse_config(default=CONFIG, argv=words, base="posthoc", further=_check))


def _check(config: Mapping[str, Any]) -> None:
    """UserError for what the run would refuse of its wrapper, aggregators and training."""
    from evaluation.wrapped import check_wrapped  # late: it imports torch

    check_wrapped(config["backbone"], config)


def read_posthoc_arguments(argv: Sequence[str]) -> list[str]:
    """Overrides for `[flags] [key=value ...]`; other flags pass as they are."""
    words = read_words(argv, OPTIONS, same=SAME, spell=_spell).overrides
    pairs = [word.partition("=")[::2] for word in words]
    turns = [value for key, value in pairs if key == ROTATIONS]
    flips = any(key == FLIPS for key, _ in pairs)
    words = [word for word in words if word.partition("=")[0] not in (ROTATIONS, FLIPS)]
    if turns or flips:
        group = next((value for key, value in pairs if key == "wrapper.group"), None)
        if group:
            flag, group = f"--n_rotations {turns[-1]}" if turns else "--flips", group.strip("'")
            raise UserError(f"--group {group} and {flag} both say which group: give one of them")
        words.append(f"wrapper.group={'D' if flips else 'C'}{turns[-1] if turns else 4}")
    return words


def _spell(name: str, value: str, words: Sequence[str]) -> list[str] | None:
    if name == "--model":
        return backbone_words(value, words)
    if name == "--aggregators":
        names = [word.strip() for word in value.split(",") if word.strip()]
        return [f"aggregators=[{','.join(map(quoted, names))}]"]
    return ["backbone=posthoc_vit_pcam", "data=pcam"] if name == "--pcam" else None

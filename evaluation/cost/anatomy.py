"""What experiments/anatomy.py runs: the parts of a net's speed, each by its module."""

import argparse

import torch

from evaluation.cost import block_times, blocks, growth, roofline
from evaluation.cost.settings import PICTURES, choose_device, whole_numbers
from utils.errors import UserError
from utils.joining import check_device
from utils.ranges import check_count

BLOCKS = "hybrid_deit_small_patch16,hybrid_deit_base_patch16,hybrid_deit_large_patch16"
PAIR = "hybrid_deit_small_patch16,deit_small_patch16_LS"


def show(words: argparse.Namespace) -> None:
    """Print what a command line (`evaluation.commands.anatomy`) asks for."""
    given = vars(words)
    for flag in ("threads", "batch_size", "size", "steps"):
        if given.get(flag) is not None:
            check_count(f"--{flag.replace('_', '-')}", given[flag], 1)
    for path in filter(None, (given.get("json"), given.get("picture"))):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file")
    if words.what == "roofline":
        roofline.show(words.chip, words.batch_size)
    elif words.what == "blocks":
        names = (words.models or BLOCKS).split(",")
        blocks.measure(names, size=words.size, bf16=not words.float32, kernels=words.kernels)
    elif words.what == "times":
        names = (words.models or BLOCKS).split(",")
        block_times.measure(
            names,
            size=words.size,
            batch=words.batch_size,
            listed=words.kernels,
            json_file=words.json,
        )
    else:
        _growth(words)


def _growth(words: argparse.Namespace) -> None:
    if words.picture and words.picture.suffix not in PICTURES:
        raise UserError(f"--picture {words.picture} must end in {', '.join(PICTURES)}")
    if words.threads is not None:
        torch.set_num_threads(words.threads)
    names = (words.models or PAIR).split(",")
    if len(names) != 2:
        raise UserError(f"--models takes an octic net and its plain twin, not {words.models!r}")
    lists = {
        "size": ("--sizes", words.sizes),
        "batch": ("--batches", words.batches),
        "depth": ("--depths", words.depths),
    }
    varied = {name: whole_numbers(*given) for name, given in lists.items() if given[1]}
    if not varied:
        raise UserError("--sizes, --batches and --depths are all empty: nothing would be measured")
    base = growth.Point(words.size, words.batch_size)
    growth.show(
        *names,
        varied=varied,
        device=_device(words.device),
        base=base,
        steps=words.steps,
        json_file=words.json,
        picture_file=words.picture,
    )


def _device(asked: str) -> str:
    name, on_gpu = choose_device(asked), torch.cuda.is_available()
    if name == "mps":
        return name
    check_device(name)
    if name == "auto":
        return "cuda" if on_gpu else "cpu"
    if name != "cpu" and not on_gpu:
        raise UserError(f"--device {name}, but torch sees no GPU here")
    return name

"""What experiments/anatomy.py runs: the parts of a net's speed, each by its module."""

import argparse
import sys

import torch

from evaluation.cost import block_times, blocks, growth, roofline
from evaluation.cost.settings import whole_numbers
from utils.errors import UserError, fail

BLOCKS = "hybrid_deit_small_patch16,hybrid_deit_base_patch16,hybrid_deit_large_patch16"
PAIR = "hybrid_deit_small_patch16,deit_small_patch16_LS"


def show(words: argparse.Namespace) -> None:
    """Print what a command line (`evaluation.commands.anatomy`) asks for."""
    try:
        _show(words)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _show(words: argparse.Namespace) -> None:
    if words.threads is not None:
        if words.threads < 1:
            raise UserError("--threads must be at least 1")
        torch.set_num_threads(words.threads)
    for path in filter(None, (words.json, words.picture)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    batch = 64 if words.batch_size is None else words.batch_size
    if words.what == "roofline":
        roofline.show(words.chip, batch)
    elif words.what == "blocks":
        names = (words.models or BLOCKS).split(",")
        blocks.measure(names, size=words.size, bf16=not words.float32, kernels=words.kernels)
    elif words.what == "times":
        names = (words.models or BLOCKS).split(",")
        block_times.measure(
            names, size=words.size, batch=batch, listed=words.kernels, json_file=words.json
        )
    else:
        _growth(words)


def _growth(words: argparse.Namespace) -> None:
    names = (words.models or PAIR).split(",")
    if len(names) != 2:
        raise UserError(f"--models takes an octic net and its plain twin, not {words.models!r}")
    device = words.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lists = {
        "size": ("--sizes", words.sizes),
        "batch": ("--batches", words.batches),
        "depth": ("--depths", words.depths),
    }
    varied = {name: whole_numbers(*given) for name, given in lists.items() if given[1]}
    base = growth.Point(words.size, 1 if words.batch_size is None else words.batch_size)
    growth.show(
        *names,
        varied=varied,
        device=device,
        base=base,
        steps=words.steps,
        json_file=words.json,
        picture_file=words.picture,
    )

"""The flags of every experiment script: each is another name for one config key."""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

from utils.command import Parser
from utils.config.files import CONFIGS
from utils.errors import UserError
from utils.nearest import nearest


class Flag(NamedTuple):
    """Names, config key, help, and the kind of the value (None: a switch that sets `value`)."""

    names: tuple[str, ...]
    key: str
    help: str
    kind: Callable[[str], Any] | None = str
    value: Any = True
    submits: bool = False  # asks for a cluster: chooses launcher=slurm unless a launcher is named


def slurm_minutes(text: str) -> int:
    """Minutes of a time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Seconds round up; ValueError for another text.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise ValueError(text)
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return 1440 * int(days or 0) + 60 * hours + minutes + bool(seconds)


# A key without a dot is a config group or a plain value; the composed config tells which.
FLAGS = (
    Flag(("--model",), "backbone", "the backbone's config, as backbone=X"),
    Flag(("--data",), "data", "the data's config, as data=X"),
    Flag(
        ("--weights", "--pretrained-weights", "--finetune"),
        "training.weights",
        "start from the weights of this file, address or run folder",
        expanduser,
    ),
    Flag(
        ("--batch-size", "--batch"),
        "recipe.batch_size_per_gpu",
        "images per GPU and micro-batch",
        int,
    ),
    Flag(("--accumulation",), "recipe.accumulation", "micro-batches per step", int),
    Flag(("--epochs",), "recipe.epochs", "length of the training", int),
    Flag(("--drop-path",), "recipe.drop_path_rate", "stochastic depth", float),
    Flag(("--lr",), "recipe.schedules.lr", "highest learning rate", float),
    Flag(("--min-lr",), "recipe.schedules.min_lr", "last learning rate", float),
    Flag(("--warmup-lr",), "recipe.schedules.warmup_lr", "first learning rate (DeiT)", float),
    Flag(("--warmup-epochs",), "recipe.schedules.warmup_epochs", "length of the warm-up", float),
    Flag(("--weight-decay",), "recipe.schedules.weight_decay", "weight decay (DeiT)", float),
    Flag(("--opt",), "optimizer._target_", "the optimiser's class, e.g. torch.optim.AdamW"),
    Flag(("--opt-eps",), "optimizer.eps", "epsilon of the optimiser", float),
    Flag(("--clip-grad",), "training.clip_grad", "largest gradient norm of each part", float),
    Flag(("--input-size",), "recipe.augmentation.input_size", "pixels a side (DeiT)", int),
    Flag(("--color-jitter",), "recipe.augmentation.color_jitter", "strength (DeiT)", float),
    Flag(("--src",), "recipe.augmentation.crop", "simple random crop (DeiT)", None, "simple"),
    Flag(("--mixup",), "recipe.mixing.mixup", "Beta parameter of mixup (DeiT)", float),
    Flag(("--cutmix",), "recipe.mixing.cutmix", "Beta parameter of CutMix (DeiT)", float),
    Flag(("--smoothing",), "recipe.smoothing", "of labels, with recipe.loss=ce (DeiT)", float),
    Flag(("--bce-loss",), "recipe.loss", "a sigmoid per class (DeiT)", None, "bce"),
    Flag(("--cosub",), "recipe.cosub", "two subnetworks teach each other (DeiT)", None, True),
    Flag(("--repeated-aug",), "recipe.sampler", "(DeiT)", None, "repeated_augmentation"),
    Flag(("--no-repeated-aug",), "recipe.sampler", "each image once", None, "shuffled"),
    Flag(("--attn-only",), "recipe.trainable", "train attention alone (DeiT)", None, "attention"),
    Flag(("--model-ema-decay",), "recipe.ema_decay", "of the average; 0: none (DeiT)", float),
    Flag(("--no-train-mode",), "recipe.train_mode", "fine-tune in eval mode (DeiT)", None, False),
    Flag(
        ("--fuse-token", "--fuse_token"),
        "backbone.fuse_token",
        "dropped tokens become one (EViT)",
        None,
    ),
    Flag(
        ("--base-keep-rate", "--base_keep_rate"),
        "backbone.base_keep_rate",
        "share of the tokens that is kept (EViT)",
        float,
    ),
    Flag(
        ("--drop-loc", "--drop_loc"),
        "backbone.drop_loc",
        "blocks that drop tokens, like '(3, 6, 9)' (EViT)",
    ),
    Flag(
        ("--shrink-start-epoch", "--shrink_start_epoch"),
        "backbone.shrink_start_epoch",
        "epochs at a keep rate of 1 (EViT)",
        float,
    ),
    Flag(
        ("--shrink-epochs", "--shrink_epochs"),
        "backbone.shrink_epochs",
        "in which the keep rate then falls (EViT)",
        float,
    ),
    Flag(("--use-lmdb", "--use_lmdb"), "data", "train.lmdb and val.lmdb", None, "lmdb"),
    Flag(("--data-path",), "data.root", "folder of the images", expanduser),
    Flag(("--max-steps",), "training.max_steps", "stop after this many steps", int),
    Flag(("--seed",), "seed", "seed of everything random", int),
    Flag(("--precision",), "training.precision", "auto, fp32, tf32, bf16 or fp16"),
    Flag(("--compile",), "training.compile", "compile the networks", None, True),
    Flag(("--no-compile",), "training.compile", "do not compile the networks", None, False),
    Flag(("--num-workers",), "recipe.num_workers", "processes per GPU that read images", int),
    Flag(("--device",), "device", "auto, cpu or cuda"),
    Flag(("--name",), "name", "name of the run"),
    Flag(
        ("--output-dir", "--output_dir"),
        "output_dir",
        "run folder; %%j becomes the Slurm job id",
        expanduser,  # a shell expands ~ only where the path is a word of its own
    ),
    Flag(
        ("--resume",), "training.resume", "continue the run of the folder (the default)", None, True
    ),
    Flag(("--no-resume",), "training.resume", "start afresh", None, False),
    Flag(("--wandb",), "logging.wandb", "log to Weights & Biases", None, True),
    Flag(("--no-wandb", "--dont-log-wandb"), "logging.wandb", "no Weights & Biases", None, False),
    Flag(("--tensorboard",), "logging.tensorboard", "log to TensorBoard", None, True),
    Flag(("--launcher",), "launcher", "here, local (several processes) or slurm"),
    Flag(
        ("--ngpus", "--gpus", "--gpus-per-node"),
        "launcher.gpus_per_node",
        "GPUs, and so processes, per node",
        int,
        submits=True,
    ),
    Flag(("--nodes", "--nnodes"), "launcher.nodes", "nodes", int, submits=True),
    Flag(
        ("--timeout",),
        "launcher.timeout_min",
        "time limit of the job in minutes",
        int,
        submits=True,
    ),
    Flag(
        ("--time",),
        "launcher.timeout_min",
        "time limit of the job as Slurm writes it, D-HH:MM:SS",
        slurm_minutes,
        submits=True,
    ),
    Flag(("--cluster",), "cluster", "the cluster's facts, as cluster=X", submits=True),
    Flag(("--partition",), "cluster.partition", "partition of the cluster", submits=True),
    Flag(("--account",), "cluster.account", "account the job is charged to", submits=True),
    Flag(("--comment",), "cluster.comment", "comment of the job", submits=True),
    Flag(("--exclude",), "cluster.exclude", "nodes not to use", submits=True),
    Flag(("--email",), "cluster.mail", "address Slurm writes to", submits=True),
    Flag(("--use-volta32",), "cluster.constraint", "32 GB Volta", None, "volta32gb", submits=True),
    Flag(("--tgpu",), "cluster.gpu_type", "type of the GPUs, e.g. A100", submits=True),
    Flag(("--a40",), "cluster.gpu_type", "A40 GPUs", None, "A40", submits=True),
)


# Options that slurm/command.py reads for every experiment; listed here for `--help`.
_COMMON: dict[tuple[str, ...], dict[str, Any]] = {
    ("-m", "--multirun"): {
        "action": "store_true",
        "help": "key=a,b and the like are points of a sweep: a job array, or one after another",
    },
    ("--then",): {
        "metavar": "COMMAND",
        "help": 'run "experiments/SCRIPT.py ..." after this, if this succeeds; may be repeated',
    },
    ("--dry-run",): {
        "action": "store_true",
        "help": "show what would be started (of a Slurm job its script), and start nothing",
    },
}


# All flags that `read_arguments` may read, and those of them that only a training has.
SHARED = {"--config-file", "--config", "--check", "-h", "--help"}
SHARED |= {name for names in (*_COMMON, *(flag.names for flag in FLAGS)) for name in names}
OF_TRAINING = {
    name
    for flag in FLAGS
    if flag.key.split(".")[0] in ("training", "recipe", "optimizer", "logging")
    for name in flag.names
}


class Arguments(NamedTuple):
    """A parsed command line: a file, overrides of its keys, and whether only to check them."""

    config_file: str | None
    overrides: list[str]  # flags first, so that an explicit key=value takes precedence
    check: bool = False


def read_arguments(argv: list[str] | None, default: str, base: str = "train") -> Arguments:
    """Read flags and `key=value` words in any order; `--help` prints and exits.

    Raises `UserError` for an unknown flag, with the nearest one, and for words that are neither.
    """
    flags = _flags_of(CONFIGS / f"{base}.yaml")
    parser = _parser(default, flags)
    values, rest = parser.parse_known_args(argv)
    known = [name for action in parser._actions for name in action.option_strings]
    for word in rest:
        _check_word(word, known)
    for names in _COMMON:
        if names[-1].lstrip("-").replace("-", "_") in values:
            raise UserError(f"{names[-1]} is for the scripts in experiments/ alone")
    chosen = [flag for flag in flags if _dest(flag) in values]
    overrides = [f"{flag.key}={_quoted(getattr(values, _dest(flag)), flag)}" for flag in chosen]
    named = any(word.lstrip("+").startswith("launcher=") for word in [*overrides, *rest])
    if any(flag.submits for flag in chosen) and not named:
        overrides.insert(0, "launcher=slurm")
    return Arguments(values.config_file, overrides + rest, values.check)


def _flags_of(base: Path) -> list[Flag]:
    """The flags whose keys a config of this kind has."""
    import yaml

    content = yaml.safe_load(base.read_text())
    groups = [group for entry in content["defaults"] if entry != "_self_" for group in entry]
    return [flag for flag in FLAGS if flag.key.split(".")[0] in {*content, *groups}]


def _parser(default: str, flags: list[Flag]) -> Parser:
    script = sys.modules["__main__"]
    parser = Parser(
        usage="%(prog)s [--config-file FILE] [flags] [key=value ...]",
        description=script.__doc__,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        *("--config-file", "--config"),
        metavar="FILE",
        default=None,
        help=f"a run file, a saved run's config.yaml or a DINOv2 YAML (default: {default})",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        default=False,
        help="compose and validate, print the config, parameters and multiply-adds, and stop",
    )
    for names, options in _COMMON.items():
        parser.add_argument(*names, **options)
    for flag in flags:
        if flag.kind is None:
            parser.add_argument(
                *flag.names,
                dest=_dest(flag),
                action="store_const",
                const=flag.value,
                help=_help(flag),
            )
        else:
            metavar = "N" if flag.kind is int else "X"
            parser.add_argument(
                *flag.names, dest=_dest(flag), type=flag.kind, metavar=metavar, help=_help(flag)
            )
    return parser


def _help(flag: Flag) -> str:
    if flag.kind:
        return f"{flag.help} ({flag.key})"
    value = str(flag.value).lower() if isinstance(flag.value, bool) else flag.value
    return f"{flag.help} ({flag.key}={value})"


def _dest(flag: Flag) -> str:
    return flag.names[0].lstrip("-").replace("-", "_")


def _epilog() -> str:
    """The groups with their options, and the run files, as found below configs/."""
    lines = ["groups, chosen by group=option, and files for --config-file:"]
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        named = textwrap.fill(f"  {folder.name}: {options}", 90, subsequent_indent="    ")
        lines += [named] if options else []
    lines.append("any key of the config can be set by key=value, for instance recipe.epochs=10")
    return "\n".join(lines)


def _check_word(word: str, known: list[str]) -> None:
    if word.startswith("-"):
        name = word.split("=")[0]
        raise UserError(f"unknown flag {name}{nearest(name, known)}; --help lists the flags")
    if "=" not in word and not word.startswith("~"):
        file = (
            f"; a file is given by --config-file {word}" if word.endswith((".yaml", ".yml")) else ""
        )
        raise UserError(f"cannot read {word!r}: overrides are written key=value{file}")


def _quoted(value: Any, flag: Flag) -> str:
    """A value in Hydra's grammar: names of options stay bare, other text is quoted."""
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if flag.key in ("backbone", "data", "launcher", "cluster"):
        return value
    return quoted(value)


def quoted(text: str) -> str:
    """Text quoted for Hydra's override grammar."""
    # Backslashes count as themselves, but for those before a quote, the closing one included.
    doubled = re.sub(r"\\+(?='|\Z)", lambda found: 2 * found[0], text)
    return "'" + doubled.replace("'", "\\'") + "'"


def with_quotes(word: str) -> str:
    """A hint how to quote a word whose value is text with special characters, in a shell."""
    key, _, value = word.partition("=")
    if not re.fullmatch(r"[\w.@/+~-]+", key) or value[:1] in ("", "'", '"', "[", "{"):
        key, value = "key", "value"  # a placeholder, as the intended text is unclear
    shown = shlex.quote(f"{key}={quoted(value)}")
    if not set(value) & set("'\"$`\\!"):  # nothing that a shell expands inside double quotes
        shown = f"\"{key}='{value}'\""
    return f"text with special characters needs quotes of its own: {shown}{_as_list(key, value)}"


def _as_list(key: str, value: str) -> str:
    """What a hint for quotes adds where the text may be several values of a sweep."""
    several = value.split(",")
    is_plain = not set(value) & set("[](){}'\"$`\\!")
    is_one = key in ("name", "output_dir") or len(several) == 1 or not all(several)
    if is_one or not is_plain or "=" not in value:
        return ""
    return f', each of a list for -m: "{key}={",".join(map(quoted, several))}"'

"""The flags of DINOv2's classification evaluations, as overrides of configs/evaluate.yaml."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from utils.build import plain
from utils.config import fail, parse_config
from utils.errors import UserError
from utils.flags import FLAGS


class Option(NamedTuple):
    """A flag of the evaluation: the key it sets, how its words are read, what it means."""

    key: str
    kind: Callable[[str], Any]
    many: bool
    help: str


OPTIONS = {
    "--pretrained-weights": Option("weights", str, False, "file of weights; every key must fit"),
    "--weights": Option("weights", str, False, "the same"),
    "--train-dataset": Option("data.train", str, False, "such as ImageNet:split=TRAIN:root=DIR"),
    "--val-dataset": Option("data.val", str, False, "such as ImageNet:split=VAL:root=DIR"),
    "--nb_knn": Option("probes.knn.ks", int, True, "numbers of neighbours"),
    "--temperature": Option("probes.knn.temperature", float, False, "of the vote"),
    "--batch-size": Option("probes.knn.batch_size", int, False, "images per process"),
    "--num-workers": Option("probes.knn.num_workers", int, False, "processes that read images"),
    "--precision": Option("probes.knn.precision", str, False, "of the net: fp32, bf16 or fp16"),
    "--n-per-class-list": Option("probes.knn.n_per_class_list", int, True, "few-shot; -1: all"),
    "--n-tries": Option("probes.knn.num_tries", int, False, "draws per few-shot setting"),
}
SWITCHES = {"--gather-on-cpu": "features are always kept in host memory, each process its share"}
LINEAR_FLAGS = {
    *("--epochs", "--epoch-length", "--learning-rates", "--save-checkpoint-frequency"),
    *("--eval-period-iterations", "--val-metric-type", "--test-metric-types", "--test-datasets"),
    *("--classifier-fpath", "--val-class-mapping-fpath", "--test-class-mapping-fpaths"),
}
TAKES_VALUE = {name for flag in FLAGS if flag.kind is not None for name in flag.names} | {
    "--config-file",
    "--config",
}


class EvaluationArguments(NamedTuple):
    """What is left for `utils.config.parse_config`, and the two data sets given as strings."""

    argv: list[str]
    datasets: dict[str, str]  # "train", "val" -> DINOv2's string
    notes: list[str]


def read_evaluation_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Turn `OUTPUT [flags] [key=value ...]` into overrides; other flags pass as they are."""
    words, rest, datasets, notes = list(argv), [], {}, []
    output = ""
    while words:
        word = words.pop(0)
        name, _, inline = word.partition("=")
        if name in OPTIONS:
            option = OPTIONS[name]
            values = _read_values(name, option, [inline] if inline else _take(words, option.many))
            if option.key.startswith("data."):
                datasets[option.key.removeprefix("data.")] = str(values[0])
            else:
                rest.append(f"{option.key}={_override(values if option.many else values[0])}")
        elif word in SWITCHES:
            notes.append(f"{word} has no effect: {SWITCHES[word]}")
        elif name in LINEAR_FLAGS:
            raise UserError(f"{name} belongs to the linear probe, which is not built yet; drop it")
        elif word.startswith("-") or "=" in word or word.startswith("~"):
            rest.append(word)
            if word in TAKES_VALUE and words:
                rest.append(words.pop(0))
        elif output:
            raise UserError(f"two output folders, {output!r} and {word!r}; key=value sets a key")
        else:
            output = word
    if output:
        rest.append(f"output_dir={_override(output)}")
    return EvaluationArguments(rest, datasets, notes)


def parse_evaluation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(_help())
    try:
        arguments = read_evaluation_arguments(argv)
    except UserError as error:
        fail(error)
    config = plain(parse_config(default="evaluate.yaml", argv=arguments.argv, base="evaluate"))
    for split, string in arguments.datasets.items():
        config["data"][split] = {"_target_": "utils.data.strings.parse_dataset", "string": string}
    for note in arguments.notes:
        print(note)
    return config


def _take(words: list[str], many: bool) -> list[str]:
    """The values that follow a flag: one, or all up to the next word that is no number."""
    taken = [words.pop(0)] if words else []
    while many and words and words[0].lstrip("-").isdigit():
        taken.append(words.pop(0))
    return taken


def _read_values(name: str, option: Option, words: list[str]) -> list[Any]:
    try:
        values = [option.kind(word) for word in words]
    except ValueError:
        raise UserError(f"{name} takes {option.kind.__name__}, not {' '.join(words)!r}") from None
    if not values:
        raise UserError(f"{name} needs a value")
    return values


def _override(value: object) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, str):
        return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    return str(value).replace(" ", "")


def _help() -> str:
    script = sys.modules["__main__"]
    lines = [
        f"{script.__doc__ or ''}",
        "usage: eval_dinov2_classification.py OUTPUT [flags] [key=value ...]",
        "",
        "flags of the evaluation (they come before those below of the same name):",
    ]
    for name, option in OPTIONS.items():
        lines.append(f"  {name:<22} {option.help} ({option.key})")
    lines += [f"  {name:<22} accepted: {why}" for name, why in SWITCHES.items()]
    return "\n".join(lines) + "\n\nall other flags and keys:\n"

"""The flags of DINOv2's classification evaluations, as overrides of configs/evaluate.yaml."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from utils.config.build import plain, resolve
from utils.config.command_line import (
    Takes,
    backbone_words,
    files_beside,
    help_page,
    names_backbone,
    quoted,
    read_command,
    refuse_unknown_flags,
    sorted_words,
    tell,
)
from utils.config.compose import compose_config, parse_config
from utils.config.files import CONFIGS
from utils.config.flags import read_arguments
from utils.config.signature import keywords_of
from utils.errors import UserError
from utils.nearest import nearest


def dataset(string: str) -> dict[str, str]:
    """The config node of a data set given by DINOv2's string."""
    return {"_target_": "utils.data.strings.parse_dataset", "string": string}


def optional(word: str) -> str | None:
    """The word, or None if it is the word for none."""
    return None if word in ("None", "null") else word


def device(word: str) -> str:
    """Where features are kept: a GPU under any name is the net's device."""
    return "cpu" if word == "cpu" else "device"


class Option(NamedTuple):
    """A flag of the evaluation: the key it sets, what it means, how its words are read.

    A key `probes.*.x` is x of every probe that has it.
    """

    key: str
    help: str
    kind: Callable[[str], Any] = str
    many: bool = False


class Switch(NamedTuple):
    """A flag without a value: the key it sets, to which value, what it means."""

    key: str
    value: Any
    help: str


OPTIONS = {
    "--pretrained-weights": Option("weights", "file of weights; every key must fit"),
    "--weights": Option("weights", "the same"),
    "--train-dataset": Option("data.train", "such as ImageNet:split=TRAIN:root=DIR"),
    "--val-dataset": Option("data.val", "such as ImageNet:split=VAL:root=DIR"),
    "--batch-size": Option("probes.*.batch_size", "images per process", int),
    "--num-workers": Option("probes.*.num_workers", "processes that read images", int),
    "--input-size": Option("probes.*.crop_size", "side of the images; the net's own", int),
    "--precision": Option("probes.*.precision", "of the net: fp32, bf16 or fp16"),
    "--nb_knn": Option("probes.knn.ks", "numbers of neighbours", int, many=True),
    "--temperature": Option("probes.knn.temperature", "of the vote", float),
    "--n-per-class-list": Option(
        "probes.knn.n_per_class_list", "few-shot; -1: all", int, many=True
    ),
    "--n-tries": Option("probes.knn.num_tries", "draws per few-shot setting", int),
    "--epochs": Option("probes.linear.epochs", "length of the training of heads", int),
    "--epoch-length": Option("probes.linear.epoch_length", "steps", int),
    "--learning-rates": Option(
        "probes.linear.learning_rates", "at 256 images a step", float, many=True
    ),
    "--eval-period-iterations": Option(
        "probes.linear.eval_period", "steps between looks at val; 0: at the end only", int
    ),
    "--val-metric-type": Option(
        "probes.linear.val_metric_type", "mean_accuracy, mean_per_class_accuracy, ..."
    ),
    "--test-datasets": Option(
        "probes.linear.test_datasets", "further data sets, as --val-dataset", dataset, many=True
    ),
    "--test-metric-types": Option(
        "probes.linear.test_metric_types", "one for all, or one each", many=True
    ),
    "--val-class-mapping-fpath": Option(
        "probes.linear.val_class_mapping", ".npy of columns of the logits to keep", optional
    ),
    "--test-class-mapping-fpaths": Option(
        "probes.linear.test_class_mappings", "one each, None for none", optional, many=True
    ),
    "--classifier-fpath": Option(
        "probes.linear.classifier", "heads to judge, or to train on", optional
    ),
    "--real-labels": Option("probes.linear.real_labels", "real.json, for imagenet_real_accuracy"),
    "--finetune-dataset-str": Option(
        "probes.logreg.finetune", "images that choose C, as --val-dataset", dataset
    ),
    "--metric-type": Option(
        "probes.logreg.metric_type", "mean_accuracy or mean_per_class_accuracy"
    ),
    "--max-train-iters": Option("probes.logreg.max_iter", "steps for each C", int),
    "--train-dtype": Option("probes.logreg.dtype", "float64 or float32"),
    "--train-features-device": Option(
        "probes.logreg.features_on", "cpu, or the net's device", device
    ),
}
SWITCHES = {
    "--no-resume": Switch("probes.*.resume", False, "train heads anew where files of them stand"),
    "--finetune-on-val": Switch("probes.logreg.select_on", "val", "choose C on the images judged"),
}
# Flags without effect: without a value, and with one.
WITHOUT_VALUE = {
    "--opts": "key=value sets a key without it",
    "--gather-on-cpu": "features are always kept in host memory, each process its share",
}
IGNORED = {
    "--save-checkpoint-frequency": "heads are saved after each epoch and at the end",
}
CHOICE, MODEL = "--probes", "--model"
OWN = (CHOICE, MODEL, *OPTIONS, *SWITCHES, *WITHOUT_VALUE, *IGNORED)
PROBES = ("linear", "knn", "logreg", "attentive")
_GIVEN = re.compile(r"\+{1,2}(?:probe@)?probes\.(\w+)[.=]")  # of a probe that words add
OFFERED = f"{', '.join(PROBES)} and other files of configs/probe"


class Setting(NamedTuple):
    """A keyword of probes that a flag sets; `probe` is * for every probe that takes it."""

    flag: str
    probe: str
    keyword: str
    value: str  # in the grammar of overrides


class EvaluationArguments(NamedTuple):
    """A sorted command line: words for `parse_config`, and the flags for data and probes."""

    argv: list[str]
    datasets: dict[str, str]  # "train", "val" -> DINOv2's string
    settings: list[Setting]
    notes: list[str]


def read_evaluation_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Sort `OUTPUT [flags] [key=value ...]`; flags of all scripts pass as they are."""
    refuse_unknown_flags(argv, OWN)
    found, output = EvaluationArguments([], {}, [], []), ""
    takes: dict[str, Takes] = dict.fromkeys((CHOICE, MODEL, *IGNORED), 1)
    takes |= dict.fromkeys((*SWITCHES, *WITHOUT_VALUE), 0)
    for name, option in OPTIONS.items():
        takes[name] = partial(_can_follow, kind=option.kind) if option.many else 1
    for name, values in sorted_words(argv, takes):
        if name == CHOICE:
            found.argv.extend(_choose_probes(values[0], argv))
        elif name == MODEL:
            found.argv.extend(backbone_words(values[0], argv))
        elif name in OPTIONS:
            read = _read_values(name, OPTIONS[name].kind, values)
            _sort(found, name, OPTIONS[name].key, read if OPTIONS[name].many else read[0])
        elif name in SWITCHES:
            _sort(found, name, SWITCHES[name].key, SWITCHES[name].value)
        elif name:
            found.notes.append(f"{name} has no effect: {(WITHOUT_VALUE | IGNORED)[name]}")
        elif values[0].startswith("-") or _is_override(values[0]):
            found.argv.extend(values)
        elif output:
            raise UserError(
                f"two output folders, {output!r} and {values[0]!r}; key=value sets a key"
            )
        else:
            output = values[0]
    if output:
        found.argv.append(f"output_dir={_override(output)}")
    return found


def parse_evaluation(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The config an evaluation's command line asks for; a mistake prints one line, exit code 2."""
    found, words = read_command(argv, _read, page=_help())
    config = plain(
        parse_config(
            default="evaluate.yaml", argv=words, base="evaluate", further=lambda _: found.notes
        )
    )
    for split, string in found.datasets.items():
        config["data"][split] = dataset(string)
    tell(found.notes)
    return config | {"backbone_named": names_backbone(words)}


def _read(argv: list[str]) -> tuple[EvaluationArguments, list[str]]:
    """A sorted command line, and its words for `utils.config.compose.parse_config`."""
    found = read_evaluation_arguments(argv)
    settings = [] if {"-h", "--help"} & set(argv) else _apply(found)
    # In front, so that an explicit key=value takes precedence.
    return found, [*settings, *found.argv]


def _choose_probes(listed: str, argv: Sequence[str]) -> list[str]:
    """Overrides that keep only the probes of a comma list: of files, or given by the words."""
    chosen = [name for name in listed.split(",") if name]
    files = {path.stem for path in (CONFIGS / "probe").glob("*.yaml")}
    files |= files_beside(argv, "probe").keys()
    given = {found[1] for word in argv if (found := _GIVEN.match(word))}
    known = sorted(files | given)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        what = f"{unknown[0]!r}{nearest(unknown[0], known)}" if unknown else "nothing"
        raise UserError(f"{CHOICE} takes a list of {OFFERED}; got {what}")
    defaults = plain(compose_config("evaluate.yaml", base="evaluate"))["probes"]
    dropped = [f"probes.{name}=null" for name in defaults if name not in chosen]
    missing = [name for name in chosen if name in files and name not in defaults]
    added = [f"+probe@probes.{name}={name}" for name in missing]
    return [*added, *dropped]


def _sort(found: EvaluationArguments, flag: str, key: str, value: Any) -> None:
    where, _, keyword = key.rpartition(".")
    if where == "data":
        found.datasets[keyword] = str(value)
    elif where.startswith("probes."):
        found.settings.append(
            Setting(flag, where.removeprefix("probes."), keyword, _override(value))
        )
    else:
        found.argv.append(f"{key}={_override(value)}")


def _apply(found: EvaluationArguments) -> list[str]:
    """Overrides of the probes that the command line keeps; a note for a flag that none takes."""
    if not found.settings:
        return []
    arguments = read_arguments(found.argv, "evaluate.yaml", "evaluate")
    with contextlib.redirect_stderr(io.StringIO()):  # its notes come again with the whole config
        config = plain(
            compose_config(
                arguments.config_file or "evaluate.yaml", arguments.overrides, base="evaluate"
            )
        )
    probes = {name: node for name, node in config["probes"].items() if node}
    overrides = []
    for flag, probe, keyword, value in found.settings:
        chosen = [
            name
            for name, node in probes.items()
            if name == probe or (probe == "*" and _takes(node, keyword))
        ]
        overrides += [f"probes.{name}.{keyword}={value}" for name in chosen]
        if not chosen:
            missing = f"takes {keyword}" if probe == "*" else f"is called {probe}"
            found.notes.append(f"{flag} has no effect: no probe of this evaluation {missing}")
    return overrides


def _takes(node: Mapping[str, Any], keyword: str) -> bool:
    return keyword in keywords_of(resolve(node["_target_"]))


def _can_follow(word: str, kind: Callable[[str], Any]) -> bool:
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            kind(word)
            return True
        return False
    return not word.startswith("-") and not _is_override(word)


def _is_override(word: str) -> bool:
    """Whether a word is key=value or ~key; the = of a data set's string comes after a colon."""
    return word.startswith("~") or ("=" in word and ":" not in word.partition("=")[0])


def _read_values(name: str, kind: Callable[[str], Any], words: list[str]) -> list[Any]:
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise UserError(f"{name} takes {kind.__name__}, not {' '.join(words)!r}") from None


def _override(value: object) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_override(part)}" for key, part in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _help() -> str:
    rows = {CHOICE: f"these alone, such as linear,logreg: of {OFFERED}"}
    rows |= {name: f"{option.help} ({option.key})" for name, option in OPTIONS.items()}
    for name, (key, value, help) in SWITCHES.items():
        rows[name] = f"{help} ({key}={_override(value)})"
    rows |= {name: f"{why}: no effect" for name, why in (WITHOUT_VALUE | IGNORED).items()}
    usage = "eval_dinov2_classification.py OUTPUT [flags] [key=value ...]; * is every probe"
    return help_page(rows, usage=usage)

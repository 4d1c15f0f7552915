"""Compose and check a config from the command line; every setting of a run comes in here.

`python experiments/x.py --config-file FILE [flags] [key=value ...]`. FILE may be a run file of ours
anywhere on disk, the `config.yaml` of a saved run, or a YAML with DINOv2's own keys
(`utils.config.vocabulary`). Hydra and OmegaConf are imported late, so that `--help` answers at once
and `build` works without them.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import vocabulary
from utils.config.build import plain
from utils.config.files import CONFIGS, find_file, run_of_model
from utils.config.flags import quoted, read_arguments
from utils.config.overrides import content_of, is_group, known_key, parse_words
from utils.config.schema import NAMES, compare
from utils.errors import UserError, fail
from utils.nearest import nearest, nearest_family

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


# Groups that may hold files of a user, and where these stand.
OWN_GROUPS = ("backbone", "recipe", "data", "probe")
OWN_FILE = "one of yours is {}.yaml beside the run file that --config-file names"
# What Hydra 1.3 and 1.4 say of a run file that chooses an option of no group.
NO_GROUP = re.compile(r"(?:Could not override|No earlier Group Default for) '(\w+)'")


def parse_config(
    default: str,
    argv: list[str] | None = None,
    *,
    base: str = "train",
    runs: str = "",
    further: Callable[[Any], Sequence[str] | None] = lambda config: None,
) -> "DictConfig":
    """The config that the command line asks for; a mistake prints one line and exits with code 2.

    `default`: the run file (below `configs/`) without `--config-file`. `base`: the file below
    `configs/` that has all known keys. `runs`: a folder below `configs/` with a run file per model;
    `--model X` without `--config-file` takes that of X. `--check` prints the config and the
    networks' cost, and exits; `further` is called with the plain config for what it checks and
    notes besides.
    """
    try:
        arguments = read_arguments(argv, default, base)
        file = arguments.config_file or run_of_model(arguments.overrides, runs) or default
        config = compose_config(file, arguments.overrides, base=base, default=default)
        if not arguments.check:
            return config
        from utils.config.check import check

        check(config, lambda: further(plain(config)))
    except UserError as error:
        fail(error)
    raise SystemExit(0)


def compose_config(
    file: str | Path,
    overrides: list[str] | None = None,
    *,
    base: str = "train",
    default: str = "",
) -> "DictConfig":
    """Compose a file with overrides `key=value`; resolves interpolations and refuses unknown keys.

    default: the command's own run file, which one of a user's builds on; `base` if not given.
    Keys beside a `_target_` may be any keyword: `check_targets` and `build` check them against the
    constructor. Raises `UserError` with one line for whatever is wrong.
    """
    from omegaconf import DictConfig, OmegaConf

    path, words = find_file(file), parse_words(overrides or [])
    refuse = partial(_refuse_training, base=base, path=path, own=default.removesuffix(".yaml"))
    with _one_line(path):
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise UserError(f"{path}: a config is a mapping of keys to values")
        refuse(content)
        if "defaults" not in content:
            words = [word for word in words if not _is_launcher_of(content, word)]
        if vocabulary.is_dinov2(content):
            config = _compose_translated(content, words, path, base)
        elif "defaults" in content or not any(is_group(word) for word in words):
            config = _compose(path, words, refuse)
        else:
            config = _compose_and_swap(path, words, base)
        _check_keys(config, base, path)
        for key in ("name", "output_dir"):
            value = config.get(key, ".")
            if isinstance(value, int | float) and not isinstance(value, bool):
                config[key] = str(value)  # a folder may be called 2
            elif not isinstance(value, str) or not value.strip():
                raise UserError(f"{key} must be text, got {value!r}")
        OmegaConf.resolve(config)
        if config.get("seed", 0) is None:
            raise UserError("seed must be a whole number from 0, not None")
    return config


def _refuse_training(content: "DictConfig", *, base: str, path: Path, own: str) -> None:
    """Refuse the file of a training where a command evaluates: it says which weights to give."""
    schema = _schema(base)
    evaluates = "recipe" not in schema and "weights" in schema
    if evaluates and "recipe" in content and not vocabulary.is_dinov2(content):
        raise UserError(
            f"{path} describes a training; without --config-file, the folder of the run as "
            "--weights (eval_deit.py: --eval) evaluates its network; for files of yours beside it "
            f"give another run file, with `defaults: [/{own or base}, _self_]`"
        )


def _is_launcher_of(saved: "DictConfig", word: "Override") -> bool:
    """Whether `launcher=X` names the launcher of a saved run, whose other keys it would reset."""
    from omegaconf import OmegaConf

    kind = OmegaConf.select(saved, "launcher.kind", throw_on_missing=False)
    return word.key_or_group == "launcher" and is_group(word) and word.value() == kind


def _compose(
    path: Path,
    words: list["Override"],
    refuse: Callable[["DictConfig"], None] = lambda config: None,
) -> "DictConfig":
    """Compose with Hydra; refuses keys that no file has, except keywords beside a `_target_`.

    refuse: called with what the file says, before overrides are compared with it.
    """
    groups = [word for word in words if is_group(word)]
    lines = [word.input_line or "" for word in groups]
    config = _hydra(path, lines)
    refuse(config)
    _check_chosen(groups, config)
    if len(groups) == len(words):
        return config
    earlier: dict[str, Any] = {}
    for word in words:
        if not is_group(word):
            lines.append(known_key(word, config, earlier))
        earlier[word.key_or_group] = word.value()
    return _hydra(path, lines)


def _check_chosen(groups: list["Override"], config: "DictConfig") -> None:
    """Refuse a group choice without effect, because the run file sets that group to null."""
    from omegaconf import OmegaConf

    for word in groups:
        if word.package and OmegaConf.select(config, word.package, throw_on_missing=False) is None:
            raise UserError(
                f"{word.input_line!r} has no effect: the run sets {word.package} to null; another "
                f"name will do: +{word.key_or_group}@{word.package}_2={word.value()}"
            )


def _hydra(path: Path, lines: list[str]) -> "DictConfig":
    from hydra import __version__, compose, initialize_config_dir

    # Hydra 1.3 behaves as 1.1 did unless told otherwise; 1.4 warns of the word that tells it.
    base: dict[str, Any] = {"version_base": "1.3"} if __version__.startswith("1.3") else {}
    if path.suffix != ".yaml":
        raise UserError(f"{path}: the name of a run file must end in .yaml")
    with initialize_config_dir(str(path.parent), job_name="octic", **base):
        return compose(path.stem, [*lines, f"hydra.searchpath=[{quoted(f'file://{CONFIGS}')}]"])


def _compose_and_swap(path: Path, words: list["Override"], base: str) -> "DictConfig":
    """Compose a saved run, with the chosen groups composed anew and put in their places.

    A saved config has no defaults list, so Hydra cannot choose groups in it.
    """
    from omegaconf import OmegaConf

    groups = [word.package or word.key_or_group for word in words if is_group(word)]
    heads = tuple(f"{group}." for group in groups)
    fresh = [w for w in words if f"{w.package or w.key_or_group}.".startswith(heads)]
    new = _compose(CONFIGS / f"{base}.yaml", fresh)
    config = _compose(path, [word for word in words if word not in fresh])
    for group in groups:
        OmegaConf.update(config, group, OmegaConf.select(new, group), merge=False, force_add=True)
    return config


def _compose_translated(
    content: "DictConfig", words: list["Override"], path: Path, base: str
) -> "DictConfig":
    """Translate a DINOv2 config and compose it; overrides of DINOv2's keys are applied first."""
    from omegaconf import OmegaConf

    theirs = [word for word in words if vocabulary.is_theirs(word.key_or_group)]
    for word in theirs:
        OmegaConf.update(content, word.key_or_group, word.value(), force_add=True)
    groups = {word.key_or_group: str(word.value()) for word in words if is_group(word)}
    run, notes = vocabulary.translate(
        content_of(content), name=path.stem, source=path, base=base, groups=groups
    )
    for note in notes if os.environ.get("RANK", "0") == "0" else []:
        print(f"note: {path.name}: {note}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        translated = Path(folder) / f"{path.stem}.yaml"
        OmegaConf.save(OmegaConf.create(run), translated)
        return _compose(translated, [word for word in words if word not in theirs])


def _check_keys(config: "DictConfig", base: str, path: Path) -> None:
    """Refuse keys that `base` and its groups lack, and values of another kind than theirs."""
    from omegaconf import OmegaConf

    for group in _groups_left_open(base):
        if group not in config:  # Hydra leaves the key of such a group out
            OmegaConf.update(config, group, None, force_add=True)
    content, schema = content_of(config), _schema(base)
    lacking = [key for key in schema if key not in content]
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise UserError(f"{path} lacks {shown}: put `defaults: [/{base}, _self_]` at its top")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be given")
    for key in ("backbone", "recipe", "optimizer", "data", "probes"):
        if key in schema and not isinstance(content[key], dict | None):
            raise UserError(f"{key} must be a mapping of keys to values, got {content[key]!r}")
    compare(content, schema, path)
    _add_defaults(config, content, schema, base)


def _add_defaults(
    config: "DictConfig", content: dict[str, Any], schema: dict[str, Any], base: str
) -> None:
    """Add keys that an older saved config lacks, with their defaults.

    Names that a user chooses are none of these: one that is not there was taken away.
    """
    from omegaconf import OmegaConf

    lacking = [
        (group, key)
        for group, keys in schema.items()
        if isinstance(keys, dict) and isinstance(content.get(group), dict)
        if group not in ("data", *NAMES)
        for key in keys
        if key not in content[group] and "_target_" not in keys
    ]
    if lacking:
        defaults = content_of(_compose(CONFIGS / f"{base}.yaml", []))
        for group, key in lacking:
            OmegaConf.update(config, f"{group}.{key}", defaults[group].get(key), force_add=True)


def _groups_left_open(base: str) -> list[str]:
    """The groups for which `configs/<base>.yaml` chooses nothing."""
    from omegaconf import OmegaConf

    entries = content_of(OmegaConf.load(CONFIGS / f"{base}.yaml")).get("defaults", [])
    return [
        group
        for entry in entries
        if isinstance(entry, dict)
        for group, choice in entry.items()
        if choice is None
    ]


@cache  # reading these files is half of what composing takes
def _schema(base: str) -> dict[str, Any]:
    """The keys of `configs/<base>.yaml`; a group is None (any content) unless fixed; read only."""
    from omegaconf import OmegaConf

    content = content_of(OmegaConf.load(CONFIGS / f"{base}.yaml"))
    for entry in content.pop("defaults", []):
        for group in entry if isinstance(entry, dict) else ():
            # Even if the file itself sets keys of the group: the constructors check keywords.
            content[group.split("@")[-1].split(".")[0]] = None
    for group in ("launcher", "cluster", "data"):
        fixed: dict[str, Any] = {}
        for file in sorted((CONFIGS / group).glob("*.yaml")):
            for key, value in content_of(OmegaConf.load(file)).items():
                if key != "defaults" and fixed.get(key) is None:
                    fixed[key] = value
        if group in content:
            content[group] = fixed if group != "data" else dict.fromkeys(fixed)
    return content


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn every error of YAML, OmegaConf and Hydra into a `UserError` of one line."""
    import yaml
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        raise UserError(_missing_option(error, path)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: bad YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: bad YAML: {str(error).splitlines()[0]}") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        message = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        if key and message.endswith("is not in struct"):
            raise UserError(f"{path}: unknown key {key!r}") from error
        if group := NO_GROUP.search(str(error)):
            others = set(_groups()) - {group[1]}
            message = f"there is no group {group[1]!r} to override{nearest(group[1], others)}"
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{message}") from error
    except RecursionError:
        raise UserError(f"{path}: bad YAML: a part of it contains itself") from None
    except ValueError as error:  # from Hydra, for a malformed defaults list
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # input that makes Hydra itself fail
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: cannot be composed: {type(error).__name__}: {said}") from error


def _missing_option(error: Any, path: Path) -> str:
    missing, options = str(error.missing_cfg_file), sorted(error.options or [])
    group, _, name = missing.strip("/").rpartition("/")
    if options:
        hint = nearest_family(name, options)
        shown = options if len(options) <= 20 else [*options[:20], f"... in configs/{group}"]
        known = "" if hint and len(options) > 9 else f" (options: {', '.join(shown)})"
        flag = f" (--model {name})" if group == "backbone" else ""
        own = "" if hint or group not in OWN_GROUPS else f"; {OWN_FILE.format(f'{group}/{name}')}"
        return f"there is no {group}={name}{flag}{hint}{known}{own}"
    names = [
        file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml")
    ]
    hint = nearest(missing.strip("/"), names) or nearest(group, _groups())
    return f"{path}: there is no config {missing!r}{hint}"


def _groups() -> list[str]:
    return [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]

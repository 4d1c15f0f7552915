"""Translate words `key=value` and `group=option` of a command line into Hydra's overrides.

Hydra refuses keys that the composed config lacks. Here they are accepted beside a `_target_`, whose
constructor checks them; other unknown keys are refused with a hint at the nearest known one.
"""

from typing import TYPE_CHECKING, Any

from utils.config import vocabulary
from utils.config.files import CONFIGS
from utils.config.flags import quoted, with_quotes
from utils.config.schema import nearest_key
from utils.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# Mappings whose keys are the user's own: environment variables, options of sbatch.
_FREE = ("cluster.env", "cluster.sbatch_options")
_OPEN = (*_FREE, "probes")  # a mapping given to these may have new keys


def parse_words(words: list[str]) -> list["Override"]:
    """Parse the words; `UserError` for a word that is malformed or not allowed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            key, _, value = word.partition("=")
            if not vocabulary.is_text(key):
                raise UserError(f"cannot read {word!r}: {with_quotes(word)}") from None
            override = OverridesParser.create().parse_override(f"{key}={quoted(value)}")
        if override.is_sweep_override():
            raise UserError(
                f"{word!r} gives several values: -m tries one after another; a list is "
                f"key=[a,b]; {with_quotes(word)}"
            )
        if override.key_or_group.split(".")[0] == "hydra":
            raise UserError(f"{word!r}: Hydra's own settings are not for the command line")
        if override.value() is None and (CONFIGS / override.key_or_group).is_dir():
            raise UserError(f"{word!r}: the group {override.key_or_group} needs one of its options")
        parsed.append(override)
    return parsed


def is_group(override: "Override") -> bool:
    """Whether the override `group=option` chooses a file: the group is a folder of configs/."""
    value = override.value()
    return (CONFIGS / override.key_or_group).is_dir() and isinstance(value, (str, int, float, list))


def known_key(override: "Override", config: "DictConfig", earlier: dict[str, Any]) -> str:
    """The override as a line for Hydra; `UserError` with the nearest key if the key is unknown.

    earlier: values of the overrides before this one.
    """
    from omegaconf import DictConfig, OmegaConf

    line, key = override.input_line or "", override.key_or_group
    if override.is_force_add() or override.is_add():
        return line
    words = override.value()
    if words == {} and OmegaConf.select(config, key, throw_on_missing=False):
        raise UserError(
            f"{line!r} changes nothing, as a mapping is merged into the one that is there; "
            f"{key}=null leaves out all of it, ~{key}.NAME one key"
        )
    deleted = override.is_delete() and "." not in key
    if deleted and isinstance(OmegaConf.select(config, key, throw_on_missing=False), DictConfig):
        raise UserError(
            f"{line!r}: every run has the key {key}; {key}=null leaves out all of it, "
            f"~{key}.NAME one key"
        )
    if key in _OPEN and isinstance(words, dict):
        return f"++{line}"  # merge its keys into those of the files
    parent, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    if node is None and earlier.get(parent) is not None and not override.is_delete():
        return f"++{line}"  # a key of a mapping that an earlier override put in place of null
    if earlier.get(parent, "") is None or _is_null(config, parent):
        raise UserError(
            f"{key!r} has no place: {parent} is null here; first say what it is: "
            f"{parent}={{_target_: ..., {name}: ...}}"
        )
    if isinstance(node, DictConfig):
        if name in node:
            builds = isinstance(words, dict) and (_builds(words) or _builds(node[name]))
            return f"++{line}" if builds else line  # as below
        if "_target_" in node and not override.is_delete():
            return f"++{line}"  # a keyword that the file leaves out; the constructor checks it
    if parent in _FREE:
        return f"++{line}"
    raise UserError(f"unknown key {key!r}{nearest_key(key, content_of(config))}")


def content_of(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, with interpolations unresolved."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _builds(node: Any) -> bool:
    """Whether a mapping or one nested in it has a `_target_`, whose constructor checks its keys."""
    from omegaconf import DictConfig

    if not isinstance(node, dict | DictConfig):
        return False
    return "_target_" in node or any(_builds(node[key]) for key in node)


def _is_null(config: "DictConfig", key: str) -> bool:
    from omegaconf import DictConfig, OmegaConf

    parent, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    return isinstance(node, DictConfig) and name in node and node[name] is None

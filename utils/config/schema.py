"""Check a config's keys, and the kinds of their values, against a file that has them all."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.nearest import nearest

# Mappings, in any config file, whose keys are names that the user chooses.
NAMES = ("models", "methods", "twins", "keywords")


def compare(
    content: dict[str, Any], schema: dict[str, Any], source: Path, prefix: str = ""
) -> None:
    """Refuse keys the schema lacks, and values of another kind than the schema's.

    A schema value of None accepts anything, such as a group whose constructor checks its keywords.
    Mappings in `NAMES` also accept new names with any value.
    """
    for key, value in content.items():
        if key not in schema and prefix.rstrip(".") in NAMES:
            continue
        name, default = f"{prefix}{key}", schema.get(key)
        if key not in schema:
            known = [f"{prefix}{word}" for word in schema]
            raise UserError(
                f"{source}{line_of(source, name)}: unknown key {name!r}{nearest(name, known)}"
            )
        if isinstance(default, dict) and default and "_target_" not in default:
            if not isinstance(value, dict):
                raise UserError(
                    f"{name} must be a mapping with {', '.join(default)}, got {value!r}"
                )
            compare(value, default, source, f"{name}.")
        elif not same_kind(value, default):
            raise UserError(f"{name} must be {kind(default)}, got {value!r}")


def same_kind(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of `default`; null and interpolations fit anywhere."""
    if default is None or value is None or (isinstance(value, str) and "${" in value):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, str):
        return isinstance(value, (str, int, float))
    return isinstance(value, type(default))


def kind(default: object) -> str:
    """The kind of a value in words, for error messages."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    return words.get(type(default), "text")


def line_of(source: Path, key: str) -> str:
    """`:LINE` of a dotted key in a YAML file, or "" if the file has no such key."""
    import yaml

    node, line = yaml.compose(source.read_text()), ""
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = [(k, v) for k, v in pairs if k.value == part]
        if not found:
            return ""
        line, node = f":{found[0][0].start_mark.line + 1}", found[0][1]
    return line


def nearest_key(key: str, content: Mapping[str, Any]) -> str:
    """A hint at the nearest dotted key of `content`, or at one with the same last name; else ""."""
    known = list(_flat(content))
    same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return nearest(key, known) or (f"; did you mean {same_name[0]!r}?" if same_name else "")


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")

"""Flags of single commands: each is another name for one key of the command's config.

`utils.config.flags` reads the remaining words, with the flags that all scripts share.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils.config.files import CONFIGS, backbone_names, chooses_backbone, find_file
from utils.config.flags import FLAGS, OF_TRAINING, SHARED, quoted
from utils.errors import UserError, fail
from utils.nearest import nearest, nearest_family
from utils.run_files import EXPORTED

TAKES_VALUE = {name for flag in FLAGS if flag.kind is not None for name in flag.names} | {
    "--config-file",
    "--config",
}
Read = TypeVar("Read")
# The values of a flag: so many; one, and every next word of which a function says so; or, for None,
# only one behind an =, if there is one.
Takes = int | Callable[[str], bool] | None


class Option(NamedTuple):
    """A flag: the key it sets, what it means, and its value (None: the next word).

    Values are quoted as text on their way into the config, unless `text=False`, which keeps numbers
    and lists.
    """

    key: str
    help: str
    value: str | None = None
    text: bool = True


class Words(NamedTuple):
    """A command line sorted into its parts."""

    places: list[str]  # positional words, such as an output folder
    overrides: list[str]  # key=value, and flags that are not the command's, in their order
    notes: list[str]  # one line per flag without effect


def read_command(
    argv: Sequence[str] | None, read: Callable[[list[str]], Read], *, page: str
) -> Read:
    """The result of `read` for a command line; argv=None is that of this process.

    --help prints `page` first; `parse_config` then adds the flags of all scripts. A UserError of
    `read` prints one line and exits with code 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        print(page)
    try:
        return read(words)
    except UserError as error:
        fail(error)


def refuse_unknown_flags(argv: Sequence[str], own: Iterable[str]) -> None:
    """UserError, with the nearest flag, for one that is neither the command's own nor shared.

    To be called before the words are sorted, which takes the value of an unknown flag for a word.
    """
    known, offered = {*own, *SHARED}, {*own, *(SHARED - OF_TRAINING)}
    for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if name not in known:
            raise UserError(f"unknown flag {name}{nearest(name, offered)}; --help lists the flags")


def read_words(
    argv: Sequence[str],
    options: Mapping[str, Option],
    *,
    same: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
    num_places: int = 0,
    spell: Callable[[str, str, Sequence[str]], list[str] | None] = lambda name, value, words: None,
) -> Words:
    """Sort `[words] [flags] [key=value ...]`; flags of all scripts pass as they are.

    same: other spellings of flags. ignored: flags without effect, and why. num_places: how many
    positional words are allowed; if 0, they pass as they are. spell: the overrides for a flag, its
    value and the whole line, or None if they are simply key=value. Raises UserError for a flag
    without its value, a value for a flag that takes none, an unknown flag, and a positional word
    too many.
    """
    found, same, ignored = Words([], [], []), same or {}, ignored or {}
    refuse_unknown_flags(argv, (*options, *same, *ignored))
    takes = {name: 0 if option.value else 1 for name, option in options.items()}
    told = {name: option.help for name, option in options.items()}
    for name, values in sorted_words(argv, dict.fromkeys(ignored, 0) | takes, same=same, told=told):
        if name in ignored:
            found.notes.append(f"{name} has no effect: {ignored[name]}")
        elif name:
            option = options[name]
            value = option.value or values[0]
            found.overrides.extend(spell(name, value, argv) or [_override(option, value)])
        elif (word := values[0]).startswith(("-", "+", "~")) or "=" in word or not num_places:
            found.overrides.extend(values)
        elif len(found.places) == num_places:
            what = "two output folders" if num_places == 1 else "too many words"
            given = " and ".join(map(repr, [*found.places, word]))
            raise UserError(f"{what}, {given}; key=value sets a key")
        else:
            found.places.append(word)
    return found


def sorted_words(
    argv: Sequence[str],
    takes: Mapping[str, Takes],
    *,
    same: Mapping[str, str] | None = None,
    told: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """The flags of `takes`, each with its values; other words come in their order, named "".

    A flag that all scripts read and `takes` lacks is such a word, with its value beside it. same:
    other spellings of flags. told: what the error for a missing value adds. Raises UserError for a
    flag without its values, and for a value behind the = of one that takes none.
    """
    words, same, told = list(argv), same or {}, told or {}
    while words:
        word = words.pop(0)
        spelling, equals, inline = word.partition("=")
        name = same.get(spelling, spelling)
        wanted = takes.get(name)
        if name not in takes:
            word = f"{name}{equals}{inline}"
            yield "", [word, words.pop(0)] if word in TAKES_VALUE and words else [word]
            continue
        if wanted == 0 and equals:
            raise UserError(f"{name} takes no value, got {inline!r}")
        count = wanted if isinstance(wanted, int) else int(wanted is not None)
        values = [inline] if equals else words[:count]
        flags = [value for value in values if value.startswith("--") or value in same]
        if len(values) < count or "" in values or (flags and not equals):
            needed = f"{count} values" if count > 1 else "a value"
            raise UserError(f"{name} needs {needed}{f': {told[name]}' if name in told else ''}")
        if not equals:
            del words[:count]
            while callable(wanted) and words and wanted(words[0]):
                values.append(words.pop(0))
        yield name, values


def backbone_words(name: str, words: Sequence[str]) -> list[str]:
    """Overrides for a model name: a config of that name, else a model of timm or of a hub.

    The config is one of ours, or lies beside the run file that the command line `words` names.
    UserError for an unknown name.
    """
    ours = (CONFIGS / "backbone" / f"{name}.yaml").is_file()
    if not ours and name not in files_beside(words, "backbone"):
        import timm  # late, as --help and our own models do not need it

        if ":" in name or timm.is_model(name.split(".")[0]):
            return ["backbone=timm", f"backbone.model_name={quoted(name)}"]
        if "," not in name:  # a list needs -m; parsing the config reports that
            raise UserError(f"--model: {unknown_model(name)}")
    return [f"backbone={name}"]


def spell_model(name: str, value: str, words: Sequence[str]) -> list[str] | None:
    """`spell` for `read_words`, where --model is the only flag that is not simply key=value."""
    return backbone_words(value, words) if name == "--model" else None


def unknown_model(name: str) -> str:
    """The error line for an unknown model, with the nearest names of ours and of timm."""
    import timm

    hint = nearest_family(name, [*backbone_names(), *timm.list_models()])
    return f"there is no model {name!r}, neither of ours nor of timm{hint}"


def files_beside(words: Sequence[str], group: str) -> dict[str, Path]:
    """The files of a group beside the run file that the words name, by the option's name."""
    file = _config_file(words)
    found = (find_file(file).parent / group).glob("*.yaml") if file else ()
    return {path.stem: path for path in found}


def names_backbone(words: Sequence[str], default: str = "") -> bool:
    """Whether overrides or a config file name the net; if not, the weights may.

    default: the config that the command takes without a file; its net counts as not named.
    UserError for a config file that is not there.
    """
    named = ("backbone=", "backbone._target_=", "--model")
    if any(word.lstrip("+").startswith(named) for word in words):
        return True
    file = _config_file(words)
    return file is not None and chooses_backbone(find_file(file), default)


def _config_file(words: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # Without a file behind it the next reader complains.
    parser.add_argument("--config-file", "--config", nargs="?", dest="file")
    return parser.parse_known_args(words)[0].file


def folder_of_model(words: Sequence[str], name: str) -> list[str]:
    """The override that puts the results of a net into their own folder in runs/`name`.

    The folder is called after the model, without one after the run or file of the weights. Empty if
    the words already name a folder, or if they name no net.
    """
    values = dict(word.partition("=")[::2] for word in words)
    model = values.get("backbone.model_name", values.get("backbone", ""))
    model = model or _name_of_weights(values.get("weights", "").strip("'"))
    said = ("--config", "--output", "output_dir=", "--name", "name=")
    if not model or any(word.startswith(said) for word in words):
        return []
    plain_name = re.sub(r"[^\w.-]+", "_", model).strip("_")
    return [f"name={quoted(f'{name}/{plain_name}')}"]


def help_page(rows: Mapping[str, str], *, usage: str = "") -> str:
    """The text of --help before the flags and keys of all scripts; rows: flag -> meaning."""
    lines = [f"{sys.modules['__main__'].__doc__ or ''}"]
    lines += [f"usage: {usage}", ""] if usage else []
    lines.append("flags of this command (they come before those below of the same name):")
    width = max(map(len, rows), default=0)
    lines += [f"  {name:<{width}}  {meaning}" for name, meaning in rows.items()]
    return "\n".join(lines) + "\n\nall other flags and keys:\n"


def meanings(
    options: Mapping[str, Option], ignored: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The rows of `help_page` for options, and for ignored flags with the reason."""
    rows = {
        name: f"{option.help} ({option.key}{f'={option.value}' if option.value else ''})"
        for name, option in options.items()
    }
    return rows | {name: f"accepted: {why}" for name, why in (ignored or {}).items()}


def tell(notes: Sequence[str]) -> None:
    """Print notes on a command line, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note)


def _name_of_weights(weights: str) -> str:
    if weights in ("", "null"):
        return ""
    path = Path(weights)
    if path.parts[-2:] == Path(EXPORTED).parts:  # the file that every run calls the same
        path = path.parents[1]
    return path.stem if path.suffix and not path.is_dir() else path.resolve().name


def _override(option: Option, value: str) -> str:
    bare = option.value is not None or not option.text
    return f"{option.key}={value if bare else quoted(value)}"

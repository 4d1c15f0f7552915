"""Which tar files the shards of a data set are: by pattern, or by split in a folder."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from utils.data.images import existing_folder
from utils.errors import UserError

# A split by the words in the names of its shards, or the name of the folder they lie in.
WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# How a split is given that lies nowhere yet.
GIVEN = {
    "train": "data.root=FOLDER, or data.train_shards=PATTERN",
    "val": "data.root=FOLDER, data.val_shards=PATTERN, or data.val_fraction=0.1 of train",
    "test": "data.root=FOLDER",
}
SHOWN = 3  # names in a message


def expand(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The shards of one path, several, or a pattern, as absolute paths in this order.

    A pattern has ranges `{000000..000146}`, choices `{a,b}`, or the shell's `*`, `?` and `[...]`; a
    folder stands for the tar files in it. UserError for a shard that does not exist.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    if not given or not all(os.fspath(one) for one in given):
        raise UserError("no shards were given; say which, as 'FOLDER/train-{000000..000146}.tar'")
    files = [file for one in given for file in _files_of(os.fspath(one))]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} shards are missing: {_some(missing)}")
    if twice := sorted(file for file, times in Counter(files).items() if times > 1):
        raise UserError(f"shards are given twice: {_some(twice)}")
    return files


def shards_of_split(root: str | os.PathLike | None, split: str) -> list[str]:
    """The shards of a split in a folder: `ROOT/train/*.tar`, or `ROOT/*.tar` with a word `train`.

    UserError where there are none, where their numbers have a gap, and where they are not all
    written yet.
    """
    if split not in WORDS:
        raise UserError(f"no split {split!r} in shards; there are {', '.join(WORDS)}")
    if root is None or not os.fspath(root):
        raise UserError(f"no shards of {split} were given; say where they are: {GIVEN[split]}")
    folder = Path(existing_folder(root))
    unfinished = plan_file(folder, split)
    if unfinished.exists():
        raise UserError(
            f"the shards of {split} in {folder} are not all written: the same make_shards.py again "
            f"goes on with them (or remove {unfinished})"
        )
    files = [file for word in WORDS[split] for file in _tars(folder / word)]
    if not files:
        files = [file for file in _tars(folder) if set(_words(file)) & set(WORDS[split])]
    if not files:
        there = _tars(folder)
        holds = f"; it holds {_some([os.path.basename(file) for file in there])}" if there else ""
        other = "" if split == "test" else f" (data.{split}_shards=PATTERN names others)"
        raise UserError(
            f"no shards of {split} in {folder}: looked for {split}/*.tar and *{split}*.tar{holds}"
            f"{other}"
        )
    missing = list(_gaps(files))
    if missing:
        raise UserError(
            f"{len(missing)} shards of {split} are missing between the others in {folder}: "
            f"{_some(missing)} (data.{split}_shards=PATTERN reads those that are there)"
        )
    return files


def plan_file(folder: Path, split: str) -> Path:
    """What lies in a folder while its shards are being written."""
    return folder / f".{split}.plan.json"


def _files_of(pattern: str) -> list[str]:
    if re.match(r"[a-z0-9]+://|pipe:", pattern):
        raise UserError(f"shards are read from disk, not from {pattern}; bring them here first")
    found: list[str] = []
    for one in _braces(os.path.abspath(os.path.expanduser(pattern))):
        if os.path.isdir(one):
            matched = _tars(Path(one))
        elif has_magic(one) and not os.path.exists(one):
            matched = sorted(glob(one))
        else:
            matched = [one]
        if not matched:
            raise UserError(f"no shard is named like {one}")
        found += matched
    return found


def _braces(pattern: str) -> Iterator[str]:
    """All words of a pattern with ranges and choices in braces."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) for part in parts[1::2]]
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain(*zip(parts[::2], [*chosen, ""], strict=True)))


def _choices(text: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if ends is None:
        if "," not in text:
            raise UserError(f"{{{text}}} in {pattern} is no range as {{000000..000146}}")
        return text.split(",")
    first, last = ends.groups()
    if int(first) > int(last):
        raise UserError(f"{{{text}}} in {pattern} runs backwards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _tars(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        os.fspath(path) for path in folder.glob("*.tar") if path.is_file() and path.name[0] != "."
    )


def _words(file: str) -> list[str]:
    return re.split(r"[^a-z]+", Path(file).stem.lower())


def _gaps(files: Sequence[str]) -> Iterator[str]:
    """Names that the numbers of the others leave room for; `x-00003-of-00100` tells the last."""
    series: dict[tuple[str, str], list[str]] = {}
    for file in files:
        found = re.fullmatch(r"(.*?)(\d+)(-of-\d+)?", Path(file).stem)
        if found:
            series.setdefault((found[1], found[3] or ""), []).append(found[2])
    for (start, end), texts in series.items():
        numbers = {int(text) for text in texts}
        padded = any(text.startswith("0") for text in texts)
        first = 0 if padded and min(numbers) > 1 else min(numbers)
        last = int(end.removeprefix("-of-")) - 1 + min(first, 1) if end else max(numbers)
        for number in range(first, max(last, max(numbers)) + 1):
            if number not in numbers:
                yield f"{start}{number:0{len(texts[0])}d}{end}.tar"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

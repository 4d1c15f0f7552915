"""Where each image lies in tar shards of the WebDataset layout, and the index that remembers it.

A shard is an uncompressed tar file. Members whose paths agree up to the first dot of the file name
are one sample; what follows the dot says, in lower case, which part of it a member is.

    imagenet-train-000000.tar
        n01440764/n01440764_10026.jpg     an image
        n01440764/n01440764_10026.cls     its class: 0
        n01440764/n01440764_10026.json    or {"label": 0, ...}

Such shards are written by `utils.data.shard_writer`, webdataset, img2dataset and plain `tar`. Their
headers are listed once; the index, plain numpy arrays without pickles, lies beside the shards, or
in a cache folder where these cannot be written. It counts while shards keep size and time of
change. webdataset's own reader by number, wids, lists a shard anew whenever it was not among the
last ten, and knows no paths longer than 100 characters; so it is not used.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from utils.data.images import EXTENSIONS, folder_order
from utils.data.tar_members import Member, tar_members
from utils.errors import UserError
from utils.only_one import only_one
from utils.progress import RateLines
from utils.whole_file import whole_file

VERSION = 1  # to be raised with every change of what an index holds
NUM_THREADS = 4  # shards listed at a time: where the file system is slow, it is waited for

logger = logging.getLogger(__name__)


class ShardIndex(NamedTuple):
    """One entry for each image, in the order of class folder, folder and name."""

    shard: np.ndarray  # int32: number of the shard
    offset: np.ndarray  # int64: of the first byte
    size: np.ndarray  # int64: bytes
    name: np.ndarray  # bytes: path in the shard
    cls: np.ndarray  # bytes: what `.cls` says; empty without one
    json: np.ndarray  # bytes: what `.json` says under the label's key; empty where it says nothing


class _Sample:
    """Parts of one sample that were met so far."""

    def __init__(self) -> None:
        self.parts: set[str] = set()
        self.name, self.part, self.offset, self.size = "", "", 0, 0
        self.cls, self.json = b"", b""


def shard_index(
    shards: Sequence[str],
    *,
    image: str | None = None,
    label_key: str = "label",
    index_folder: str | os.PathLike | None = None,
) -> ShardIndex:
    """The images of all shards, from the stored index, or by listing them and storing it.

    image: the part that holds the image, such as `jpg` or `left.jpg`; None for the one that there
    is. label_key: of the json. index_folder: where the index lies, instead of beside the shards or
    in the cache. Any number of processes may call this at once: one lists, the others wait. The
    index appears whole. UserError for a shard that is cut, compressed, without image, or not clear.
    """
    stamps = np.array([_stamp(shard) for shard in shards], dtype=np.int64)
    places = _places(shards, image, label_key, index_folder)
    for place in places:
        if (found := _load(place, stamps)) is not None:
            return found
    built: ShardIndex | None = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with only_one(f"{place}.lock"):
                found = _load(place, stamps)  # another process may have been first
                if found is None:
                    found = built = built or _build(shards, image, label_key)
                    _store(place, found, stamps)
            return found
        except OSError as error:
            logger.info("no index of shards at %s: %s", place, error.strerror or error)
    logger.warning(
        "the index of %s cannot be stored, so its shards are listed at every start; "
        "data.index_folder=FOLDER names a folder that can be written",
        os.path.dirname(shards[0]),
    )
    return built or _build(shards, image, label_key)


def _build(shards: Sequence[str], image: str | None, label_key: str) -> ShardIndex:
    progress = RateLines("listing shards", len(shards), "shards")
    tables = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for table in pool.map(lambda shard: _list_shard(shard, image, label_key), shards):
            tables.append(table)
            progress.add()
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(t.name) for t in tables])
    index = ShardIndex(
        numbers, *(np.concatenate(column) for column in list(zip(*tables, strict=True))[1:])
    )
    _tell_repeated(index, shards)
    keys = [folder_order(os.fsdecode(name)) for name in index.name.tolist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return ShardIndex(*(column[order] for column in index))


def _list_shard(shard: str, image: str | None, label_key: str) -> ShardIndex:
    """The images of one shard, in its order."""
    samples: dict[str, _Sample] = {}
    try:
        with open(shard, "rb") as file:
            for member in tar_members(file, shard):
                _add_member(samples, member, file, shard, image, label_key)
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror or error}") from None
    found = [sample for sample in samples.values() if sample.name]
    if not found:
        looked = image or " ".join(ending[1:] for ending in EXTENSIONS)
        raise UserError(f"shard {shard} holds no image; looked for members that end in {looked}")
    return ShardIndex(
        np.zeros(len(found), dtype=np.int32),
        np.array([sample.offset for sample in found], dtype=np.int64),
        np.array([sample.size for sample in found], dtype=np.int64),
        np.array([os.fsencode(sample.name) for sample in found]),
        np.array([sample.cls for sample in found]),
        np.array([sample.json for sample in found]),
    )


def _add_member(
    samples: dict[str, _Sample],
    member: Member,
    file: BinaryIO,
    shard: str,
    image: str | None,
    label_key: str,
) -> None:
    """Note what a member says of its sample."""
    name = member.name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    stem, dot, part = base.partition(".")
    if not stem or not dot:  # a hidden file, or none of a sample
        return
    part, where = part.lower(), f"{shard}:{name}"
    is_image = part == image if image else f".{part}".endswith(EXTENSIONS)
    if not member.is_whole:
        if is_image:
            raise UserError(f"{where} is a link or sparse; shards hold whole files (tar -h)")
        return
    sample = samples.setdefault(f"{folder}/{stem}", _Sample())
    if part in sample.parts:
        raise UserError(f"{where}: its key comes twice in this shard")
    sample.parts.add(part)
    if is_image:
        if sample.name:
            raise UserError(
                f"{where} and {os.path.basename(sample.name)} have one key, so it is unclear which "
                f"is the image; data.image={sample.part} or data.image={part} says it"
            )
        sample.name, sample.part = name, part
        sample.offset, sample.size = member.offset, member.size
    elif part == "cls":
        file.seek(member.offset)
        sample.cls = file.read(member.size).strip()
    elif part == "json":
        file.seek(member.offset)
        sample.json = _label_in(file.read(member.size), label_key, where)


def _label_in(text: bytes, key: str, where: str) -> bytes:
    """The label in a json as text; empty where there is none."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no readable json: {error}") from None
    value = content.get(key) if isinstance(content, dict) else None
    if value is None:
        return b""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{where}: {key} is {value!r}; a label is a whole number or a name")
    return str(value).strip().encode()


def _tell_repeated(index: ShardIndex, shards: Sequence[str]) -> None:
    """A sample in two shards may be meant so; more often a shard was written twice."""
    names, first, counts = np.unique(index.name, return_index=True, return_counts=True)
    if (again := np.flatnonzero(counts > 1)).size:
        example = names[again[0]]
        where = [shards[number] for number in index.shard[index.name == example][:2]]
        logger.warning(
            "%d names come in more than one shard, as %s in %s",
            again.size,
            os.fsdecode(example),
            " and ".join(where),
        )


def _stamp(shard: str) -> tuple[int, int]:
    try:
        status = os.stat(shard)
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def _places(
    shards: Sequence[str], image: str | None, label_key: str, index_folder: str | os.PathLike | None
) -> list[Path]:
    """Candidate paths of the index, named by a hash of the shards' paths (relative beside them)."""
    beside = Path(shards[0]).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))

    def place(folder: Path, names: Sequence[str]) -> Path:
        told = json.dumps([VERSION, image, label_key, *names])
        digest = hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:12]
        return folder / f".{Path(shards[0]).stem}.{digest}.index.npz"

    if index_folder is not None:
        return [place(Path(index_folder).expanduser().absolute(), shards)]
    return [
        place(beside, [os.path.relpath(s, beside) for s in shards]),
        place(cache / "octic" / "shards", shards),
    ]


def _load(place: Path, stamps: np.ndarray) -> ShardIndex | None:
    """The stored index, if there is one, of these very shards, and whole."""
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamps"], stamps):
                return None
            return ShardIndex(*(stored[field] for field in ShardIndex._fields))
    except Exception:  # whatever is wrong with it, it is written anew
        return None


def _store(place: Path, index: ShardIndex, stamps: np.ndarray) -> None:
    with whole_file(place) as partial, partial.open("wb") as file:
        np.savez(file, stamps=stamps, **index._asdict())

"""Bring the archives of the segmentation data, each once, whatever happens on the way:

    python -m utils.data.download ade20k ROOT     ROOT/ADEChallengeData2016
    python -m utils.data.download voc2012 ROOT    ROOT/VOCdevkit/VOC2012
    python -m utils.data.download sbd ROOT        ROOT/benchmark_RELEASE/dataset

A download that was cut goes on where it stopped. Nothing is unpacked before its checksum is right,
and a folder is there whole or not at all. An archive that lies in ROOT already is not downloaded.
"""

import http
import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from filelock import FileLock
from torchvision.datasets.sbd import SBDataset
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from utils.errors import UserError

ATTEMPTS = 5  # connections that bring nothing, before giving up
TIMEOUT_S = 60.0
PERIOD_S = 10.0  # between two lines of progress
CHUNK_BYTES = 1 << 20
MB = 1e6


class Archive(NamedTuple):
    """One file to bring, and the folder to take out of it."""

    url: str
    filename: str
    md5: str
    folder: str  # inside the archive and inside ROOT


ARCHIVES = {
    "ade20k": Archive(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        "ADEChallengeData2016.zip",
        "7328b3957e407ddae1d3cbf487f149ef",
        "ADEChallengeData2016",
    ),
    "voc2012": Archive(
        DATASET_YEAR_DICT["2012"]["url"],
        DATASET_YEAR_DICT["2012"]["filename"],
        DATASET_YEAR_DICT["2012"]["md5"],
        "VOCdevkit/VOC2012",
    ),
    "sbd": Archive(SBDataset.url, SBDataset.filename, SBDataset.md5, "benchmark_RELEASE/dataset"),
}


def bring(name: str, root: Path, *, archives: dict[str, Archive] = ARCHIVES) -> Path:
    """The unpacked folder of an archive in `root`, downloaded if it is not there.

    Any number of processes may call this at once: one works, the others wait for it. UserError in
    one line for whatever goes wrong, with what to do.
    """
    if name not in archives:
        raise UserError(f"no archive {name!r}; there are {', '.join(archives)}")
    archive, root = archives[name], Path(root).expanduser().absolute()
    target = root / archive.folder
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{archive.filename}.lock"):
            if not target.is_dir():
                file = root / archive.filename
                if not file.exists():
                    _download(name, archive, file)
                elif not check_integrity(file, archive.md5):
                    raise UserError(_wrong(archive, file, "move it away and run this again"))
                _unpack(archive, file, target)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot bring {name} to {root}: {reason}") from None
    return target


def _download(name: str, archive: Archive, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    failures, reason = 0, "no answer"
    while failures < ATTEMPTS:
        before = _size(part)
        try:
            if _fetch(archive.url, part, file.name):
                break
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"the server says {error.code} {error.reason}"
            if error.code < 500:
                failures = ATTEMPTS
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reason = str(getattr(error, "reason", error) or type(error).__name__)
        except ConnectionError as error:
            reason = error.strerror or type(error).__name__
        failures = failures + 1 if _size(part) <= before else 0
    else:
        raise UserError(_by_hand(name, archive, file, reason))
    print(f"{file.name}: comparing the checksum", flush=True)
    if not check_integrity(part, archive.md5):
        part.unlink()
        raise UserError(
            _wrong(archive, file, "what came was removed; run this again, and if it is wrong")
            + f" again, the file at {archive.url} is another one than this code knows"
        )
    part.replace(file)


def _fetch(url: str, part: Path, label: str) -> bool:
    """Append to `part` what it lacks; whether it is complete. A server without Range starts anew.

    One that was complete already is answered by 416 and is for the checksum to judge.
    """
    have = _size(part)
    headers = {"User-Agent": "octic"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True
        raise
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        progress = _Progress(label, have, total)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                progress.add(len(chunk))
        return total is None or progress.done >= total


class _Progress:
    """A line every few seconds with rate and time left."""

    def __init__(self, label: str, done: int, total: int | None) -> None:
        self.label, self.done, self.total, self.first = label, done, total, done
        self.start = self.last = time.monotonic()
        size = f"{total / MB:,.0f} MB" if total else "a file of unknown size"
        held = f", {done / MB:,.0f} MB are there" if done else ""
        print(f"{label}: {size}{held}", flush=True)

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        finished = self.done == self.total
        if not finished and now - self.last < PERIOD_S:
            return
        self.last = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        line = f"{self.label}: {self.done / MB:,.0f}"
        if self.total is None:
            line += f" MB, {rate / MB:.1f} MB/s"
        else:
            left = "done" if finished else f"{(self.total - self.done) / rate:,.0f} s left"
            line += f" of {self.total / MB:,.0f} MB, {rate / MB:.1f} MB/s, {left}"
        print(line, flush=True)


def _unpack(archive: Archive, file: Path, target: Path) -> None:
    print(f"{file.name}: unpacking", flush=True)
    with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as temporary:
        extract_archive(str(file), temporary)
        unpacked = Path(temporary, archive.folder)
        if not unpacked.is_dir():
            raise UserError(f"{file} holds no folder {archive.folder}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(target)
    print(f"{target} is complete; {file} is no longer needed", flush=True)


def _by_hand(name: str, archive: Archive, file: Path, reason: str) -> str:
    return (
        f"cannot download {archive.url}: {reason}; run this again to go on, or put the file "
        f"(md5 {archive.md5}) at {file} by hand and run `python -m utils.data.download {name} "
        f"{file.parent}`, which unpacks it without a network"
    )


def _wrong(archive: Archive, file: Path, what_to_do: str) -> str:
    return f"{file} has another checksum than md5 {archive.md5}; {what_to_do}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(argv: list[str]) -> None:
    """The commands of the module's docstring."""
    if len(argv) != 2 or argv[0] not in ARCHIVES:
        names = "|".join(ARCHIVES)
        print(f"usage: python -m utils.data.download {names} ROOT", file=sys.stderr)
        raise SystemExit(2)
    try:
        print(bring(argv[0], Path(argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])

"""Bring the archives of the segmentation data, each once, whatever happens on the way:

    python -m utils.data.download ade20k ROOT     ROOT/ADEChallengeData2016
    python -m utils.data.download voc2012 ROOT    ROOT/VOCdevkit/VOC2012
    python -m utils.data.download sbd ROOT        ROOT/benchmark_RELEASE/dataset

A download that was cut goes on where it stopped. Nothing is unpacked before its checksum is right,
and a folder is there whole or not at all. An archive that lies in ROOT already is not downloaded.
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torchvision.datasets.sbd import SBDataset
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from utils.command import Parser, as_command
from utils.console import say
from utils.download import Unavailable, download
from utils.errors import UserError
from utils.only_one import only_one


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
        with only_one(root / f".{archive.filename}.lock"):
            if not target.is_dir():
                file = root / archive.filename
                if not file.exists():
                    _download(name, archive, file)
                elif not check_integrity(file, archive.md5):
                    raise UserError(_wrong(archive, file, "move it away and run this again"))
                _unpack(archive, file, target)
    except OSError as error:
        raise UserError(f"cannot bring {name} to {root}: {error.strerror or error}") from None
    return target


def _download(name: str, archive: Archive, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        download(archive.url, part, file.name)
    except Unavailable as error:
        raise UserError(_by_hand(name, archive, file, str(error))) from None
    say(f"{file.name}: comparing the checksum")
    if not check_integrity(part, archive.md5):
        part.unlink()
        raise UserError(
            _wrong(archive, file, "what came was removed; run this again, and if it is wrong")
            + f" again, the file at {archive.url} is another one than this code knows"
        )
    part.replace(file)


def _unpack(archive: Archive, file: Path, target: Path) -> None:
    say(f"{file.name}: unpacking")
    with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as temporary:
        extract_archive(str(file), temporary)
        unpacked = Path(temporary, archive.folder)
        if not unpacked.is_dir():
            raise UserError(f"{file} holds no folder {archive.folder}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(target)
    say(f"{target} is complete; {file} is no longer needed")


def _by_hand(name: str, archive: Archive, file: Path, reason: str) -> str:
    return (
        f"cannot download {archive.url}: {reason}; run this again to go on, or put the file "
        f"(md5 {archive.md5}) at {file} by hand and run `python -m utils.data.download {name} "
        f"{file.parent}`, which unpacks it without a network"
    )


def _wrong(archive: Archive, file: Path, what_to_do: str) -> str:
    return f"{file} has another checksum than md5 {archive.md5}; {what_to_do}"


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    """The commands of the module's docstring."""
    parser = Parser(
        prog="python -m utils.data.download",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=ARCHIVES, help="of the archive")
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder that it comes to")
    asked = parser.parse_args(argv)
    print(bring(asked.name, asked.root))


if __name__ == "__main__":
    main()

"""Corrupted image files: each is read, or refused in one line that names it; nothing crashes.

Through both readers: whole images by Pillow, as evaluation reads, and files that are decoded late,
whole or reduced, as training does.
"""

import io
import pickle
import random
import re
import shutil
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.rehearsal.forks import Child, say
from utils.data.encoded import EncodedImage
from utils.data.images import EXTENSIONS, ImageError, read_file, read_image

# What libjpeg and libtiff print by themselves, of files they read in spite of it, too.
NOTES = re.compile(
    r"(Corrupt JPEG data|Premature end of JPEG|Warning: unknown JFIF"
    r"|tempfile\.tif: |(TIFF|LZW)\w*: )"
)
CHUNK = 50  # images per child: a decoder that crashes takes no more with it
Corrupt = Callable[[bytes, random.Random], bytes]


def good_files() -> dict[str, bytes]:
    """One picture in every format and kind we meet, by file ending."""
    pixels = np.random.default_rng(0).normal(128, 40, (48, 60, 3)).clip(0, 255)
    image = Image.fromarray(pixels.astype(np.uint8)).resize((120, 96))
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpg": (image, {"quality": 90}),
        "progressive.jpg": (image, {"progressive": True}),
        "grey.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "png": (image, {}),
        "alpha.png": (image.convert("RGBA"), {}),
        "palette.png": (image.convert("P"), {}),
        "deep.png": (Image.fromarray((pixels[..., 0] * 257).astype(np.uint16)), {}),
        "gif": (image.convert("P"), {}),
        "bmp": (image, {}),
        "tif": (image, {"compression": "tiff_lzw"}),
        "webp": (image, {}),
        "ppm": (image, {}),
    }
    found = {}
    for ending, (picture, options) in kinds.items():
        file = io.BytesIO()
        name = {"jpg": "JPEG", "tif": "TIFF"}.get(ending.rpartition(".")[2])
        picture.save(file, name or ending.rpartition(".")[2].upper(), **options)
        found[ending] = file.getvalue()
    return found


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 3, 30, 300])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_header(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(80, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice([0, 1, 2, 10, draw.randrange(len(data)), len(data) - 1])]


def wipe(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    length = min(draw.choice([4, 64, 4096]), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def replace_type(data: bytes, draw: random.Random) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", data)
    return draw.choice(
        [
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            pickle.dumps({"image": data}),
            archive.getvalue(),
            bytes(1000),
            draw.randbytes(3000),
            "ÿØÿà".encode() + data,
            b"%PDF-1.4\n",
            b"\x89HDF\r\n\x1a\n" + bytes(100),
            b"\xff\xd8\xff" + draw.randbytes(500),
            b"\x89PNG\r\n\x1a\n" + draw.randbytes(500),
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        ]
    )


def giant_header(data: bytes, draw: random.Random) -> bytes:
    """Sizes that no memory holds, in the few bytes of a header."""
    side = draw.choice([0, 1, 9000, 20000, 65535])
    if data.startswith(b"\x89PNG"):
        sides = struct.pack(">II", *(draw.choice([side, 2**31 - 1, 2**32 - 1]) for _ in range(2)))
        body = data[12:16] + sides + data[24:29]
        import zlib

        return data[:12] + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    if data.startswith(b"\xff\xd8"):
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            if (at := data.find(marker)) > 0:
                return data[: at + 5] + struct.pack(">HH", side, 65535) + data[at + 9 :]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", side, draw.choice([-1, 2**31 - 1])) + data[26:]
    if data.startswith(b"GIF"):
        return data[:6] + struct.pack("<HH", side, 65535) + data[10:]
    if data.startswith(b"P6"):
        return b"P6\n%d 4294967295\n255\n" % side + data[20:]
    return flip_header(data, draw)


CORRUPTIONS: dict[str, Corrupt] = {
    "bits flipped": flip_bits,
    "header overwritten": flip_header,
    "truncated": truncate,
    "zeros in it": wipe,
    "another type": replace_type,
    "giant sizes": giant_header,
}


def rehearse(count: int, folder: Path, *, seed: int = 0, say: Any = say) -> dict[str, Any]:
    """Corrupt and read `count` images; returns the figures, `faults` with what was wrong."""
    begun = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = write_corrupted(count, folder, seed=seed)
    ends: Counter[str] = Counter()
    faults, notes = [], 0
    for first in range(0, count, CHUNK):
        chunk = paths[first : first + CHUNK]
        outcome = Child(lambda chunk=chunk: read_all(chunk), folder / "logs").wait(300)
        lines = outcome.stdout.splitlines()
        ends.update(line.partition(" ")[0] for line in lines)
        faults += [line for line in lines if line.startswith("FAULT")]
        said = [line for line in outcome.stderr.splitlines() if not NOTES.match(line)]
        notes += len(outcome.stderr.splitlines()) - len(said)
        if outcome.code != 0 or said or len(lines) != len(chunk):
            last = chunk[min(len(lines), len(chunk) - 1)]
            faults.append(f"FAULT {last}: exit {outcome.code}, said {said[-5:]}")
    faults += train_on(folder)
    for fault in faults:
        say(fault)
    return {
        "images": count,
        "read": ends["read"],
        "refused": ends["refused"],
        "notes of C libraries": notes,
        "faults": len(faults),
        "seconds": round(time.monotonic() - begun),
    }


def write_corrupted(count: int, folder: Path, *, seed: int) -> list[Path]:
    """`count` corrupted files, of every kind in turn."""
    draw, files = random.Random(seed), good_files()
    paths = []
    for number in range(count):
        kind = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
        ending = draw.choice(list(files))
        data = CORRUPTIONS[kind](files[ending], draw)
        other = f".{ending.rpartition('.')[2]}"
        if kind == "another type":
            other = draw.choice(EXTENSIONS)
        path = folder / f"{number:05d}_{kind.replace(' ', '_')}{other}"
        path.write_bytes(data)
        paths.append(path)
    return paths


def read_all(paths: list[Path]) -> None:
    """A line for each: read, refused with the reason, or FAULT."""
    for path in paths:
        answers = {}
        for name, read in READERS.items():
            try:
                read(path)
                answers[name] = "read"
            except ImageError as error:
                line = str(error)
                good = "\n" not in line and path.name in line and len(error.reason) > 5
                answers[name] = f"refused {line}" if good else f"FAULT {name}: {line!r}"
            except BaseException as error:
                answers[name] = f"FAULT {name} {path.name}: {type(error).__name__}: {error}"
        worst = sorted(answers.values(), key=lambda answer: answer[:2] != "FA")[0]
        print(worst.replace("\n", "\\n"), flush=True)


def train_on(folder: Path) -> list[str]:
    """A training meets the folder: it stops with one line, or skips what it cannot read."""
    from tests.rehearsal.kills import STEPS, small_config, train_small

    (folder / "good").mkdir()
    for number in range(16):
        (folder / "good" / f"{number}.png").write_bytes(good_files()["png"])
    config, faults = small_config(1), []
    images = {"_target_": "utils.data.images.ImageFolder", "root": str(folder), "labels": False}
    for on_error, code in (("raise", 2), ("skip", 0)):
        recipe = config["recipe"] | {"on_error": on_error}
        asked = config | {"recipe": recipe, "data": {"train": images, "val": None}}
        run = folder / "runs" / on_error
        outcome = Child(lambda c=asked, run=run: train_small(c, run), folder / "logs").wait(300)
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        told = code == 0 or (len(errors) == 1 and "cannot read image" in errors[0])
        if outcome.code != code or "Traceback" in outcome.stderr or not told:
            faults.append(
                f"FAULT training with on_error={on_error}: {outcome.code} {outcome.stderr[-900:]!r}"
            )
        if code == 0 and f"step {STEPS}/" not in outcome.stdout:
            faults.append("FAULT training with on_error=skip did not come to its end")
    return faults


def _decode(path: Path, reduction: float) -> None:
    EncodedImage(read_file(str(path)), str(path)).decode(reduction)


READERS: dict[str, Callable[[Path], object]] = {
    "whole": read_image,
    "late": lambda path: _decode(path, 1.0),
    "reduced": lambda path: _decode(path, 4.0),
}

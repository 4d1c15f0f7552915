"""Embed pictures as data URIs, scaled down so that all together stay within a budget."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

BUDGET_BYTES = 3_300_000  # a third more as base64
WIDEST = 1400
NARROWEST = 240
WIDE_SHAPE = 1.6  # width / height
COLUMN = 520  # pixels, about the widest column of the page
KINDS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
# Where even the narrowest form of every picture would not fit.
MOST_PICTURES = 60


def embed(paths: Sequence[Path], budget: int = BUDGET_BYTES) -> dict[Path, str]:
    """A data URI for each of the first 60 readable pictures, together no more than `budget` bytes.

    Small pictures are embedded unchanged; the budget that they leave is shared by the others.
    """
    found: dict[Path, str] = {}
    # One that was removed meanwhile comes first, and is not readable.
    shares = sorted(paths[:MOST_PICTURES], key=lambda path: path.exists() and path.stat().st_size)
    left = budget
    for index, path in enumerate(shares):
        content = shrink(path, left // (len(shares) - index))
        if content is not None:
            kind, data = content
            left -= len(data)
            found[path] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return found


def is_wide(path: Path) -> bool:
    """Whether a readable picture is too wide to be seen in one column of the page."""
    with Image.open(path) as picture:
        return picture.width > max(WIDE_SHAPE * picture.height, COLUMN)


def shrink(path: Path, most: int) -> tuple[str, bytes] | None:
    """Kind and bytes of a picture in at most `most` bytes; None if too large or unreadable."""
    try:
        with Image.open(path) as picture:
            picture.load()
            kind = KINDS.get(picture.format or "")
            if kind and picture.width <= WIDEST and path.stat().st_size <= most:
                return kind, path.read_bytes()
            width = min(picture.width, WIDEST)
            while True:
                smaller = min(_encodings(picture, width), key=lambda entry: len(entry[1]))
                if len(smaller[1]) <= most:
                    return smaller
                if width <= NARROWEST:
                    return None
                # Bytes go with the area.
                shrinkage = math.sqrt(most / len(smaller[1]))
                width = max(NARROWEST, int(width * min(0.9, 0.95 * shrinkage)))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError):
        return None


def _encodings(picture: Image.Image, width: int) -> list[tuple[str, bytes]]:
    height = max(1, round(picture.height * width / picture.width))
    if picture.mode not in ("RGB", "RGBA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", resized.size, "white")
    flat.paste(resized, mask=resized.getchannel("A") if resized.mode == "RGBA" else None)
    written = []
    for kind, image, options in (
        ("png", resized, {}),
        ("jpeg", flat, {"quality": 85}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind.upper(), **options)
        written.append((kind, buffer.getvalue()))
    return written

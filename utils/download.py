"""Bring a file from an address: a download that was cut goes on where it stopped."""

import http
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from utils.console import say
from utils.progress import RateLines

ATTEMPTS = 5  # connections that bring nothing, before giving up
TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20
MB = 1e6


class Unavailable(Exception):
    """The message says why an address gives no file."""


def download(address: str, part: Path, label: str) -> None:
    """Append to `part` what it lacks of the file at `address`, with progress below `label`.

    Raises Unavailable where the server refuses, or `ATTEMPTS` connections bring nothing more; what
    came until then stays in `part`, and the next call goes on from there, or begins anew if the
    server has another file at the address by then. A file beside `part` says of which it is.
    """
    failures, reason = 0, "no answer"
    while failures < ATTEMPTS:
        before = _size(part)
        try:
            if _fetch(address, part, label):
                _version_file(part).unlink(missing_ok=True)
                return
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
    raise Unavailable(reason)


def _fetch(address: str, part: Path, label: str) -> bool:
    """Append to `part` what it lacks; whether it is complete. A server without Range starts anew.

    One that was complete already is answered by 416 and is for a checksum to judge.
    """
    have, version_file = _size(part), _version_file(part)
    headers = {"User-Agent": "octic"} | ({"Range": f"bytes={have}-"} if have else {})
    if have and version_file.exists():
        headers["If-Range"] = version_file.read_text()
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True
        raise
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        if not resumed:
            version_file.unlink(missing_ok=True)
            if version := _version_of(answer.headers):
                version_file.write_text(version)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        size = f"{total / MB:,.0f} MB" if total else "a file of unknown size"
        say(f"{label}: {size}" + (f", {have / MB:,.0f} MB are there" if have else ""))
        progress = RateLines(label, total, "MB", scale=MB, done=have, ends=True)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                progress.add(len(chunk))
        return total is None or progress.done >= total


def _version_of(headers: Mapping[str, str]) -> str:
    """What tells a server's file from a later one at its address; "" where it says nothing."""
    tag = headers.get("ETag", "")
    # A weak tag stands for files of the same meaning, whose bytes may differ.
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}-of")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

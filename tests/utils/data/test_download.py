"""Archives arrive whole, once, and go on after a cut; whatever goes wrong is one line."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.utils.file_server import Server
from utils import download as fetch
from utils.data import download
from utils.data.download import Archive, bring
from utils.download import Unavailable
from utils.errors import UserError


def make_zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("Things/one.txt", "one")
        archive.writestr("Things/noise", hashlib.shake_256(b"seed").digest(300_000))
    return data.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(make_zip(), "things.zip") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def archives(server: Server, md5: str | None = None) -> dict[str, Archive]:
    md5 = md5 or hashlib.md5(server.data).hexdigest()
    return {"things": Archive(server.url, "things.zip", md5, "Things")}


def test_it_arrives_whole_and_is_not_brought_twice(server: Server, tmp_path: Path, capsys) -> None:
    for _ in range(2):
        assert bring("things", tmp_path, archives=archives(server)) == tmp_path / "Things"
    assert (tmp_path / "Things" / "one.txt").read_text() == "one"
    assert len(server.asked) == 1
    assert "things.zip: 0 of 0 MB" in capsys.readouterr().out
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert left == ["Things", "things.zip"]


def test_a_download_that_is_cut_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = 2
    bring("things", tmp_path, archives=archives(server))
    half = len(server.data) // 2
    assert server.asked[:2] == [None, f"bytes={half}-"] and len(server.asked) == 3


def test_the_next_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    (tmp_path / "things.zip.part").write_bytes(server.data[:1000])
    bring("things", tmp_path, archives=archives(server))
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_parts_of_two_files_at_one_address_are_not_joined(
    server: Server, tmp_path: Path, header: str
) -> None:
    """What came of an earlier file is thrown away; of the same one, kept."""
    part, half = tmp_path / "part", len(server.data) // 2
    whole, server.data, server.version = server.data, b"x" * 2 * half, {header: '"1"'}
    server.cut = 100
    with pytest.raises(Unavailable):
        fetch.download(server.url, part, "it")
    old = part.read_bytes()
    server.cut, server.data, server.version = 1, whole, {header: '"2"'}
    fetch.download(server.url, part, "it")
    assert part.read_bytes() == whole != old
    assert server.asked[-2:] == [f"bytes={len(old)}-", f"bytes={half}-"]
    assert list(tmp_path.iterdir()) == [part]


def test_a_part_that_is_complete_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "things.zip.part").write_bytes(server.data)
    bring("things", tmp_path, archives=archives(server))
    assert (tmp_path / "Things").is_dir()


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "things.zip.part").write_bytes(b"x" * 1000)
    bring("things", tmp_path, archives=archives(server))
    assert server.asked == ["bytes=1000-"] and (tmp_path / "Things").is_dir()


def test_a_wrong_checksum_leaves_nothing_and_says_what_to_do(
    server: Server, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another checksum .*run this again") as error:
        bring("things", tmp_path, archives=archives(server, md5="0" * 32))
    assert "\n" not in str(error.value)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_an_archive_put_there_by_hand_needs_no_server(server: Server, tmp_path: Path) -> None:
    (tmp_path / "things.zip").write_bytes(server.data)
    bring("things", tmp_path, archives=archives(server))
    assert server.asked == [] and (tmp_path / "Things" / "noise").is_file()


def test_a_wrong_archive_put_there_by_hand_is_not_touched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "things.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="another checksum .*move it away"):
        bring("things", tmp_path, archives=archives(server))
    assert (tmp_path / "things.zip").read_bytes() == b"no zip" and server.asked == []


def test_many_at_once_download_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: bring("things", tmp_path, archives=archives(server)), "1234")
        )
    assert found == [tmp_path / "Things"] * 4 and len(server.asked) == 1


def test_no_network_is_one_line_with_the_steps_by_hand(tmp_path: Path) -> None:
    md5 = "0" * 32
    gone = {"things": Archive("http://127.0.0.1:9/things.zip", "things.zip", md5, "Things")}
    with pytest.raises(UserError) as error:
        bring("things", tmp_path, archives=gone)
    line = str(error.value)
    assert "refused" in line and f"md5 {md5}" in line and str(tmp_path / "things.zip") in line
    assert "\n" not in line


def test_the_command_knows_its_archives(capsys) -> None:
    assert set(download.ARCHIVES) == {"ade20k", "voc2012", "sbd"}
    assert all(len(archive.md5) == 32 for archive in download.ARCHIVES.values())
    with pytest.raises(SystemExit):
        download.main(["coco", "somewhere"])
    assert "usage" in capsys.readouterr().err

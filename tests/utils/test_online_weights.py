"""Weights at an address are a file before a run begins, brought once, whoever asks."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slurm.launch import launch_all
from slurm.task import Task
from tests.utils.file_server import Server
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.errors import UserError
from utils.online_weights import with_files

DATA = b"weights" * 1000
NAME = f"net-{hashlib.sha256(DATA).hexdigest()[:8]}.pth"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return Path(torch.hub.get_dir(), "checkpoints")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(DATA, f"deit/{NAME}") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_addresses_become_files_wherever_weights_stand(server: Server, home: Path) -> None:
    config = {
        "weights": server.url,
        "recipe": {"distillation": {"weights": server.url, "kind": "hard"}},
        "table": {"weights": {"one": server.url, "two": "here.pth", "three": None}},
        "several": [{"weights": [server.url, "here.pth"]}],
        "name": server.url,
    }
    found = with_files(config)
    file = found["weights"]
    assert Path(file).read_bytes() == DATA and Path(file).is_relative_to(home)
    assert found == {
        "weights": file,
        "recipe": {"distillation": {"weights": file, "kind": "hard"}},
        "table": {"weights": {"one": file, "two": "here.pth", "three": None}},
        "several": [{"weights": [file, "here.pth"]}],
        "name": server.url,
    }
    assert len(server.asked) == 1


def test_files_of_one_name_are_kept_apart(server: Server) -> None:
    first = with_files({"weights": server.url})["weights"]
    server.path, server.data = f"other/{NAME}", DATA
    assert with_files({"weights": server.url})["weights"] != first
    assert len(server.asked) == 2


def test_what_an_address_asks_for_tells_files_apart(server: Server) -> None:
    """Some servers have one path for all files; the ending stays, as it says how to read one."""
    found = []
    for number in (1, 2):
        server.path, server.data = f"get/net.pth?id={number}", b"%d" % number
        found.append(Path(with_files({"weights": server.url})["weights"]))
    assert [path.read_bytes() for path in found] == [b"1", b"2"]
    assert {path.name for path in found} == {"net.pth"}


@pytest.mark.parametrize("name", ["net-20231015.pth", "net-00050000.safetensors"])
def test_a_date_or_a_step_in_a_name_is_no_checksum(server: Server, name: str) -> None:
    server.path = name
    assert Path(with_files({"weights": server.url})["weights"]).read_bytes() == DATA


def test_many_at_once_download_once(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: with_files({"weights": server.url})["weights"], "1234"))
    assert len(set(found)) == 1 and len(server.asked) == 1


def test_other_content_than_the_name_tells_is_refused(server: Server, home: Path) -> None:
    server.data = b"an error page"
    with pytest.raises(UserError, match=r"another SHA-256 than its name tells \([0-9a-f]{8}\)"):
        with_files({"weights": server.url})
    assert [path for path in home.rglob("*") if path.suffix in (".pth", ".part")] == []


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("gone.pth", "the server says 404 Not Found; run this again .* put the file at .*gone.pth"),
        ("", "names no file"),
    ],
)
def test_an_address_without_a_file_is_one_line(server: Server, end: str, said: str) -> None:
    address = server.url.replace(server.path, end)
    with pytest.raises(UserError, match=said) as error:
        with_files({"weights": address})
    assert address in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_takes_nothing_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(UserError, match="cannot keep .*TORCH_HOME says where downloads go"):
        with_files({"weights": server.url})


def test_they_are_brought_where_a_run_is_started(server: Server, tmp_path: Path, home) -> None:
    """And a dry run brings none; what runs, on whatever machine, gets the file."""
    words = [f"output_dir='{tmp_path / 'run'}'", f"training.weights='{server.url}'"]
    task = Task("tests.slurm.work.report", plain(compose_config("train.yaml", words)))
    launch_all([task], dry_run=True)
    assert server.asked == []
    launch_all([task])
    assert Path(task.config["training"]["weights"]).is_relative_to(home) and len(server.asked) == 1

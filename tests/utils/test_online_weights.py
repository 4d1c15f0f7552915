"""Weights at an address are a file before a run begins, brought once, whoever asks."""

import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch

from slurm.launch import launch_all
from slurm.task import Task
from tests.utils.file_server import Server
from utils.config.build import plain
from utils.config.check import VALID, check, networks
from utils.config.compose import compose_config
from utils.config.deit_arguments import parse_deit_training
from utils.errors import UserError
from utils.online_weights import with_files, without_downloads

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


# Networks that are built for their shapes alone


def distilled(folder: Path, *words: str) -> dict:
    words = ("--distillation-type", "hard", "--teacher-model", "test_resnet", *words)
    small = ("backbone.depth=2", "backbone.embed_dim=16", "backbone.num_heads=2")
    file = ("--config-file", "configs/deit/quickstart.yaml")
    return parse_deit_training([*file, f"output_dir='{folder}'", *small, *words])


def weights_of_a_teacher() -> bytes:
    content = io.BytesIO()
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), content)
    return content.getvalue()


def test_shapes_need_no_download(server: Server) -> None:
    server.path = "deit/net.pth"
    config = {
        "backbone": {"pretrained": True, "name": server.url},
        "several": [{"weights": server.url}, {"weights": "here.pth", "pretrained": False}],
    }
    found = without_downloads(config)
    assert found["backbone"] == {"pretrained": False, "name": server.url}
    assert found["several"] == [{"weights": None}, {"weights": "here.pth", "pretrained": False}]
    assert config["backbone"]["pretrained"] is True and server.asked == []
    file = with_files({"weights": server.url})["weights"]
    assert without_downloads(config)["several"][0] == {"weights": file}
    with pytest.raises(UserError, match="names no file"):
        without_downloads({"weights": server.url.replace(server.path, "")})


def test_a_teacher_at_an_address_is_checked_without_it(
    server: Server, tmp_path: Path, capsys
) -> None:
    """Once its file is here the file is checked as well."""
    config = distilled(tmp_path / "run", "--teacher-path", server.url)
    check(config)
    launch_all([Task("tests.slurm.work.report", config)], dry_run=True)
    assert VALID in capsys.readouterr().out and server.asked == []
    with_files(config)
    with pytest.raises(UserError, match=f"recipe.distillation: distillation.weights .*{NAME}: "):
        check(config)


@pytest.mark.parametrize("follows", [False, True])
def test_a_teacher_at_an_address_is_brought_before_several_runs(
    server: Server, tmp_path: Path, monkeypatch, home: Path, follows: bool
) -> None:
    server.path, server.data, ran = "teacher.pth", weights_of_a_teacher(), []
    monkeypatch.setattr("slurm.launch.run_apart", lambda _, task: ran.append(task) or 0)
    config = distilled(tmp_path / "run", "--teacher-path", server.url)
    one, two = (
        Task("tests.slurm.work.report", config | {"output_dir": str(tmp_path / number)})
        for number in ("one", "two")
    )
    one.then = [two] if follows else []
    launch_all([one] if follows else [one, two], folder=tmp_path)
    files = {task.config["recipe"]["distillation"]["weights"] for task in ran}
    assert len(ran) == 2 and len(files) == len(server.asked) == 1
    assert Path(files.pop()).is_relative_to(home)


def test_timms_own_weights_are_wanted_by_runs_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    """A job's come when it is submitted, as its nodes may have no network."""
    wanted = []

    def refuse(*args, **options):
        wanted.append(args)
        raise OSError from OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    submitted = ("launcher=slurm", "cluster=example_a100", "cluster.executor=local")
    config = distilled(tmp_path, *submitted)
    check(config)
    assert VALID in capsys.readouterr().out and not wanted
    said = r"weights of test_resnet cannot be downloaded \(no route to host\); .*--teacher-path"
    with pytest.raises(UserError, match=said):
        networks(config, download=True)
    with pytest.raises(SystemExit):
        launch_all([Task("tests.slurm.work.report", config)])
    assert "the weights of test_resnet cannot be downloaded" in capsys.readouterr().err

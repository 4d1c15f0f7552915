"""One run per folder: the second is refused by name; a dead holder's lock is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.utils.loop_case import train_tiny
from utils import lock
from utils.checkpoints import checkpoint
from utils.endings import LOST
from utils.errors import UserError
from utils.lock import FolderLock

ROOT = Path(__file__).parents[2]


def hold(folder: Path, **changes) -> None:
    """The lock of another process, which touches it no more."""
    (folder / ".lock").write_text(json.dumps(lock.describe_process() | changes))


def age(folder: Path, seconds: float) -> None:
    past = time.time() - seconds
    os.utime(folder / ".lock", (past, past))


def holder(folder: Path) -> str:
    return json.loads((folder / ".lock").read_text())["token"]


def test_the_second_is_told_who_holds_it_and_since_when(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = FolderLock(tmp_path)
    first.acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(UserError) as caught:
        FolderLock(tmp_path).acquire()
    line = str(caught.value)
    assert f"{tmp_path} is in use by job 4711, process {os.getpid()} on " in line
    assert f"since {first.owner['since']}, last sign of life" in line and "\n" not in line
    first.release()
    second = FolderLock(tmp_path)
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_refuses_a_folder_in_use_and_leaves_it_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="is in use by process"):
        train_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    first.release()
    train_tiny(tmp_path, max_steps=1)
    assert not (tmp_path / ".lock").exists()


def test_a_killed_process_of_this_machine_is_succeeded_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from utils.lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        FolderLock(tmp_path).acquire()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and a zombie
    start, ours = time.monotonic(), FolderLock(tmp_path)
    ours.acquire()
    assert time.monotonic() - start < 2 and holder(tmp_path) == ours.owner["token"]
    process.communicate()
    ours.release()


@pytest.mark.parametrize(
    ("job", "restart", "allowed"), [("7", "1", True), ("7", "0", False), ("8", "1", False)]
)
def test_the_same_job_requeued_on_another_node_goes_on(
    tmp_path, monkeypatch, job, restart, allowed
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    hold(tmp_path, machine="another", host="node1", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    ours = FolderLock(tmp_path)
    if allowed:
        ours.acquire()
        ours.release()
    else:
        with pytest.raises(UserError, match="in use by job 7, process .* on node1"):
            ours.acquire()


def test_another_machines_lock_is_taken_over_when_it_has_gone_stale(tmp_path):
    hold(tmp_path, machine="another", host="node1")
    age(tmp_path, 200)
    ours = FolderLock(tmp_path)
    ours.acquire()
    assert holder(tmp_path) == ours.owner["token"]
    ours.release()


def test_one_that_missed_a_beat_is_waited_for(tmp_path):
    """It may stir (then we are refused) or not (then we succeed it)."""
    hold(tmp_path, machine="another", host="node1")
    age(tmp_path, 0.4)
    start, ours = time.monotonic(), FolderLock(tmp_path, beat_s=0.1, stale_s=1.0)
    ours.acquire()
    assert 0.3 < time.monotonic() - start < 3
    ours.release()
    hold(tmp_path, machine="another", host="node1")
    age(tmp_path, 0.4)
    threading.Timer(0.2, os.utime, [tmp_path / ".lock"]).start()
    with pytest.raises(UserError, match="node1"):
        FolderLock(tmp_path, beat_s=0.1, stale_s=1.0).acquire()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    hold(tmp_path, machine="another")
    age(tmp_path, 500)
    got, refused, barrier = [], [], threading.Barrier(8)

    def contend():
        ours = FolderLock(tmp_path)
        barrier.wait()
        try:
            ours.acquire()
            got.append(ours)
        except UserError:
            refused.append(ours)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7) and holder(tmp_path) == got[0].owner["token"]
    got[0].release()
    assert list(tmp_path.iterdir()) == []


def test_one_that_was_killed_while_it_took_over_is_no_obstacle(tmp_path):
    hold(tmp_path, machine="another")
    age(tmp_path, 500)
    (tmp_path / ".lock.taking").mkdir()
    past = time.time() - 500
    os.utime(tmp_path / ".lock.taking", (past, past))
    ours = FolderLock(tmp_path, beat_s=0.1)
    ours.acquire()
    assert holder(tmp_path) == ours.owner["token"]
    ours.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_lost_its_lock_ends_itself(tmp_path):
    """As one that was frozen, and stirs when another has taken over."""
    code = (
        "import sys, time; from pathlib import Path; from utils.lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1]), beat_s=0.1).acquire(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "held\n"
    hold(tmp_path, host="node1")
    assert process.wait(timeout=20) == LOST
    (line,) = process.communicate()[1].splitlines()
    assert "on node1" in line and f"process {process.pid} on" in line


def test_without_hard_links_a_lock_is_a_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="is in use"):
        FolderLock(tmp_path).acquire()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_crash_frees_the_folder_when_the_save_in_progress_is_through(tmp_path, monkeypatch):
    """Else the next run, in another process, clears away what is being written."""

    def crash(step):
        if step == 7:
            raise RuntimeError("power cut")

    def slowly(path):
        time.sleep(0.5)
        sync(path)

    sync = checkpoint.sync_folder
    monkeypatch.setattr(checkpoint, "sync_folder", slowly)
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(tmp_path, recipe={"on_step": crash}, every=6)
    assert (tmp_path / "checkpoints" / "last").read_text() == "6\n"

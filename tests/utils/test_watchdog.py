"""A hung rank ends the run: stacks of every rank, and one line that names the one behind."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.endings import HUNG
from utils.watchdog import Watchdog, blame

ROOT = Path(__file__).parents[2]


def answer(rank: int, step: int, line: int, *, waits: bool = False, micro_batch: int = 0) -> dict:
    place = {"step": step, "line": line, "micro_batch": micro_batch, "waits": waits}
    names = {"host": f"node{rank}", "pid": 100 + rank, "code": f"line {line}", "innermost": "x"}
    return {"rank": rank, **place, **names}


def test_the_rank_that_stands_earliest_is_behind():
    ahead, behind = answer(0, 7, 80, waits=True), answer(1, 7, 62)
    assert "rank 1 (node1, process 101) is behind, in step 8 at 'line 62'" in blame(
        [ahead, behind], 2
    )
    assert "rank 0 " in blame([answer(0, 6, 99), answer(1, 7, 62)], 2)
    assert "rank 1 " in blame([answer(0, 7, 62, micro_batch=2), answer(1, 7, 70, micro_batch=1)], 2)
    assert "rank 1 " in blame([answer(0, 7, 70, waits=True), answer(1, 7, 70)], 2)
    together = [answer(rank, 7, 70, waits=True) for rank in range(2)]
    assert blame(together, 2).startswith("all 2 ranks stand in step 8")
    assert blame([answer(0, 7, 70)], 1).startswith("rank 0 (node0")


def test_ranks_that_do_not_answer_are_named():
    assert blame([answer(0, 7, 70)], 3).startswith("ranks 1, 2 gave no sign")
    assert blame([answer(0, 7, 70)], 40).startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 31 more gave")


def test_steps_and_rests_keep_it_quiet_and_nothing_is_left(tmp_path):
    folder = tmp_path / "hangs"
    with Watchdog(folder, timeout_s=0.4, watched=__file__) as watchdog:
        for step in range(6):
            time.sleep(0.1)
            watchdog.finished(step)
        with watchdog.resting():
            time.sleep(1.0)
        time.sleep(0.2)
    assert not folder.exists()
    with Watchdog(folder, timeout_s=0, watched=__file__):
        time.sleep(0.1)


def test_the_first_step_may_take_three_times_as_long_and_a_rest_any_time(tmp_path, monkeypatch):
    """By a clock of the test's own; after a rest a whole period is left."""
    now, told = [0.0], threading.Event()
    monkeypatch.setattr("utils.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    names = ("dump_traceback_later", "cancel_dump_traceback_later")
    timer = SimpleNamespace(**dict.fromkeys(names, lambda *_, **__: None))
    monkeypatch.setattr("utils.watchdog.faulthandler", timer)
    monkeypatch.setattr(Watchdog, "_report", lambda self: told.set())

    def quiet(seconds: float) -> bool:
        now[0] += seconds
        return not told.wait(0.07)

    def noticed(seconds: float) -> bool:
        now[0] += seconds
        return told.wait(30)

    with Watchdog(tmp_path / "hangs", timeout_s=0.04, watched=__file__) as watchdog:
        assert quiet(0.11) and noticed(0.02)
        watchdog.finished(1)
        time.sleep(0.15)  # what it was about to say is said
        told.clear()
        assert quiet(0.03)
        with watchdog.resting():
            assert all(quiet(0.03) for _ in range(3))
        assert quiet(0.03) and noticed(0.02)


def test_answers_of_an_earlier_hang_at_the_same_step_do_not_count(tmp_path):
    folder = tmp_path / "hangs" / "3"
    folder.mkdir(parents=True)
    for name in ("rank1.json", "rank1.txt", "line.txt"):
        (folder / name).write_text("{}")
    with Watchdog(tmp_path / "hangs", timeout_s=60, watched=__file__):
        assert sorted(path.name for path in folder.iterdir()) == ["line.txt", "rank1.txt"]


@pytest.mark.parametrize(("below", "waits"), [("distributed/x.py", True), ("nn/x.py", False)])
def test_a_rank_tells_where_its_loop_stands(tmp_path, monkeypatch, capsys, below, waits):
    """The line of the loop, not of what it calls; and whether it waits for the others there."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(Watchdog, "_arm", lambda self, seconds: None)  # it would end this process
    watchdog = Watchdog(tmp_path, timeout_s=0.1, watched=__file__)
    watchdog.finished(4)
    calls = compile("watchdog._report()", f"/site-packages/torch/{below}", "exec")
    for micro_batch in range(3):
        if micro_batch == 2:
            exec(calls, {"watchdog": watchdog})  # here
    told = json.loads((tmp_path / "4" / "rank0.json").read_text())
    assert (told["step"], told["micro_batch"], told["waits"]) == (4, 2, waits)
    assert told["code"].endswith("# here") and "_report (" in told["innermost"]
    assert codes == [HUNG] == [75]
    line = (tmp_path / "4" / "line.txt").read_text()
    assert "is behind, in step 5 at 'exec(" in line and capsys.readouterr().err == f"error: {line}"
    assert "in test_a_rank" in (tmp_path / "4" / "rank0.txt").read_text()


def hang_with_a_stalled_reader(folder: Path) -> None:
    """As a rank whose error stream takes no more."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 65536)
    os.set_blocking(write, True)
    sys.stderr = os.fdopen(write, "w")
    with Watchdog(folder, timeout_s=0.1, watched=__file__):
        time.sleep(60)


def test_a_report_that_hangs_ends_the_rank_too(tmp_path):
    place = tmp_path / "hangs"
    rank = get_context("fork").Process(target=hang_with_a_stalled_reader, args=(place,))
    rank.start()
    rank.join(30)
    ended, code = not rank.is_alive(), rank.exitcode
    rank.kill()
    assert ended and code == 1  # faulthandler's, which knows no other
    assert "in _report" in (place / "rank0_held.txt").read_text()


def run_two(folder: Path, hang: str, timeout_s: float) -> tuple[list[int], list[str]]:
    """Exit codes and error streams of two ranks, rank 1 of which hangs in its fourth step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"recipe": {"hang": hang}, "hang_timeout_s": timeout_s, "every": 2}
    command = [sys.executable, "-m", "tests.utils.loop_case", json.dumps([[str(folder), options]])]
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        )
    try:
        ranks[0].wait(timeout=120)
        if hang != "stop":
            ranks[1].wait(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    streams = [process.communicate()[1] for process in ranks]
    return [process.returncode for process in ranks], streams


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_all_leave_their_stacks(tmp_path):
    codes, streams = run_two(tmp_path, "sleep", 6)
    assert codes == [HUNG, HUNG], streams
    (line,) = [line for line in streams[0].splitlines() if line.startswith("error:")]
    assert re.search(r"no step finished for \d+ s: rank 1 \(.* is behind, in step 4 at", line)
    assert "recipe.losses(batch, step)" in line and "loop_case.py" in line
    assert f"stacks of all ranks: {tmp_path}/hangs/3" in line
    assert "error:" not in streams[1]
    assert (tmp_path / "hangs/3/line.txt").read_text() == line.removeprefix("error: ") + "\n"
    stacks = [(tmp_path / f"hangs/3/rank{rank}.txt").read_text() for rank in range(2)]
    assert "in <lambda>" in stacks[1] and "in <lambda>" not in stacks[0]
    assert "in fit" in stacks[0] and "in fit" in stacks[1]
    # The checkpoint before it is sound, and the next start goes on from there.
    assert (tmp_path / "checkpoints/last").read_text() == "2\n"


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["stop", "hold"])
def test_a_rank_that_cannot_answer_is_named_by_the_others(tmp_path, hang):
    codes, streams = run_two(tmp_path, hang, 6)
    assert codes[0] == HUNG and codes[1] != 0
    assert "rank 1 gave no sign" in streams[0]
    assert "in fit" in (tmp_path / "hangs/3/rank0.txt").read_text()
    if hang == "hold":
        assert "in <lambda>" in (tmp_path / "hangs/rank1_held.txt").read_text()

"""Functions that the launcher's tests run in other processes."""

import json
import os
import time
from pathlib import Path
from typing import Any

from slurm import record
from utils.errors import UserError
from utils.signals import StopSignal


def report(config: dict[str, Any]) -> int:
    """Meet the others, add up all ranks, and leave a note."""
    import torch

    from utils import distributed
    from utils.joining import session

    with session("cpu", timeout_min=2):
        total = torch.tensor([float(distributed.rank() + 1)])
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(total)
        rank, world_size = distributed.rank(), distributed.world_size()
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    note = {"world_size": world_size, "total": total.item(), "seed": config["seed"]}
    (folder / f"note{rank}.json").write_text(json.dumps(note))
    print(f"rank {rank} of {world_size} was here")
    return rank


def fail_on_second(config: dict[str, Any]) -> None:
    """The second rank fails while the first would wait for ever."""
    if os.environ.get("RANK") == "1":
        raise RuntimeError("the second rank has had enough")
    time.sleep(600)


def die_on_second(config: dict[str, Any]) -> None:
    """The second rank is killed while the first would wait for ever."""
    if os.environ.get("RANK") == "1":
        time.sleep(2)  # the first has noted by then that it began
        os.kill(os.getpid(), 9)
    time.sleep(600)


def refuse(config: dict[str, Any]) -> None:
    """A mistake of the user that only the running function can find."""
    raise UserError("the moon is in the wrong phase")


def interrupt(config: dict[str, Any]) -> None:
    """Control-C."""
    raise KeyboardInterrupt


def until_told(config: dict[str, Any]) -> None:
    """A run that saves and leaves when it is told to, as a training does."""
    folder, rank = Path(config["output_dir"]), os.environ.get("RANK", "0")
    with StopSignal() as stop:
        (folder / f"begun{rank}").touch()
        while stop.received is None:
            time.sleep(0.05)
        print("stopped at step 3", flush=True)
        (folder / f"saved{rank}").write_text(stop.received.name)
    raise SystemExit(128 + stop.received)


def sleep_on(config: dict[str, Any]) -> None:
    """What heeds no signal yet, as a training that still imports."""
    (Path(config["output_dir"]) / f"begun{os.environ['RANK']}").touch()
    time.sleep(600)


def fail_when_told(config: dict[str, Any]) -> None:
    """A run that cannot save when it is told to leave."""
    try:
        until_told(config)
    except SystemExit:
        raise UserError("no space left on the moon") from None


def steps(config: dict[str, Any]) -> int:
    """A run of `max_steps` steps that takes up its checkpoint and keeps one when it is told to end.

    What its name holds happens at its third step, once: `kill` ends the second rank, `fail` raises.
    """
    folder, name = Path(config["output_dir"]), config["name"]
    rank, last = int(os.environ["RANK"]), folder / "checkpoints" / "last"
    step = int(last.read_text()) if last.exists() else 0
    print(f"begins at step {step} with {record.__file__}", flush=True)
    try:
        while step < config["training"]["max_steps"]:
            time.sleep(0.2)
            step += 1
            first = "SLURM_RESTART_COUNT" not in os.environ
            if step == 3 and "kill" in name and rank == 1 and first:
                os.kill(os.getpid(), 9)
            if step == 3 and "fail" in name:
                raise RuntimeError("this point cannot be trained")
            if rank == 0 and step % 2 == 0:
                last.parent.mkdir(parents=True, exist_ok=True)
                last.write_text(str(step))
    finally:
        if rank == 0:
            last.parent.mkdir(parents=True, exist_ok=True)
            last.write_text(str(step))
    return step


def fail_at_high_rates(config: dict[str, Any]) -> None:
    """A point of a sweep that fails, or not."""
    if config["recipe"]["schedules"]["lr"] > 1e-3:
        raise RuntimeError("this learning rate is too high")


def mark(config: dict[str, Any]) -> None:
    """Leave a mark; seed 1 fails, seed 2 is killed."""
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mark.txt").write_text(f"{config['seed']} {config['backbone']['_target_']}")
    if config["seed"] == 1:
        raise RuntimeError("seed 1 brings no luck")
    if config["seed"] == 2:
        os.kill(os.getpid(), 9)

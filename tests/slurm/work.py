"""Functions that the launcher's tests run in other processes."""

import json
import os
import time
from pathlib import Path
from typing import Any


def report(config: dict[str, Any]) -> int:
    """Meet the others, add up all ranks, and leave a note."""
    import torch

    from utils import distributed

    with distributed.session("cpu", timeout_min=2):
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
        os.kill(os.getpid(), 9)
    time.sleep(600)


def refuse(config: dict[str, Any]) -> None:
    """A mistake of the user that only the running function can find."""
    from utils.errors import UserError

    raise UserError("the moon is in the wrong phase")


def interrupt(config: dict[str, Any]) -> None:
    """Control-C."""
    raise KeyboardInterrupt

"""Count what ranks send each other in one step of a real training, call by call.

Run as a program under torchrun, it trains each given config for one step and for three, and prints
the payload of a step (half the difference) by collective.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from utils import distributed, metrics
from utils.communication import Communication
from utils.errors import UserError
from utils.joining import session
from utils.run import train
from utils.signals import Handlers

COUNTED = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")
MARK = "traffic: "
# The last line of a rank's traceback.
RANK_ERROR = re.compile(r"\[rank\d+\]: (?:[\w.]+\.)?(\w+: .+)")


def measure(configs: list[dict[str, Any]], processes: int) -> list[dict[str, float]]:
    """Payload of one step of each config in `processes` processes of this machine, on the CPU.

    In bytes, by collective. Raises UserError with what a process said if one fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "evaluation.cost.traffic"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "configs.json"
        asked.write_text(json.dumps(configs))
        code, said, errors = _run([*command, str(asked)], environment)
    found = [line for line in said.splitlines() if line.startswith(MARK)]
    if code or not found:
        raise UserError(f"no traffic was measured: {_reason(errors)}")
    return json.loads(found[0].removeprefix(MARK))


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, output and errors of torchrun; nothing of it outlives an interrupt or a TERM."""
    with _Stops():
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # a Control-C reaches this process alone, which ends the others
        )
        try:
            said, errors = process.communicate()
        except BaseException:
            # Killed, it would leave its workers behind, which have sessions of their own.
            process.terminate()
            process.communicate()
            raise
    return process.returncode, said, errors


class _Stops(Handlers):
    """TERM and HUP end the `with` block as an exit does, so that it can clean up."""

    caught = (signal.SIGTERM, signal.SIGHUP)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)


def _reason(errors: str) -> str:
    """The line that says what went wrong: a rank's error, which torchrun's report comes after."""
    lines = [line.strip() for line in errors.splitlines() if line.strip("=- ")]
    of_ranks = [found[1] for line in lines if (found := RANK_ERROR.match(line))]
    return (of_ranks or lines or ["?"])[-1]


def _one_step(config: dict[str, Any], folder: Path) -> dict[str, float]:
    counts = []
    for steps in (1, 3):
        training = config["training"] | {"max_steps": steps, "log_every": 1000}
        run = config | {"training": training, "output_dir": str(folder / str(steps))}
        with Communication() as sent:
            train(run)
        counts.append({kind: sent.payload(kind) for kind in COUNTED})
    first, last = counts
    return {kind: (last[kind] - first[kind]) / 2 for kind in COUNTED}


def _main() -> None:
    torch.set_num_threads(1)
    metrics.draw_curves = lambda path: None
    configs = json.loads(Path(sys.argv[1]).read_text())
    with session("cpu"), tempfile.TemporaryDirectory() as folder:
        place = Path(distributed.broadcast_object(folder))
        found = [_one_step(config, place / str(n)) for n, config in enumerate(configs)]
        if distributed.is_main():
            print(MARK + json.dumps(found), flush=True)
        distributed.barrier()  # the others' folder is rank 0's


if __name__ == "__main__":
    _main()

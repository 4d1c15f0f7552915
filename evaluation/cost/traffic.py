"""Count what ranks send each other in one step of a real training, call by call.

Run as a program under torchrun, it trains each given config for one step and for three, and prints
the payload of a step (half the difference) by collective.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from utils import distributed, metrics
from utils.communication import Communication
from utils.errors import UserError
from utils.joining import session
from utils.run import train

COUNTED = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")
MARK = "traffic: "


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
        done = subprocess.run(
            [*command, str(asked)],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
        )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise UserError(f"no traffic was measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(found[0].removeprefix(MARK))


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

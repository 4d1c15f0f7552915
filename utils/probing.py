"""Run the probes of a training when they are due, without side effects on the training."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import distributed
from utils.errors import UserError
from utils.randomness import preserved_randomness
from utils.results_file import write_results
from utils.run_files import RESULTS


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """A net in evaluation mode, without gradients; modes and random numbers are restored after."""
    modes = {part: part.training for part in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), preserved_randomness():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class ProbeRunner:
    """The probes of a run, due every `every` steps (0: only at the end) on every rank.

    A probe is `probe(net, data, output_dir, step) -> dict of numbers`; its numbers are reported as
    `name/key`, and it may write to `folder/name`. Where it leaves no results.json there, the
    numbers are written with its `protocol`. It finds the net in evaluation mode and cannot disturb
    the training's random numbers.
    """

    def __init__(
        self,
        probes: Mapping[str, Callable[..., dict[str, float]]],
        net: nn.Module,
        data: Mapping[str, Any],
        folder: Path,
        *,
        every: int = 0,
    ) -> None:
        self.probes, self.net, self.data, self.folder, self.every = probes, net, data, folder, every
        self.results: dict[str, float] = {}
        self._done = -1

    def due(self, step: int) -> bool:
        """Whether the probes are to run after `step` steps, before the end."""
        return self.every > 0 and step % self.every == 0

    def owed(self, step: int, logged: Collection[str]) -> bool:
        """Whether a start at `step` lacks figures that were due, by the keys `logged` there.

        An earlier start was told to leave, or ended while the probes ran.
        """
        found = {key.partition("/")[0] for key in logged}
        return step > 0 and self.due(step) and not found & self.probes.keys()

    def __call__(self, step: int) -> dict[str, float]:
        """The results at `step`; empty if they were returned already."""
        if self._done == step:
            return {}
        self._done = step
        # Filled one by one, so that an error in a later probe does not lose them; and without those
        # of an earlier step, which must not pass for figures of this one.
        results = self.results = {}
        with undisturbed(self.net):
            for name, probe in self.probes.items():
                before = _state_of(self.folder / name / RESULTS)
                values = probe(self.net, data=self.data, output_dir=self.folder / name, step=step)
                figures = numbers(name, values)
                if distributed.is_main() and _state_of(self.folder / name / RESULTS) == before:
                    self._write(name, probe, figures, step)
                results |= {f"{name}/{key}": float(value) for key, value in figures.items()}
        return results

    def _write(self, name: str, probe: Callable, figures: Mapping[str, float], step: int) -> None:
        protocol = protocol_of(name, probe)
        if "val" in getattr(probe, "splits", ("val",)) and "val" in self.data:
            protocol["data"] = repr(self.data["val"])
        protocol["step"] = step
        write_results(self.folder / name, name, protocol=protocol, figures=figures)


def _state_of(path: Path) -> tuple[int, ...] | None:
    """What changes with every writing of a file; None without one."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def protocol_of(name: str, probe: Callable) -> dict[str, Any]:
    """What the figures of a probe depend on, as it says; UserError unless that is a mapping."""
    protocol = getattr(probe, "protocol", {})
    if not isinstance(protocol, Mapping):
        raise UserError(
            f"probes.{name}: its protocol must be a mapping of what its figures depend on, such as "
            f"{{'crop_size': 224}}, not {protocol!r}"
        )
    # A training must not end because a value has no form in JSON.
    return json.loads(json.dumps(dict(protocol), default=str))


def numbers(name: str, values: Any) -> dict[str, float]:
    """The figures that the probe `name` returned, checked: UserError unless numbers by name."""
    found: dict[str, float] = {}
    for key, value in values.items() if isinstance(values, Mapping) else [("it", values)]:
        try:
            found[str(key)] = value if isinstance(value, int | float) else float(value)
        except (TypeError, ValueError):
            raise UserError(
                f"probes.{name} must return numbers by name; {key} is {value!r}"
            ) from None
    return found

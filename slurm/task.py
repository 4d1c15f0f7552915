"""What is launched: a function, its config, and what follows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slurm.job import Function
from utils.config.trainings import trainings
from utils.errors import UserError


@dataclass
class Task:
    """One run: a function with its config, and the tasks that start once it has succeeded.

    values: the swept keys, if the task is a point of a sweep.
    """

    function: Function
    config: dict[str, Any]
    values: dict[str, str] = field(default_factory=dict)
    then: list["Task"] = field(default_factory=list)
    command: str = ""  # of a task that follows another: the --then command as the user wrote it
    job_name: str = ""  # if it is not the config's name: of a sweep, or of a --then command
    part: str = ""  # the training's name, if it is one of several that a task is made of

    @property
    def label(self) -> str:
        """The --then command it came from, or its swept values as `key=value,...`."""
        return self.command or ",".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def folder(self) -> Path:
        """The run folder; %j in it stands for a job's id."""
        return Path(self.config["output_dir"]).absolute()

    @property
    def parts(self) -> list["Task"]:
        """What it trains, in place of a task that is made of trainings; the task itself if not."""
        runs = trainings(self.config)
        return [replace(self, config=run, part=name) for name, run in runs.items()] or [self]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Prefix a UserError raised inside with the label and the part."""
        try:
            yield
        except UserError as error:
            where = [word for word in (self.label, self.part) if word]
            raise UserError(": ".join([*where, str(error)])) from error

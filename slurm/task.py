"""What is launched: a function, its config, and what follows it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.job import Function


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

    @property
    def label(self) -> str:
        """The --then command it came from, or its swept values as `key=value,...`."""
        return self.command or ",".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def folder(self) -> Path:
        """The run folder; %j in it stands for a job's id."""
        return Path(self.config["output_dir"]).absolute()

"""The command line of an experiment: options common to all scripts, read before a script's own.

-m, --multirun         comma lists are the points of a sweep (slurm/sweep.py)
--then "SCRIPT ..."    run that script after this one, if this one succeeds; may be repeated
--dry-run              show what would be started, and start nothing
"""

import contextlib
import io
import itertools
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from slurm.checks import check_launch
from slurm.launch import launch_all
from slurm.task import Task
from utils.command import as_command
from utils.config.build import plain
from utils.config.flags import slurm_minutes
from utils.console import open_closed_streams, output_taken
from utils.errors import UserError
from utils.nearest import nearest
from utils.run_files import EXPORTED

ROOT = Path(__file__).resolve().parent.parent
Parse = Callable[[list[str]], Mapping[str, Any] | None]
NO_LIST = (
    "the sweep has no list of values, such as key=a,b or --model a,b; not every flag takes one"
)

_captured: ContextVar[list[tuple[str, Parse]] | None] = ContextVar("captured", default=None)


class _Asked(NamedTuple):
    words: list[str]
    sweeps: bool
    dry_run: bool
    then: list[str]
    lists: Mapping[str, str]


def main(
    function: str,
    parse: Parse,
    argv: Sequence[str] | None = None,
    *,
    lists: Mapping[str, str] | None = None,
) -> Any:
    """Start `function` with the config that `parse` makes of the command line.

    `parse` takes the words and exits with code 2 for a mistake; if it returns None, nothing is
    started. lists: as `slurm.sweep.points`. Returns the function's result if it ran in this
    process.
    """
    if (captured := _captured.get()) is not None:
        captured.append((function, parse))
        return None
    open_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    with as_command():
        if {"-h", "--help"} & set(words):
            return parse(words)
        tasks, folder, dry_run = _read_tasks(function, parse, words, lists or {})
    result = launch_all(tasks, folder=folder, dry_run=dry_run) if tasks else None
    with output_taken():  # what the last prints left in the buffer
        return result


def _read_tasks(
    function: str, parse: Parse, words: list[str], lists: Mapping[str, str]
) -> tuple[list[Task], Path | None, bool]:
    """The tasks of a command line, their folder if they are several, and whether to start none."""
    _refuse_lost_folder()
    _refuse_clock_times(words)
    asked = _read(words, lists)
    if "--check" in asked.words:
        _check_start(parse, asked)
    if not (asked.sweeps or asked.then):
        config = parse(asked.words)
        tasks = [] if config is None else [Task(function, plain(config))]
        return tasks, None, asked.dry_run
    return *_tasks(function, parse, asked), asked.dry_run


def _refuse_lost_folder() -> None:
    """UserError if the working directory is gone.

    Every relative path starts there, and Python's own error would name one of those instead.
    """
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "the working directory is not there any more (removed, or made anew): cd to one that is"
        ) from None


def _refuse_clock_times(words: Sequence[str]) -> None:
    """UserError, with the minutes, for a time limit such as 48:00:00, which only sbatch takes."""
    for word, following in itertools.pairwise([*words, ""]):
        key, has_value, value = word.partition("=")
        value = value if has_value else following
        is_clock = re.fullmatch(r"(\d+-)?\d+:\d+(:\d+)?", value)
        if is_clock and key in ("launcher.timeout_min", "--timeout"):
            raise UserError(f"{key} is in minutes: {max(slurm_minutes(value), 1)} for {value}")


def _check_start(parse: Parse, asked: _Asked) -> None:
    """UserError for what the launcher or a starting run would refuse of what `--check` looks at."""
    tasks: list[Task] = []
    quiet = io.StringIO()
    with (
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(quiet),
        contextlib.suppress(UserError, SystemExit),  # the parse that prints reports the mistake
    ):
        words = [word for word in asked.words if word != "--check"]
        tasks, _ = _points("", parse, asked._replace(words=words))
    for task in tasks:
        with task.named():
            check_launch(task.config, joins="TORCHELASTIC_RUN_ID" in os.environ)
            for part in task.parts:
                _check_run(part.config)


def _check_run(config: dict[str, Any]) -> None:
    from utils.config.check import check_run  # late: it needs torch, for a training alone

    check_run(config)


def _read(words: list[str], lists: Mapping[str, str]) -> _Asked:
    """Separate the options common to all experiments from a script's own words."""
    kept, then, sweeps, dry_run = [], [], False, False
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word in ("-m", "--multirun"):
            sweeps = True
        elif word == "--dry-run":
            dry_run = True
        elif word == "--then" or word.startswith("--then="):
            command = word.partition("=")[2] or (waiting.pop(0) if waiting else "")
            if not command.strip() or command.startswith("-"):
                raise UserError('--then needs a command: --then "experiments/eval_deit.py ..."')
            then.append(command)
        else:
            kept.append(word)
    return _Asked(kept, sweeps, dry_run, then, lists)


def _tasks(function: str, parse: Parse, asked: _Asked) -> tuple[list[Task], Path | None]:
    """The tasks of `_points`, each with its --then tasks."""
    tasks, folder = _points(function, parse, asked)
    for task in tasks:
        task.then = _followers(asked.then, task)
    return tasks, folder


def _points(function: str, parse: Parse, asked: _Asked) -> tuple[list[Task], Path | None]:
    """One task, or one per point; and the sweep's folder, if several.

    No task at all if the parser of some point only printed something.
    """
    from slurm.sweep import Point, points

    found = points(asked.words, asked.lists) if asked.sweeps else [Point({}, asked.words, "")]
    if asked.sweeps and len(found) == 1:
        print(f"note: {NO_LIST}", file=sys.stderr)
    tasks, folder = [], None
    for number, point in enumerate(found):
        config = _parsed(parse, point.words, point.label, quiet=number > 0)
        if config is not None:
            tasks.append(Task(function, config, point.values))
    if len(tasks) < len(found):  # --check, or a table: every point has printed its own
        return [], None
    if len(tasks) > 1:
        folder = _shared([task.config["output_dir"] for task in tasks])
        for task, point in zip(tasks, found, strict=True):
            task.config["output_dir"] = str(folder / point.label)
            task.job_name = str(task.config["name"])
            task.config["name"] = f"{task.job_name}, {point.label}"
    return tasks, folder


def _parsed(parse: Parse, words: list[str], label: str, *, quiet: bool) -> dict[str, Any] | None:
    """The config of a point, None if its parser only printed; a UserError begins with its label.

    quiet: drop what parsing prints, unless that is all there is.
    """
    said, noted, code, config = io.StringIO(), io.StringIO(), None, None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(noted):
        try:
            config = parse(words)
        except SystemExit as left:
            code = left.code
    if code:
        where = f"{label}: " if label else ""
        raise UserError(where + said.getvalue().strip().removeprefix("error: "))
    if not quiet or config is None:
        sys.stderr.write(said.getvalue())
        sys.stdout.write(noted.getvalue())
    return None if config is None else plain(config)


def _shared(folders: list[str]) -> Path:
    """The folder of a sweep: the run folder of all points, or its parent if they differ in it."""
    first = Path(folders[0]).absolute()
    return first if len(set(folders)) == 1 else first.parent


def _followers(commands: list[str], task: Task) -> list[Task]:
    found: list[Task] = []
    for command in commands:
        script, words = _script(command)
        stem = script.stem
        number = sum(
            other.config["output_dir"].startswith(f"{task.folder}/{stem}") for other in found
        )
        function, parse = capture(script)
        words = [word.replace("{run}", str(task.folder)) for word in words]
        with _naming(command):
            config = _parsed(parse, words, "", quiet=bool(task.values))
            default = _parsed(parse, [], "", quiet=True)
            if config is None or default is None:
                raise UserError("it only prints something")
            place = task.folder / (f"{stem}_{number + 1}" if number else stem)
            config = _inherit(config, default, task.config, place)
        job_name = f"{task.job_name or task.config['name']}-{place.name}"
        found.append(Task(function, config, task.values, command=command, job_name=job_name))
    return found


def _script(command: str) -> tuple[Path, list[str]]:
    """Path and words of the script in a --then command; a leading `python` is skipped."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--then {command!r}: {error}") from None
    if words and re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        words.pop(0)
    given = Path(words[0]) if words else Path()
    script = given if given.is_file() else ROOT / given
    if not script.is_file() or script.suffix != ".py":
        ours = [f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")]
        raise UserError(f"--then: there is no script {given}{nearest(given, ours)}")
    return script, words[1:]


def capture(script: Path) -> tuple[str, Parse]:
    """The function that a script would start, and its parser, without starting it."""
    if "slurm.command" not in script.read_text():  # running such a script would do its work now
        raise UserError(f"--then: {script} starts nothing that could follow a run")
    found: list[tuple[str, Parse]] = []
    token = _captured.set(found)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as left:  # a script may end in sys.exit(0)
        if left.code:
            raise
    finally:
        _captured.reset(token)
    if not found:
        raise UserError(f"--then: {script} starts nothing that could follow a run")
    return found[0]


@contextlib.contextmanager
def _naming(command: str) -> Any:
    try:
        yield
    except UserError as error:
        raise UserError(f"--then {command!r}: {error}") from None


def _inherit(
    config: dict[str, Any], default: dict[str, Any], first: dict[str, Any], place: Path
) -> dict[str, Any]:
    """Fill keys that a --then command leaves at their defaults from the run it follows.

    These are net, weights, data, run folder, name, launcher (on one node), cluster and device.
    """
    open_keys = {key for key in config if config[key] == default.get(key)}
    if {"backbone", "weights"} <= open_keys and config["weights"] is None:
        if "backbone" not in first:
            raise UserError(f"{first['name']} leaves no network to follow it with: give weights=")
        config["backbone"] = first["backbone"]
        config["weights"] = str(Path(first["output_dir"]).absolute() / EXPORTED)
    if "data" in open_keys & first.keys():
        config["data"] = first["data"]
    if config["output_dir"] in (default["output_dir"], f"runs/{config['name']}"):
        config["output_dir"] = str(place)
    if "name" in open_keys:
        config["name"] = f"{first['name']}, {place.name}"
    if "launcher" in open_keys:
        config["launcher"] = {**first["launcher"], "nodes": 1}
    config["launcher"]["kind"] = first["launcher"]["kind"]
    for key in {"cluster", "device"} & open_keys & first.keys():
        config[key] = first[key]
    return config

"""Start `function(config)` where the config says: here, in several processes, or as a Slurm job.

Under torchrun every process runs the function itself and joins the others. The launcher works for
any function and any config; settings of the cluster come from configs/cluster.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import record
from slurm.checks import check_cluster, check_launch
from slurm.cluster import check_machine
from slurm.job import Function, Job
from slurm.local import run_apart, run_processes
from slurm.printing import show_outcomes, show_points
from slurm.submission import Submission, with_id
from slurm.task import Task
from utils.command import told_in_one_line
from utils.config.build import check_targets, plain
from utils.environment import whole_number
from utils.errors import UserError
from utils.folders import check_run_folder, keeps_records, make_folder
from utils.online_weights import with_files

if TYPE_CHECKING:
    import submitit


def launch(function: Function, config: Mapping[str, Any]) -> Any:
    """Run or submit `function(config)`; returns its result if it ran in this process.

    A user's mistake prints one line and exits with code 2, an interrupt exits with 130; every other
    error propagates, so that the exit code shows it.
    """
    return launch_all([Task(function, plain(config))])


def launch_all(tasks: Sequence[Task], *, folder: Path | None = None, dry_run: bool = False) -> Any:
    """Run or submit one task, or the points of a sweep, whose run folders lie in `folder`.

    In Slurm several tasks are one job array; elsewhere they run one after another, each in its own
    process. A failed one does not stop the others. `dry_run` shows what would be started.
    """
    with told_in_one_line():  # also around imports, checks and records, not only the function
        return _launch(tasks, folder or tasks[0].folder, dry_run)


def submit(function: Function, config: Mapping[str, Any]) -> "submitit.Job[Any]":
    """Submit a job through submitit and return it; `cluster.executor=local` runs it here.

    Raises `UserError` if there is no Slurm or Slurm refuses the job.
    """
    check_cluster(config)
    submission = Submission(function, [config])
    check_machine(submission.cluster)
    return submission.submit()[0]


def _launch(tasks: Sequence[Task], folder: Path, dry_run: bool) -> Any:
    joins = "TORCHELASTIC_RUN_ID" in os.environ
    several = len(tasks) > 1 or bool(tasks[0].then)
    for task in _all(tasks):
        with task.named():
            _check(task, joins=joins, submits=not joins and not dry_run)
    for part in _parts(_all(tasks)):
        with part.named():
            _check_training(part.config)
    folders = [str(task.folder) for task in _all(tasks)]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(
            f"two runs would write to {twice}: --then takes a folder such as {{run}}/probes"
        )
    kinds = {task.config["launcher"]["kind"] for task in _all(tasks)}
    if joins and (several or dry_run):
        raise UserError("-m, --then and --dry-run are not for torchrun: use launcher=local instead")
    if several and len(kinds) > 1:
        raise UserError("the points of a sweep and what follows need one launcher")
    kind = "here" if joins else kinds.pop()
    if several or dry_run:  # a single run on this machine builds them at once anyway
        _build_networks([part for part in _parts(tasks) if part.config.get("recipe")])
    if dry_run:
        _tell_of_data(tasks)
    else:  # download weights now, as a cluster's nodes may have no network
        for task in _all(tasks):
            task.config = with_files(task.config)
    if kind == "slurm":
        return _show_scripts(tasks, folder) if dry_run else _submit(tasks, folder)
    if dry_run:
        _show_plan(tasks, kind)
    elif several:
        _run_in_turn(tasks)
    else:
        return _run(tasks[0], kind)
    return None


def _tell_of_data(tasks: Sequence[Task]) -> None:
    """Print what --check notes of the data; a job gets the config as it was composed here."""
    from utils.config.check import look_at_data

    notes: dict[str, None] = {}
    for part in _parts(_all(tasks)):
        with part.named():
            notes |= dict.fromkeys(look_at_data(part.config))
    for note in notes:  # not into the script that a dry run prints
        print(note, file=sys.stderr)


def _all(tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        yield task
        yield from task.then


def _parts(tasks: Iterable[Task]) -> list[Task]:
    return [part for task in tasks for part in task.parts]


def _check(task: Task, *, joins: bool, submits: bool) -> None:
    check_launch(task.config, joins=joins)
    if task.config["launcher"]["kind"] == "slurm" and submits:
        check_machine(task.config["cluster"])
    check_run_folder(task.config)
    check_targets(task.config)


def _check_training(config: Mapping[str, Any]) -> None:
    if "recipe" in config:
        from utils.config.settings import check_settings  # imported here because it needs torch

        check_settings(config)


# On this machine


def _run(task: Task, kind: str) -> Any:
    config = task.config
    kept = keeps_records(config)
    processes = config["launcher"]["gpus_per_node"] if kind == "local" else 1
    facts: dict[str, Any] = {
        "kind": kind,
        "processes": whole_number("WORLD_SIZE", processes),
    }
    # From here on a refusal is on record too, with the reason (slurm.jobs): the images and
    # weights are looked at in the run, whose terminal nobody may watch.
    if kept:  # under torchrun every process does this, and reports its own error
        make_folder(task.folder)
    with record.attempt(task.folder, **facts) if kept else nullcontext():
        if kind == "local":
            return run_processes(task.function, config)
        job = Job(task.function, config)
        return _recorded(job)() if "TORCHELASTIC_ERROR_FILE" in os.environ else job()


def _recorded(job: Job) -> Callable[[], Any]:
    """The job, wrapped so that torchrun's final report contains its traceback."""
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(job)


def _run_in_turn(tasks: Sequence[Task]) -> None:
    """Run the tasks one after another, each followed by its `then` tasks if it succeeded."""
    codes: list[tuple[Task, int | None]] = []
    try:
        for number, task in enumerate(tasks, 1):
            _announce(f"{number} of {len(tasks)}", task)
            code = _run_noted(task, codes)
            for then in task.then:
                if code == 0:
                    _announce("then", then)
                    _run_noted(then, codes)
                else:
                    codes.append((then, None))
    finally:  # a signal leaves some of them without a start
        show_outcomes([*codes, *((task, None) for task in list(_all(tasks))[len(codes) :])])
    if bad := sum(code != 0 for _, code in codes):
        print(f"error: {bad} of {len(codes)} did not succeed", file=sys.stderr)
        raise SystemExit(1)


def _run_noted(task: Task, codes: list[tuple[Task, int | None]]) -> int:
    """Run a task apart and note its exit code, also where a signal ends the others with it."""
    try:
        code = run_apart(_run_one, task)
    except KeyboardInterrupt:
        codes.append((task, 128 + signal.SIGINT))
        raise
    except SystemExit as told:
        codes.append((task, int(told.code or 0)))
        raise
    codes.append((task, code))
    return code


def _run_one(task: Task) -> None:
    launch(task.function, task.config)


def _announce(which: str, task: Task) -> None:
    print(f"== {which}: {task.label or task.config['name']} -> {task.folder}", flush=True)


def _show_plan(tasks: Sequence[Task], kind: str) -> None:
    count = tasks[0].config["launcher"]["gpus_per_node"] if kind == "local" else 1
    print(f"dry run: nothing is started; launcher={kind}, {count} process{'es' * (count > 1)} each")
    show_points(list(_all(tasks)))


# In Slurm


def _submit(tasks: Sequence[Task], folder: Path) -> None:
    _build_networks(_parts(_all(tasks)), download=True)
    _tell_of_data(tasks)
    submission = _submission(tasks, folder)
    jobs = submission.submit()
    first = str(jobs[0].job_id)
    shared = first.split("_")[0]
    run = Path(with_id(folder, shared))
    for note in submission.snapshot.notes() if submission.snapshot else ():
        print(note)
    print(f"Submitted job_id: {shared}")
    print(f"Logs and checkpoints will be saved at: {run}")
    print(f"Follow rank 0: tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    if submission.executor_name == "slurm":
        print(f"State: squeue -j {shared}; after its end: sacct -j {shared}")
        print(f"Cancel: scancel {shared}")
    if len(tasks) > 1:
        show_points([_placed(task, shared) for task in tasks], [str(job.job_id) for job in jobs])
    for number in range(len(tasks[0].then)):
        _submit_next([_placed(task.then[number], shared) for task in tasks], run, shared)


def _submit_next(tasks: Sequence[Task], run: Path, after: str) -> None:
    job = str(_submission(tasks, _folder_of_next(tasks, run), after=after).submit()[0].job_id)
    where = tasks[0].folder if len(tasks) == 1 else f"{tasks[0].folder}, ..."
    print(
        f"Then job {job.split('_')[0]}, if {after} succeeds: {tasks[0].command}; results: {where}"
    )


def _folder_of_next(tasks: Sequence[Task], run: Path) -> Path:
    return tasks[0].folder if len(tasks) == 1 else run


def _submission(tasks: Sequence[Task], folder: Path, *, after: str = "") -> Submission:
    configs = [task.config for task in tasks]
    if after and configs[0]["cluster"]["executor"] == "local":
        raise UserError(
            "submitit's local executor has no dependent jobs: rehearse --then with launcher=local"
        )
    return Submission(tasks[0].function, configs, folder, after=after, name=tasks[0].job_name)


def _placed(task: Task, job_id: str) -> Task:
    """The task with %j in its config replaced by the job's id."""
    return replace(task, config=_with_id(task.config, job_id))


def _with_id(value: Any, job_id: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_id(item, job_id) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_id(item, job_id) for item in value]
    return value.replace("%j", job_id) if isinstance(value, str) else value


def _build_networks(tasks: Sequence[Task], *, download: bool = False) -> None:
    """Build the networks, so that a constructor's error shows now and not in a queued job.

    So does a batch that the processes cannot make, and a run folder that holds a run of another
    network. With `download` what timm downloads of them (`pretrained`) comes now too, for nodes
    without a network.
    """
    from utils.config.check import check_run, describe_batch, networks

    seen: list[Any] = []
    for task in tasks:
        keys = ("backbone", "recipe", "optimizer", "launcher")
        node = {key: task.config.get(key) for key in keys}
        if not node["backbone"]:
            continue
        with task.named():
            if node not in seen:
                seen.append(node)
                recipe = networks(task.config, download=download)[1]
                if recipe is not None:
                    describe_batch(task.config, recipe)
            check_run(task.config)


def _show_scripts(tasks: Sequence[Task], folder: Path) -> None:
    submission = _submission(tasks, folder)
    print(submission.script())
    if len(tasks) > 1:
        show_points(tasks)
    for number, then in enumerate(tasks[0].then):
        followers = [task.then[number] for task in tasks]
        print(f"\n# then, if it succeeds: {then.command}")
        place = _folder_of_next(followers, folder)
        print(_submission(followers, place, after="JOB").script())

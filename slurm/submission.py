"""Submit configs to Slurm as a job or a job array, through submitit.

The batch script does the setup of configs/cluster, puts the snapshot of the code first on Python's
path, starts the processes and then handles how they ended (slurm/after.sh).
"""

import re
import shlex
import shutil
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import record
from slurm.cluster import check_executor, facts, parameters, python_command, refusal
from slurm.job import Function, Job
from slurm.snapshot import Snapshot
from utils.config.build import plain
from utils.errors import UserError
from utils.proc import started

if TYPE_CHECKING:
    import submitit

AFTER = Path(__file__).with_name("after.sh")


class Submission:
    """One config to run as a job, or several as a job array, and the folder of the submission.

    `folder` gets the logs (`slurm/`) and the snapshot (`code/`); it is the run folder of a single
    config and the parent of the run folders of several. %j in it becomes the job's id. `after` is
    the id of the job that must succeed first, `name` the job's name if it is not the config's.
    """

    def __init__(
        self,
        function: Function,
        configs: Sequence[Mapping[str, Any]],
        folder: Path | None = None,
        *,
        after: str = "",
        name: str = "",
    ) -> None:
        self.configs = [_absolute(plain(config)) for config in configs]
        self.cluster = facts(self.configs[0])
        self.is_array = len(self.configs) > 1
        self.executor_name = check_executor(self.cluster)
        self.folder = Path(folder or self.configs[0]["output_dir"]).absolute()
        # submitit's local executor cannot put the id of a job into the folder of its logs.
        kept = "%A" if self.is_array else "%j"
        self.logs = Path(
            str(self.folder).replace("%j", kept if self.executor_name == "slurm" else "local")
        )
        self.jobs = [Job(function, config) for config in self.configs]
        name = name or str(self.configs[0]["name"])
        wanted = [parameters({**config, "name": name}) for config in self.configs]
        self.asked = wanted[0]
        if any(other != self.asked for other in wanted):
            raise UserError(
                "the points of a job array ask the cluster for the same: launcher and cluster "
                "keys cannot be swept; submit them one by one"
            )
        if after:
            kind = "aftercorr" if self.is_array else "afterok"
            self.asked["slurm_dependency"] = f"{kind}:{after}"
            self.asked["slurm_additional_parameters"]["kill-on-invalid-dep"] = "yes"
        self.snapshot = Snapshot() if self.cluster["snapshot"] else None
        code = self.logs / "code" / self.snapshot.name if self.snapshot else None
        setup = [*self.asked.pop("setup"), *_code_lines(code)]
        self.asked["local_setup"] = setup or None
        self.asked["slurm_setup"] = [*setup, *self._facts_of_runs()]
        self.asked["slurm_teardown"] = AFTER.read_text().splitlines()

    def script(self) -> str:
        """The text of the batch script."""
        executor = self._slurm_executor()
        if self.is_array:
            executor.parameters["map_count"] = len(self.jobs)
        return executor._make_submission_file_text(executor._submitit_command_str, "dry_run")

    def submit(self) -> list["submitit.Job[Any]"]:
        """Submit, and return the jobs; `UserError` in one line if Slurm refuses."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        self._check_folders()
        staged = self._stage()
        executor = self._slurm_executor() if self.executor_name == "slurm" else self._rehearsal()
        try:
            with redirect_stderr(StringIO()):  # submitit repeats there what Slurm said
                jobs = executor.submit_array(self.jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            # For an array submitit makes another executor; the failed command names its script.
            sent = [getattr(executor, "script", None), *getattr(error.__cause__, "cmd", [])]
            _remove_unsent(self.logs / "slurm", self.jobs, [Path(word) for word in sent if word])
            if staged:
                shutil.rmtree(staged, ignore_errors=True)
            if isinstance(error, FailedSubmissionError):  # a job may exist nevertheless
                answer = re.search('output "(.*)"', str(error), re.DOTALL)
                said = " ".join((answer[1] if answer else str(error)).split())
                raise UserError(
                    f"sbatch answered {said!r}, which names no job: if squeue --me lists "
                    f"{self.asked['name']!r}, cancel it, as its files are removed"
                ) from error
            raise UserError(refusal(str(error) or _output(error), self.asked)) from error
        self._settle(staged, jobs)
        return jobs

    def _slurm_executor(self) -> Any:
        executor = _executor_class()(
            self.logs / "slurm",
            max_num_timeout=self.cluster["max_requeues"],
            python=python_command(self.cluster),
        )
        asked = {
            key.removeprefix("slurm_"): value
            for key, value in self.asked.items()
            if not key.startswith("local_")
        }
        executor.update_parameters(**executor._convert_parameters(asked))
        return executor

    def _rehearsal(self) -> Any:
        import submitit

        executor = submitit.AutoExecutor(
            self.logs / "slurm",
            cluster="local",
            local_max_num_timeout=self.cluster["max_requeues"],
            local_python=python_command(self.cluster),
        )
        common = ("timeout_min", "nodes", "tasks_per_node", "stderr_to_stdout")
        asked = {key: self.asked[key] for key in common}
        asked["gpus_per_node"] = asked["tasks_per_node"]
        executor.update_parameters(**asked, slurm_signal_delay_s=self.cluster["signal_delay_s"])
        if self.asked["local_setup"]:
            executor.update_parameters(local_setup=self.asked["local_setup"])
        return executor

    def _facts_of_runs(self) -> list[str]:
        """Shell lines that set the variables of slurm/after.sh."""
        runs = " ".join(_in_shell(config["output_dir"]) for config in self.configs)
        limits = [f"{key}={self.cluster[key]}" for key in ("max_requeues", "max_restarts")]
        return [
            *limits,
            f"runs=({runs})",
            "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
            "set +eu  # whatever was chosen above: what follows looks at how they end",
        ]

    def _stage(self) -> Path | None:
        """Copy the code; returns the folder if it was newly written, None otherwise."""
        if self.snapshot is None:
            return None
        code = self.logs / "code" / self.snapshot.name
        if "%" not in str(self.logs):
            return code if self.snapshot.write(code) else None
        from submitit.core.utils import JobPaths

        # The job's id is not known yet: the copy is moved after submission, and the batch script
        # waits for it (`_code_lines`), as submitit's processes wait for their pickle.
        fixed = JobPaths.get_first_id_independent_folder(self.logs)
        staged = fixed / f".code-{self.snapshot.name}-{uuid.uuid4().hex[:8]}"
        self.snapshot.write(staged)
        return staged

    def _settle(self, staged: Path | None, jobs: Sequence["submitit.Job[Any]"]) -> None:
        first = str(jobs[0].job_id).split("_")[0]
        if self.snapshot and staged and "%" in str(self.logs):
            code = Path(with_id(self.logs, first)) / "code" / self.snapshot.name
            code.parent.mkdir(parents=True, exist_ok=True)
            staged.rename(code)
        self._remove_links()
        for job, config in zip(jobs, self.configs, strict=True):
            record.note(
                Path(with_id(config["output_dir"], first)),
                "submitted",
                job=str(job.job_id),
                name=config["name"],
                executor=self.executor_name,
                **self._controller(str(job.job_id)),
                log=str(job.paths.stdout),
                code=self.snapshot.name if self.snapshot else "",
                after=self.asked.get("slurm_dependency", ""),
            )

    def _controller(self, job_id: str) -> dict[str, Any]:
        """Under executor=local, the process whose pid is the job's id; slurm.jobs looks for it."""
        if self.executor_name == "slurm":
            return {}
        pid = int(job_id)
        return {"host": socket.gethostname(), "pid": pid, "since": started(pid)}

    def _remove_links(self) -> None:
        # submitit leaves a link to each script that it has moved into a folder named by an id.
        from submitit.core.utils import JobPaths

        fixed = JobPaths.get_first_id_independent_folder(self.logs / "slurm")
        for path in fixed.glob(".submission_file_*.sh"):
            if path.is_symlink():
                path.unlink()

    def _check_folders(self) -> None:
        """Refuse a run folder that another job, queued or running, will write to."""
        if self.executor_name != "slurm":
            return
        for config in self.configs:
            submitted = [line for line in record.read(Path(config["output_dir"])) if line["job"]]
            job = str(submitted[-1]["job"]) if submitted else ""
            if job and (state := _queued(job)):
                raise UserError(
                    f"{config['output_dir']} is the run folder of job {job}, {state}: wait for it, "
                    f"cancel it (scancel {job}) or choose another output_dir"
                )


def with_id(path: object, job_id: str) -> str:
    """A path with %j and %A replaced by the job's id; for a job array, by the id its jobs share."""
    shared = str(job_id).split("_")[0]
    return str(path).replace("%j", shared).replace("%A", shared)


@cache
def _executor_class() -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """Also writes its script where there is no Slurm, and understands `sbatch --parsable`."""

        script: Path | None = None

        @classmethod
        def affinity(cls) -> int:
            """Make submitit treat Slurm as available."""
            return 2

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            self.script = submission_file_path
            return super()._make_submission_command(submission_file_path)

        @staticmethod
        def _get_job_id_from_submission_command(string: str | bytes) -> str:
            text = string.decode() if isinstance(string, bytes) else string
            # "77;mycluster": a site may have set SBATCH_PARSABLE, or wrap sbatch.
            if short := re.search(r"^(\d+)(;\S+)?$", text.strip(), re.MULTILINE):
                return short[1]
            return SlurmExecutor._get_job_id_from_submission_command(text)

    return Executor


def _code_lines(code: Path | None) -> list[str]:
    """Put the snapshot first on Python's path, before the folder the job was submitted from."""
    if code is None:
        return []
    place = _in_shell(code)
    return [
        f"for _ in {{1..60}}; do [ -e {place} ] && break; sleep 1; done",
        # The checkout, if it is installed, is another code by now.
        f'[ -e {place} ] || {{ echo "error: the copy of the code is gone: "{place}; exit 1; }}',
        f"export PYTHONSAFEPATH=1 PYTHONPATH={place}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _in_shell(path: object) -> str:
    """A path quoted for the batch script, where %j and %A become the job's id."""
    parts = re.split("%[jA]", str(path))
    return '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"'.join(shlex.quote(p) if p else "" for p in parts)


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "output_dir": str(Path(config["output_dir"]).absolute())}


def _queued(job: str) -> str:
    """The state of a queued or running job; "" if it has ended or squeue does not answer."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _output(error: Exception) -> str:
    """The standard output of the sbatch that failed, for when it printed no error."""
    return str(getattr(error.__cause__, "output", None) or "")


def _remove_unsent(folder: Path, jobs: Sequence[Job], sent: Sequence[Path]) -> None:
    """Delete the files that submitit wrote for jobs that Slurm refused."""
    from submitit.core.utils import JobPaths

    marks = [job.mark.encode() for job in jobs]
    for path in JobPaths.get_first_id_independent_folder(folder).glob("*.pkl"):
        content = path.read_bytes()
        if any(mark in content for mark in marks):
            path.unlink()
    for path in sent:
        if path.name.startswith(".submission_file_"):
            path.unlink(missing_ok=True)

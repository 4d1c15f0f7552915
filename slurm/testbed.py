"""A throwaway Slurm on this machine, to rehearse on: `python -m slurm.testbed up|status|down`.

Nothing is mocked: a controller, accounting (slurmdbd with a MariaDB of its own) and two virtual
nodes of four CPUs and four `a100` each (empty files stand for the GPUs). All of it lives in one
folder and on loopback ports of its own; /etc/slurm and services that run already stay untouched.
It takes root on Debian or Ubuntu. Every daemon is recorded by pid, start time and command line, and
only what agrees in all three is ever stopped.
"""

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slurm.processes import (
    alone,
    descendants,
    free_ports,
    listens,
    lives,
    name_localhost,
    stop,
)
from slurm.testbed_files import (
    FIRST_SQL,
    GPUS,
    GRES_CONF,
    LOOPBACK,
    NODES,
    SLURM_CONF,
    SLURMDBD_CONF,
)
from utils.command import Parser, as_command
from utils.errors import UserError
from utils.proc import started

PACKAGES = "slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server munge"
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
WAIT_S = 90  # for each daemon; a machine busy with tests is slow
NODES_OF_GPU = ("sinfo", "-N", "-h", "-p", "gpu", "-o")
SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # not everybody's PATH has the daemons


class Testbed:
    """The throwaway Slurm of one folder; `daemons` are the processes we have started for it."""

    __test__ = False  # pytest: no test class

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "testbed.json"
        self.answer = ""  # of the last command, to be told if it was the last
        self.names_localhost = False
        self.env = {
            **{key: text for key, text in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]),
        }

    @property
    def daemons(self) -> list[dict[str, Any]]:
        """Name, pid, start time and command line of all that was started."""
        return json.loads(self.record.read_text()) if self.record.is_file() else []

    @property
    def exists(self) -> bool:
        """Whether the folder is a testbed's, running or not."""
        return self.record.is_file()

    def is_up(self) -> bool:
        """Whether every daemon lives."""
        return len(self.daemons) == 4 + NODES and all(lives(daemon) for daemon in self.daemons)

    def up(self) -> None:
        """Start it and wait until both nodes take jobs; takes down what it began if that fails."""
        self.folder.chmod(0o711)  # munged and mariadbd, which are not root, live in it
        self._note([])
        try:
            self._start_daemons(self._write_files())
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Cancel its jobs, stop its daemons, remove its folder."""
        if any(lives(daemon) for daemon in self.daemons if daemon["name"] == "slurmctld"):
            self._cancel_jobs()
        left = set(self._steps())
        steps = [(pid, started(pid)) for pid in left | descendants(left)]
        daemons = [(daemon["pid"], daemon["started"]) for daemon in self.daemons if lives(daemon)]
        for pid, since in [*steps, *reversed(daemons)]:
            stop(pid, since)
        shutil.rmtree(self.folder)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands on this cluster."""
        try:
            return subprocess.run(
                words, env=self.env, capture_output=True, text=True, timeout=WAIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 1, "", f"{words[0]} did not answer")

    def _write_files(self) -> dict[str, int]:
        """Write all configuration; returns the port of each daemon."""
        names = ("mariadbd", "slurmdbd", "slurmctld", *(f"node{i + 1}" for i in range(NODES)))
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        facts = {"folder": self.folder, "password": secrets.token_hex(16), **ports}
        facts["first_job"] = 1 + 100 * (ports["mariadbd"] - 17000)
        # A container may forbid it. Slurm then listens on every address, guarded by munge alone.
        self.names_localhost = self._says("unshare", "--uts", "true")
        if self.names_localhost:
            facts |= {"host": "localhost", "bind": LOOPBACK}
        else:
            print("note: the host name is fixed here, so the daemons listen on all addresses")
            facts |= {"host": socket.gethostname().split(".")[0], "bind": ""}
        owners = {"ctld": "root", "spool": "root", "log": "root", "munge": "munge", "db": "mysql"}
        for name, owner in owners.items():
            (self.folder / name).mkdir()
            (self.folder / name).chmod(0o755 if owner == "munge" else 0o700)
            shutil.chown(self.folder / name, owner)
        for name, text, owner in (
            ("slurm.conf", SLURM_CONF, "root"),
            ("gres.conf", GRES_CONF, "root"),
            ("slurmdbd.conf", SLURMDBD_CONF, "root"),
            ("db/first.sql", FIRST_SQL, "mysql"),
            ("munge/key", secrets.token_hex(64), "munge"),
        ):
            path = self.folder / name
            path.touch(mode=0o644 if name in ("slurm.conf", "gres.conf") else 0o600)
            path.write_text(text if name == "munge/key" else text.format(**facts))
            shutil.chown(path, owner)
        for index in range(GPUS):
            (self.folder / f"gpu{index}").touch()
        return ports

    def _start_daemons(self, ports: dict[str, int]) -> None:
        folder, munge = self.folder, self.folder / "munge"
        install = ["--no-defaults", f"--datadir={folder}/db/data", "--user=mysql", "--skip-test-db"]
        words = [self._find("mariadb-install-db"), *install, f"--tmpdir={folder}/db"]
        made = self.run(*words)
        if made.returncode:
            raise UserError(f"mariadb-install-db failed: {_last_line(made.stderr + made.stdout)}")
        files = [f"--{what}-file={munge}/{what}" for what in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", f"--socket={munge}/socket", *files, user="munge")
        self._wait("munged", lambda: self._says("munge", "--no-input", f"--socket={munge}/socket"))
        self._start(
            *("mariadbd", "--no-defaults", f"--datadir={folder}/db/data", f"--tmpdir={folder}/db"),
            *("--bind-address=127.0.0.1", f"--port={ports['mariadbd']}"),
            *(f"--socket={folder}/db/socket", f"--pid-file={folder}/db/pid"),
            *(f"--init-file={folder}/db/first.sql", "--skip-log-bin", "--skip-name-resolve"),
            *("--innodb-buffer-pool-size=128M", "--innodb-lock-wait-timeout=900"),
            user="mysql",
        )
        self._wait("mariadbd", lambda: listens(ports["mariadbd"]))
        self._start("slurmdbd", "-D")
        self._wait("slurmdbd", lambda: listens(ports["slurmdbd"]))
        add = ("sacctmgr", "--immediate", "add", "cluster", "testbed")
        self._wait("slurmdbd", lambda: self._says(*add) or self._says(*add, said="already exists"))
        self._start("slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        self._wait("slurmctld", lambda: self._says("scontrol", "ping", said="is UP"))
        for index in range(NODES):
            self._start("slurmd", "-D", "-N", f"node{index + 1}", "-f", f"{folder}/slurm.conf")
        idle = "\n".join(f"node{index + 1} idle" for index in range(NODES))
        self._wait("slurmd", lambda: self._says(*NODES_OF_GPU, "%N %T", said=idle))

    def _start(self, program: str, *words: str, user: str | None = None) -> None:
        command = [self._find(program), *words]
        with (self.folder / "log" / f"{program}.out").open("a") as log:
            process = subprocess.Popen(
                command,
                env=self.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Control-C in the terminal is not for the daemons
                user=user,
                group=user,
                extra_groups=[] if user else None,
                preexec_fn=name_localhost if self.names_localhost and not user else None,
            )
        daemon = {"name": program, "pid": process.pid, "started": started(process.pid)}
        self._note([*self.daemons, {**daemon, "command": command}])

    def _note(self, daemons: list[dict[str, Any]]) -> None:
        partial = self.record.with_suffix(".partial")
        partial.write_text(json.dumps(daemons, indent=1))
        partial.replace(self.record)

    def _find(self, program: str) -> str:
        return shutil.which(program, path=self.env["PATH"]) or program

    def _says(self, *words: str, said: str = "") -> bool:
        done = self.run(*words)
        self.answer = f"; {words[0]} said: {_last_line(done.stderr + done.stdout)}"
        return said in done.stdout + done.stderr if said else done.returncode == 0

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; UserError if a daemon ends or the wait takes too long."""
        self.answer, end = "", time.monotonic() + WAIT_S
        while not ready():
            gone = [daemon["name"] for daemon in self.daemons if not lives(daemon)]
            if gone or time.monotonic() > end:
                what = f"{gone[0]} ended" if gone else f"{name} was not ready after {WAIT_S} s"
                raise UserError(
                    f"{what}: {self._last_words(gone[0] if gone else name)}{self.answer}"
                )
            time.sleep(0.2)

    def _last_words(self, name: str) -> str:
        """The last line a daemon has logged; its log goes with the folder."""
        logs = [*self.folder.glob(f"log/{name}.*"), *self.folder.glob("log/node*.log")]
        logs = [self.folder / "munge" / "log"] if name == "munged" else logs
        texts = [log.read_text(errors="replace") for log in logs if log.is_file()]
        lines = [_last_line(text) for text in texts if text.strip()]
        return " | ".join(lines) or "it said nothing"

    def _cancel_jobs(self) -> None:
        jobs = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if not jobs:
            return
        self.run("scancel", "--quiet", *jobs)
        end = time.monotonic() + 30
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < end:
            time.sleep(0.5)

    def _steps(self) -> Iterator[int]:
        """Slurm's parent processes of jobs that still run, left behind by our daemons."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                name = (place / "comm").read_text().strip()
                if name == "slurmstepd" and ours in (place / "environ").read_bytes().split(b"\0"):
                    yield int(place.name)
            except OSError:
                continue


def lacking() -> list[str]:
    """The programs of the testbed that this machine does not have."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


@as_command()
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m slurm.testbed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("up", "status", "down"))
    default = Path(tempfile.gettempdir()) / "octic-slurm"
    parser.add_argument("--folder", type=Path, default=default, help=f"{default} by default")
    arguments = parser.parse_args(argv)
    testbed = Testbed(arguments.folder.absolute())
    return {"up": _up, "status": _status, "down": _down}[arguments.command](testbed)


def _up(testbed: Testbed) -> int:
    _check_machine(testbed)
    testbed.folder.mkdir(exist_ok=True)
    with alone(testbed.folder):
        if not testbed.is_up():
            if testbed.exists:
                print("what an earlier one left is taken down first")
                testbed.down()
                testbed.folder.mkdir()
            elif any(testbed.folder.iterdir()):
                raise UserError(f"{testbed.folder} holds other things: name an empty --folder")
            testbed.up()
    return _status(testbed)


def _status(testbed: Testbed) -> int:
    """Print what runs and how to use it; returns 0 if all daemons are up, else 1."""
    if not testbed.exists:
        print(f"down: there is no testbed in {testbed.folder}")
        return 1
    dead = [daemon["name"] for daemon in testbed.daemons if not lives(daemon)]
    if dead or not testbed.is_up():
        print(f"broken: {', '.join(dead) or 'not every daemon'} ended; `up` starts it anew")
        return 1
    version = testbed.run("sinfo", "--version").stdout.strip()
    nodes = testbed.run(*NODES_OF_GPU, "%N %T %c CPUs, %G, partition %P").stdout
    jobs = testbed.run("squeue", "-h", "-o", "job %A %T %j %R").stdout or "no jobs\n"
    hint = f"use it: export SLURM_CONF={testbed.folder}/slurm.conf"
    print(f"up: {version} in {testbed.folder}\n{nodes}{jobs}{hint}")
    return 0


def _down(testbed: Testbed) -> int:
    if not testbed.exists:
        print(f"nothing to take down: there is no testbed in {testbed.folder}")
        return 0
    _check_root(testbed.folder)
    with alone(testbed.folder):
        testbed.down()
    print(f"down: {testbed.folder} is gone")
    return 0


def _check_root(folder: Path) -> None:
    if os.geteuid():
        raise UserError("the testbed's daemons need root: run this as root (sudo, or a container)")
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid):
        raise UserError(f"{folder} belongs to somebody else: name another --folder")


def _check_machine(testbed: Testbed) -> None:
    if missing := lacking():
        raise UserError(
            f"there is no {', '.join(missing)} here: as root on Debian or Ubuntu, "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    folder = testbed.folder
    _check_root(folder)
    # A Unix socket's path has room for 107 characters, and slurm.conf none for a space.
    if len(str(folder)) > 80 or not all(c.isalnum() or c in "/._-" for c in str(folder)):
        raise UserError(f"--folder: at most 80 plain characters without spaces, not {folder}")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it said nothing"


if __name__ == "__main__":
    raise SystemExit(main())

"""Run the measurements of a list, one after the other, and keep all results.

FOLDER holds NAME.log, NAME.json and other files of a measurement, state.json and table.md;
`before/` holds the files of an earlier try of a measurement.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from evaluation.cost import child, machine
from evaluation.cost.speed_figures import Table, print_tables, tables_of, write_markdown
from evaluation.cost.speed_list import DEVICES, Measurement, choose, read_list, script_of
from evaluation.progress import say
from evaluation.results import print_table
from utils.errors import UserError
from utils.lock import FolderLock
from utils.mistakes import mistakes_told
from utils.nearest import nearest
from utils.whole_file import write_text

STATE, TABLE, BEFORE = "state.json", "table.md", "before"
DONE, EARLIER, STOPPED, FAILED, LEFT_OUT = "done", "earlier", "stopped", "failed", "left out"
LEAST_S = 60.0  # with less left of the budget, no measurement is started
PYTHON = ".venv/bin/python"  # as in the commands of the docs
MOST_WORKERS = 16
ON_A_CPU = (
    "no CUDA device here, so the list is the one for a CPU; --device cuda --list shows the other"
)


def show(words: argparse.Namespace, began: float) -> int:
    """Run the command line of `evaluation.commands.speed`; returns the exit code.

    The time budget counts from `began`, on the monotonic clock.
    """
    if words.minutes is not None and not words.minutes > 0:
        raise UserError(f"--minutes must be more than 0, got {words.minutes:g}")
    if words.device not in ("auto", *DEVICES):
        raise UserError(
            f"--device is auto, cuda or cpu, not {words.device!r}{nearest(words.device, DEVICES)}"
        )
    facts = machine.ask()
    device = facts["device_type"] if words.device == "auto" else words.device
    measurements = read_list(device, words.config)
    chosen = choose(measurements, words.only)
    session = Session(words.out, measurements, facts, again=words.again)
    if device == "cpu" and words.device == "auto":
        say(ON_A_CPU)
    if words.list:
        session.show(chosen)
        return 0
    if device == "cuda" != facts["device_type"]:
        raise UserError("the list for cuda needs a CUDA device, and torch sees none here")
    return session.take(chosen, began + 60 * words.minutes if words.minutes else None)


class Session:
    """A folder of measurements on one machine; `again` repeats those that are done."""

    def __init__(
        self,
        folder: Path,
        measurements: Sequence[Measurement],
        facts: Mapping[str, Any],
        *,
        again: bool = False,
        least_s: float = LEAST_S,
    ) -> None:
        self.folder, self.measurements, self.facts = folder, measurements, dict(facts)
        self.again, self.least_s = again, least_s
        self.workers = max(1, min(MOST_WORKERS, facts["cores"] - 2))
        self.entries: dict[str, dict[str, Any]] = _read_state(folder / STATE)
        self.rows: dict[str, tuple[str, float | None]] = {}  # of this session: state and seconds

    def show(self, chosen: Sequence[Measurement]) -> None:
        """Print every measurement with its limit, state and command."""
        for entry in chosen:
            known = self.entry_of(entry)
            state = f"{known['state']} in {known['seconds']:.0f} s" if known else "not measured"
            say(f"{entry.name}: {entry.tells} (at most {entry.minutes:g} min; {state})")
            say(f"    {self.command_of(entry)}")

    @mistakes_told()  # a full disk among them
    def take(self, chosen: Sequence[Measurement], end: float | None) -> int:
        """Run measurements until `end` (monotonic clock), print tables; returns the exit code."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: {error.strerror}") from None
        lock = FolderLock(self.folder)
        lock.acquire()
        try:
            with child.Interrupts() as interrupts:
                for entry in chosen:
                    self._take(entry, end, interrupts)
                self._report(chosen)
                if interrupts.count:
                    return 130
        finally:
            lock.release()
        return int(any(state == FAILED for state, _ in self.rows.values()))

    def entry_of(self, entry: Measurement) -> dict[str, Any] | None:
        """The entry of a measurement with this command, code and device; None without one."""
        known = self.entries.get(entry.name)
        asked = (list(entry.words), self.facts["code"], self.facts["device"])
        same = known and (known["words"], known["code"], known["device"]) == asked
        return known if same else None

    def command_of(self, entry: Measurement) -> str:
        """The command as a user would type it."""
        return shlex.join([PYTHON, *entry.filled(self.folder, self.workers)])

    def _take(self, entry: Measurement, end: float | None, interrupts: child.Interrupts) -> None:
        """Run one measurement, or print why it is left out."""
        self.rows[entry.name] = LEFT_OUT, None
        if interrupts.count:
            return
        known = self.entry_of(entry)
        if known and known["state"] == DONE and not self.again:
            self.rows[entry.name] = EARLIER, known["seconds"]
            changed = " (and changes of your own)" if "-dirty" in known["code"] else ""
            when = f"measured on {known['date']} by this command, revision{changed} and device"
            say(f"{entry.name}: {when}; --again measures it anew")
            return
        left = None if end is None else end - time.monotonic()
        if left is not None and left < self.least_s:
            say(f"{entry.name}: left out, as {max(left, 0):.0f} s of the budget are left")
            return
        limit = 60 * entry.minutes
        cut = left is not None and left < limit
        say(
            f"{entry.name}: {entry.tells}, at most {(left if cut and left else limit) / 60:.3g} min"
        )
        say(f"    {self.command_of(entry)}")
        self._set_aside(entry)
        self._note(entry, state=STOPPED, seconds=0.0)  # its state if this process is killed
        script, *words = entry.filled(self.folder, self.workers)
        ended = child.run(
            [sys.executable, str(script_of(script)), *words],
            self._log(entry),
            limit_s=left if cut and left else limit,
            interrupts=interrupts,
        )
        state = self._say_how_it_ended(entry, ended, cut)
        for name in entry.discard:
            shutil.rmtree(self.folder / entry.name / name, ignore_errors=True)
        self.rows[entry.name] = state, ended.seconds
        self._note(entry, state=state, seconds=round(ended.seconds, 1), exit_code=ended.code)
        write_markdown(self.folder / TABLE, self._tables(), self._protocol(), self._commands())

    def _say_how_it_ended(self, entry: Measurement, ended: child.Ended, cut: bool) -> str:
        seconds = f"{ended.seconds:.0f} s"
        if ended.code == 0:
            say(f"{entry.name}: done in {seconds}")
            return DONE
        if ended.cause is None:
            how = f"exit code {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
            say(f"{entry.name}: failed after {seconds} ({how}); see {self._log(entry)}")
            return FAILED
        limit = "the end of the budget" if cut else "its limit"
        why = "interrupted" if ended.cause == child.INTERRUPT else f"stopped at {limit}"
        say(f"{entry.name}: {why} after {seconds}; what it wrote stays")
        return STOPPED

    def _set_aside(self, entry: Measurement) -> None:
        """Move the files of an earlier try away, so that they are not taken for this one's."""
        place = self.folder / BEFORE / entry.name
        found = [*self.folder.glob(f"{entry.name}.*"), self.folder / entry.name]
        found = [path for path in found if path.exists()]
        if found:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        for path in found:
            path.rename(place / path.name)

    def _note(self, entry: Measurement, **facts: Any) -> None:
        self.entries[entry.name] = {
            **facts,
            "words": list(entry.words),
            "command": self.command_of(entry),
            "code": self.facts["code"],
            "device": self.facts["device"],
            "date": date.today().isoformat(),
        }
        content = {"machine": self.facts, "measurements": self.entries}
        write_text(self.folder / STATE, json.dumps(content, indent=2) + "\n")

    def _report(self, chosen: Sequence[Measurement]) -> None:
        rows = []
        for entry in chosen:
            state, seconds = self.rows[entry.name]
            shown = None if seconds is None else f"{seconds:.0f}"
            rows.append([entry.name, state, shown, self._where(entry)])
        columns = ["measurement", "state", "seconds", "where"]
        print_table("measurements", columns, rows, protocol=self._protocol())
        tables = self._tables()
        print_tables(tables, self._protocol())
        if tables:
            path = self.folder / TABLE
            write_markdown(path, tables, self._protocol(), self._commands())
            say(f"as Markdown, with commands: {path}")

    def _tables(self) -> list[Table]:
        # Of the whole list, even if --only selects a part of it.
        known = [entry for entry in self.measurements if self.entry_of(entry)]
        return tables_of(self.folder, known, self.facts)

    def _commands(self) -> list[str]:
        known = [self.entry_of(entry) for entry in self.measurements]
        return [entry["command"] for entry in known if entry]

    def _protocol(self) -> str:
        return f"{machine.in_words(self.facts)}, {date.today().isoformat()}"

    def _where(self, entry: Measurement) -> str | None:
        places = [self.folder / f"{entry.name}.json", self.folder / entry.name, self._log(entry)]
        return next((str(path) for path in places if path.exists()), None)

    def _log(self, entry: Measurement) -> Path:
        return self.folder / f"{entry.name}.log"


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())["measurements"]
        for entry in found.values():
            entry["words"], entry["code"], entry["device"], entry["state"]
            entry["seconds"], entry["date"], entry["command"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read; move it away to measure everything") from None
    return found

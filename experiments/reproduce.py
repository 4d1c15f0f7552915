"""Judge a published checkpoint and say whether it gives its published figures: FILE [flags]."""

from evaluation.commands.reproduce import parse_reproduction
from slurm.command import main

if __name__ == "__main__":
    raise SystemExit(main("evaluation.reproduce.reproduce", parse_reproduction) not in (True, None))

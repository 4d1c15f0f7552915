"""Judge a published checkpoint and say whether it gives its published figures: FILE [flags]."""

from evaluation.reproduce_arguments import parse_reproduction
from slurm.launch import launch

if __name__ == "__main__" and (config := parse_reproduction()):
    raise SystemExit(0 if launch("evaluation.reproduce.reproduce", config) in (True, None) else 1)

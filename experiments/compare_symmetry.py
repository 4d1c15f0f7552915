"""Train symmetric and plain nets by one recipe on digits, turn the digits, and print one table."""

from evaluation.commands.compare_symmetry import parse_comparison
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.comparison.symmetry.compare", parse_comparison)

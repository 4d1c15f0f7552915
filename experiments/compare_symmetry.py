"""Train symmetric and plain nets by one recipe on digits, turn the digits, and print one table."""

from evaluation.symmetry_comparison_arguments import parse_comparison
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.symmetry_comparison.compare", parse_comparison)

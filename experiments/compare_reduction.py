"""Train a ViT and an octic hybrid on digits, reduce their tokens in every way, print one table."""

from evaluation.commands.compare_reduction import parse_comparison
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.comparison.reduction.compare", parse_comparison)

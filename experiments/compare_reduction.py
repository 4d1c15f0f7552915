"""Train a ViT and an octic hybrid on digits, reduce their tokens in every way, print one table."""

from evaluation.reduction_comparison_arguments import parse_comparison
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.reduction_comparison.compare", parse_comparison)

"""Test and measure the equivariance of a net; of every kind of octic net where none is named."""

from evaluation.commands.equivariance import parse_equivariance
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.symmetry.equivariance_report.report", parse_equivariance)

"""Draw what a net sees: PCA maps, attention, nearest neighbours, segmentations."""

from evaluation.report_arguments import parse_drawing
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.pictures.commands.draw", parse_drawing)

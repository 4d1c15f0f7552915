"""Draw what a net sees: PCA maps, attention, nearest neighbours, segmentations."""

from evaluation.commands.draw import parse_drawing
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.draw.draw", parse_drawing)

"""Draw what a net sees: PCA maps, attention, nearest neighbours, segmentations."""

from evaluation.report_arguments import parse_drawing
from slurm.launch import launch

if __name__ == "__main__":
    launch("evaluation.pictures.commands.draw", parse_drawing())

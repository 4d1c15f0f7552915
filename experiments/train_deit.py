"""Train a classifier with the DeiT III recipe; configs/deit/ holds the runs, --help the flags."""

from slurm.command import main
from utils.config.deit_arguments import parse_deit_training

if __name__ == "__main__":
    main("utils.run.train", parse_deit_training)

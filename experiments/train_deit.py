"""Train a classifier with the DeiT III recipe; configs/deit/ holds the runs, --help the flags."""

from slurm.launch import launch
from utils.config import parse_config

if __name__ == "__main__":
    launch("utils.training.train", parse_config(default="deit/imagenet.yaml", runs="deit"))

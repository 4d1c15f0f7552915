"""Write features of images to one array on disk: OUTPUT --model NAME data.root=DIR."""

from evaluation.commands.extract_features import parse_extraction
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.features.extraction.extract", parse_extraction)

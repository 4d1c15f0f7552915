"""Write features of images to one array on disk: OUTPUT --model NAME data.root=DIR."""

from evaluation.extraction_arguments import parse_extraction
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.extraction.extract", parse_extraction)

"""Write features of images to one array on disk: OUTPUT --model NAME data.root=DIR."""

from evaluation.extraction_arguments import parse_extraction
from slurm.launch import launch

if __name__ == "__main__":
    launch("evaluation.extraction.extract", parse_extraction())

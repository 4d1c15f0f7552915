"""Start a function here, in several processes, or as a Slurm job; imports `utils` alone."""

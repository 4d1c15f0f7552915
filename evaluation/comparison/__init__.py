"""Several nets trained by one recipe and judged side by side."""

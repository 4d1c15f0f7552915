"""Segmentation probes of a frozen backbone: what its patch tokens tell of each pixel."""

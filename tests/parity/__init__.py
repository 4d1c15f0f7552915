"""Stored outputs of the published code, compared with ours through one harness."""

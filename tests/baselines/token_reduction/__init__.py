"""Tests of baselines.token_reduction."""

"""Comparisons of several nets that are trained by one recipe."""

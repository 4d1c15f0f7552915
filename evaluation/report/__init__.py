"""A run folder as one HTML page: what it holds (`collect`), and how that is shown (`page`).

May import: `utils` and what the framework declares; torch is not needed.
"""

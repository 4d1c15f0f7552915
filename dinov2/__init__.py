"""The DINOv2 recipe (Oquab et al. 2023): self-supervised training of nets with a mask token.

May import `vit` and `utils`, nothing else of ours.
"""

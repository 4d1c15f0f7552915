"""DHVT: a hybrid of convolutions and attention for small data sets, registered with timm.

Lu et al. 2022, "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on
Small Datasets". Importing it registers the models. May import `vit`, `utils` and
`baselines.tapped`.
"""

from baselines.dhvt import models
from baselines.dhvt.network import DHVT

__all__ = ["DHVT", "models"]

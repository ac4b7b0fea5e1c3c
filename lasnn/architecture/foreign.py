"""The networks that can only teach: torchvision's and timm's."""

from lasnn.architecture import timm, torchvision

__all__ = ["timm", "torchvision"]

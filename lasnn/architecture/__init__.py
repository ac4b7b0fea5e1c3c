"""The built-in architectures, each written once and built as teacher or student; `torchvision` only teaches."""

from lasnn.architecture import resnet, vgg

__all__ = ["resnet", "vgg"]

"""The built-in architectures, each written once and built as teacher or student; those of `foreign` only teach."""

from lasnn.architecture import resnet, vgg

__all__ = ["resnet", "vgg"]

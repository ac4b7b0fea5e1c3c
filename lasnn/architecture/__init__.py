"""The built-in architectures, each written once and built as teacher or student; those of `foreign` only teach."""

from lasnn.architecture import resnet, spikformer, vgg

__all__ = ["resnet", "spikformer", "vgg"]

"""The flashi2v-train launcher: FlashI2V training on PyTorch's own distributed engine."""

__version__ = "0.1.0"

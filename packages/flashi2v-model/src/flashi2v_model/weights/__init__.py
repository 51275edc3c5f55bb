"""Weights on disk: read, compared, translated between layouts, written."""

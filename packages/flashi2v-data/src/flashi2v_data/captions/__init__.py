"""Captions: cleaned as the public code does, cut by a tokenizer, and what is lost thereby."""

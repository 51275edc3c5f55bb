"""Sampling with fewer calls of the network: what may be left out, what is known of the model, and what stands in."""

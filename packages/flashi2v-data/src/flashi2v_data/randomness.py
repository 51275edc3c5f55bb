"""Random numbers as a pure function of what they are for."""

import hashlib

import torch


def generator(seed: int, purpose: str, epoch: int, index: int) -> torch.Generator:
    """Return a CPU generator that depends on its four arguments alone.

    Everything random about a sample comes from one of these, so results do not depend on the number of ranks or
    workers, nor on where a run was resumed.
    """
    key = f"{seed}/{purpose}/{epoch}/{index}".encode()
    value = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(value)

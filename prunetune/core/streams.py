"""Named random streams: numbers depend on (run seed, purpose, step or tensor name) and on nothing else.

They come from a counter-based generator, so world size, shard order, batch size and resumption cannot
change them. Nothing here touches the global generators of torch, numpy or random.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A generator of its own for one purpose.

    Example:
        >>> a, b = stream(0, "mask", "layers.3", 17), stream(0, "mask", "layers.3", 17)
        >>> a.random() == b.random()
        True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))

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
    return np.random.Generator(np.random.Philox(key=_key(seed, names)))


def _key(seed: int, names: tuple[str | int, ...]) -> int:
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def lattice(seed: int, *names: str | int, rows: slice, columns: int) -> np.ndarray:
    """(rows, columns) uint32: rows of a named random matrix, each found without drawing the ones before it.

    Entry (i, j) depends on the seed, the names, i, j and ``columns`` alone, so any blocks of rows, in any order, are
    blocks of one matrix. Layout: a row takes ``ceil(columns / 8)`` counters of Philox4x64 (eight 32-bit words each,
    low word first), and begins at counter ``row * ceil(columns / 8)``.

    Example:
        >>> whole = lattice(0, "w", rows=slice(0, 4), columns=3)
        >>> bool((lattice(0, "w", rows=slice(2, 4), columns=3) == whole[2:]).all())
        True
    """
    count, width = rows.stop - rows.start, -(-columns // 8)
    generator = np.random.Philox(key=_key(seed, names), counter=rows.start * width)
    words = generator.random_raw(count * width * 4).astype("<u8", copy=False).view("<u4")
    return np.ascontiguousarray(words.reshape(count, width * 8)[:, :columns])

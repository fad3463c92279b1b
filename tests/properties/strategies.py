"""Values that nobody meant: JSON of any shape, mutated mappings, flipped bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(["60%", "-1%", "1e400", "90M", "../../etc/passwd", "${seed}", "${oc.env:HOME}", "<b>", "\x00", ""]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A deep copy of a JSON value in which a few things were replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)) > 1:
        key = draw(st.sampled_from(sorted(value, key=str)))
        action = draw(st.integers(0, 9))
        if action == 0:
            del value[key]
        elif action == 1:
            value[draw(st.text(max_size=8))] = value.pop(key)
        else:
            value[key] = _mutate(draw, value[key])
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 9)) > 2:
        place = draw(st.integers(0, len(value) - 1))
        action = draw(st.integers(0, 5))
        if action == 0:
            del value[place]
        elif action == 1:
            value.insert(place, copy.deepcopy(value[place]))
        elif action == 2:
            value.reverse()
        else:
            value[place] = _mutate(draw, value[place])
        return value
    if isinstance(value, int) and not isinstance(value, bool) and draw(st.booleans()):
        return value + draw(st.sampled_from([-1, 1, -(10**6), 10**6, 0.5]))
    return draw(JSON)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut short, flipped, overwritten or added to; always different from ``content``."""
    kind = draw(st.integers(0, 3))
    place = draw(st.integers(0, len(content) - 1))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draw(st.binary(min_size=1, max_size=9))
    changed = bytearray(content)
    if kind == 2:
        changed[place] ^= draw(st.integers(1, 255))
        return bytes(changed)
    new = draw(st.binary(min_size=1, max_size=9))
    changed[place : place + len(new)] = new
    return bytes(changed) if bytes(changed) != content else content + b"\x00"


def as_json(value: Any) -> str:
    """JSON as Python writes it: NaN and infinity included, which readers must survive."""
    return json.dumps(value)

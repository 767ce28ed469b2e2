"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import SupportsIndex

__all__ = ["parse_size"]

_BINARY = {letter: 1 << 10 * power for power, letter in enumerate("KMGTPE", 1)}
_FACTORS = (
    {"": 1, "B": 1}
    | _BINARY
    | {f"{letter}iB": factor for letter, factor in _BINARY.items()}
    | {f"{letter}B": 1000**power for power, letter in enumerate(_BINARY, 1)}
)
_SIZE = re.compile(r"\s*(\d+)\s*([A-Za-z]*)\s*")


def parse_size(size: SupportsIndex | str, *, block_size: int = 1) -> int:
    """Bytes of a size: an int, or a string like ``"10GiB"``.

    K, M, G, T, P, E and KiB, MiB, … are powers of 1024; KB, MB, … powers of 1000. Never rounded.

    Raises:
        ValueError: It is no size, not positive, or not a multiple of ``block_size``.

    >>> parse_size("10GiB") == parse_size("10G") == 10 << 30
    True
    >>> parse_size("1MB")
    1000000
    >>> parse_size(1000, block_size=512)
    Traceback (most recent call last):
    ...
    ValueError: size=1000: not a multiple of the logical block size, 512 bytes
    """
    number: int
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        factor = _FACTORS.get(match[2][:1].upper() + match[2][1:]) if match else None
        if match is None or factor is None:
            raise ValueError(f'size={size!r}: not a size like 1048576, "64MiB", "10G" or "500MB"')
        number = int(match[1]) * factor
    else:
        try:
            number = size.__index__()
        except AttributeError:
            raise TypeError(f"size={size!r}: an int or a string, not {type(size).__name__}") from None
    if number <= 0:
        raise ValueError(f"size={size!r}: a disk has at least one block")
    if number >= 1 << 63:
        raise ValueError(f"size={size!r}: more than a block device can have")
    if number % block_size:
        raise ValueError(f"size={size!r}: not a multiple of the logical block size, {block_size} bytes")
    return number

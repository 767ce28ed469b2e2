"""The native half: private. Its classes are documented where `ublk` exports them."""

from asyncio import AbstractEventLoop
from collections.abc import Buffer, Callable, Sequence
from os import PathLike
from typing import Any, final

__version__: str

class StateError(RuntimeError): ...
class GoneError(StateError): ...

@final
class Buffer:  # noqa: F811
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...

@final
class Calls:
    def __new__(cls, methods: dict[str, tuple[Callable[..., Any], bool]], flags: Sequence[object]) -> Calls: ...

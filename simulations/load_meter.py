"""Where the seconds of a process's main thread go: each belongs to the innermost of the functions that are timed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch


class Meter:
    """`seconds` and `calls` by part; calls of all threads."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds, self.calls = Counter[str](), Counter[str]()
        self._clock, self._inner = clock, [0.0]  # seconds of the functions within each that is open

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def measured(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.calls[part] += 1
                return function(*given, **named)
            began = self._clock()
            self._inner.append(0.0)
            try:
                return function(*given, **named)
            finally:
                whole = self._clock() - began
                self.seconds[part] += whole - self._inner.pop()
                self.calls[part] += 1
                self._inner[-1] += whole

        return measured

    @contextmanager
    def on(self, places: Mapping[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """The functions of each part: who has it, and its name there."""
        with ExitStack() as stack:
            for part, functions in places.items():
                for owner, name in functions:
                    stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield

"""Times of day: `22:00-06:00`, over midnight too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

TIMES = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
DAY = 24 * 60  # minutes


@dataclass(frozen=True)
class Hours:
    """From the one minute of a day up to the other, which is not in it."""

    start: int
    end: int

    @classmethod
    def of(cls, text: Any) -> Hours:
        """Raises ValueError with what is wanted."""
        found = TIMES.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError("wanted a time like 22:00-06:00")
        first, minutes, last, ends = map(int, found.groups())
        start, end = 60 * first + minutes, 60 * last + ends
        if max(minutes, ends) > 59 or start >= DAY or end > DAY or start == end:
            raise ValueError("wanted two times of a day, such as 22:00-06:00; the whole day is 00:00-24:00")
        return cls(start, end)

    def __contains__(self, now: datetime) -> bool:
        minute = 60 * now.hour + now.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return f"{self.start // 60:02}:{self.start % 60:02}-{self.end // 60:02}:{self.end % 60:02}"


def open_at(hours: Sequence[Hours], now: datetime) -> bool:
    return any(now in one for one in hours)

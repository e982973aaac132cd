"""The sessions of a running service, in memory only; the least recently used gives way, and its owner is told."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from anatomaly.service.limits import Limits, RefusedError

if TYPE_CHECKING:
    from anatomaly.types import SupportBank

_REMEMBERED = 1000  # ids of sessions that had to give way


class Session(NamedTuple):
    """What is kept of one set of normal images: never the images.

    Attributes:
        bank: The encoded normals.
        names: K display names, as the client called its files.
        p_values: What is said of p-values, such as why there are none; empty where nothing was calibrated.
    """

    bank: SupportBank
    names: tuple[str, ...]
    p_values: str

    @property
    def size(self) -> int:
        """Bytes its tensors take."""
        return sum(each.numel() * each.element_size() for each in self.bank.tensors.values())


class Sessions:
    """Sessions by id; used from the event loop alone.

    Args:
        limits: How many there may be, and what they may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._dropped: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes that all sessions take."""
        return sum(each.size for each in self._kept.values())

    def add(self, session: Session) -> str:
        """Keep a session and return its id, which cannot be guessed; others may have to give way.

        Raises:
            RefusedError: It alone takes more than all may.
        """
        room = self._limits.memory_gib * 2**30
        if session.size > room:
            raise RefusedError(
                413,
                f"session: {len(session.names)} normal images take {session.size / 2**30:.3g} GiB encoded, expected at "
                f"most {self._limits.memory_gib:g}. Send fewer, or raise --max_memory_gib.",
            )
        while len(self._kept) >= self._limits.sessions or self.size + session.size > room:
            gone, _ = self._kept.popitem(last=False)
            self._dropped[gone] = None
        while len(self._dropped) > _REMEMBERED:
            self._dropped.popitem(last=False)
        key = secrets.token_urlsafe(16)
        self._kept[key] = session
        return key

    def get(self, key: str) -> Session:
        """The session of an id, which from now on is the most recently used.

        Raises:
            RefusedError: There is none, or it had to give way.
        """
        if key in self._dropped:
            raise RefusedError(410, "session: it gave way to newer ones. Create it again, or raise --max_sessions.")
        if key not in self._kept:
            raise RefusedError(404, "session: no such id. Create one by posting normal images to /sessions.")
        self._kept.move_to_end(key)
        return self._kept[key]

    def remove(self, key: str) -> None:
        """Forget a session; raises like `get`."""
        self.get(key)
        del self._kept[key]

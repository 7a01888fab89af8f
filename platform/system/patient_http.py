"""HTTP connections that cost a stranger more than they cost the server.

uvicorn waits for ever for the rest of a request's head, and answers 503 to everybody while enough
connections wait. Here the whole head must arrive in time, and only so many connections may be
without a request: a new one closes the one that has waited longest. A complete request is never
counted among them, so half requests, however many, keep nobody out.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 10.0  # from the connection to the end of the first head
KEEP_ALIVE_S = 30.0  # from a response to the end of the next head
MAX_CONNECTIONS = 512  # beyond these, uvicorn itself answers 503
MAX_WAITING = 256


def patient_protocol(
    head_s: float = HEAD_S, keep_alive_s: float = KEEP_ALIVE_S, max_waiting: int = MAX_WAITING
) -> type[asyncio.Protocol]:
    """Return the protocol of one server, as `uvicorn.Config(http=…)` takes it.

    Args:
        max_waiting: connections without a complete head; fewer if this process may open few files.
    """
    most = min(max_waiting, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    waiting: dict[Any, asyncio.TimerHandle] = {}  # by connection, the longest wait first

    class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait(head_s)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._wait(keep_alive_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self, seconds: float) -> None:
            self._stop_waiting()
            waiting[self] = self.loop.call_later(seconds, self._give_up)
            if len(waiting) > most:
                next(iter(waiting))._give_up()

        def _stop_waiting(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _give_up(self) -> None:
            self._stop_waiting()
            self.transport.close()

    return PatientProtocol

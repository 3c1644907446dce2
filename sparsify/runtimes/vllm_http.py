"""The client side of vLLM's HTTP server: an answer to one request, and the token streams of several as they come.

Nothing is explained here: what goes wrong leaves as it is (OSError, HTTPException, ValueError, LookupError), for the
session to look into the server's log.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from sparsify.runtimes.session import Stream


class RefusedError(Exception):
    """An answer with another ``status`` than 200; ``told`` is what it says, in one line."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.told = status, _message(body)
        super().__init__(f"{status}: {self.told}")


@dataclass(frozen=True)
class Client:
    """Asks a server; may be used from several threads.

    Attributes:
        host: where it listens.
        port: where it listens.
        timeout_s: seconds of silence after which TimeoutError is raised.
    """

    host: str
    port: int
    timeout_s: float

    def ask(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The answer to one request.

        Raises:
            RefusedError: its status is not 200.
        """
        with closing(self._connect()) as connection, closing(_send(connection, method, route, body)) as response:
            return response.read()

    def follow(self, route: str, bodies: Sequence[Mapping[str, Any]]) -> Stream:
        """The tokens of several streams, a connection each: per item and stream, what has come since the item before.

        Closing it early closes the connections.

        Raises:
            RefusedError: the status of one is not 200.
        """
        arrived: SimpleQueue[tuple[int, list[int] | Exception | None]] = SimpleQueue()
        with ExitStack() as stack:
            # All are connected before the first asks, so that the requests come close to each other.
            connections = [stack.enter_context(closing(self._connect())) for _ in bodies]
            for row, (connection, body) in enumerate(zip(connections, bodies, strict=True)):
                reader = Thread(target=_read, args=(connection, route, body, row, arrived), daemon=True)
                hang_up = partial(_hang_up, connection.sock)
                reader.start()
                stack.callback(reader.join)
                stack.callback(hang_up)
            left = len(bodies)
            while left:
                step: list[list[int]] = [[] for _ in bodies]
                events = [arrived.get()]
                while not arrived.empty():
                    events.append(arrived.get())
                for row, event in events:
                    if isinstance(event, Exception):
                        raise event
                    if event is None:
                        left -= 1
                    else:
                        step[row] += event
                if any(step):
                    yield step

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        connection.connect()
        return connection


def _send(
    connection: http.client.HTTPConnection, method: str, route: str, body: Mapping[str, Any] | None
) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request(method, route, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        with closing(response):
            raise RefusedError(response.status, response.read())
    return response


def _read(
    connection: http.client.HTTPConnection,
    route: str,
    body: Mapping[str, Any],
    row: int,
    arrived: SimpleQueue[tuple[int, list[int] | Exception | None]],
) -> None:
    """Put what a stream brings into ``arrived``: its tokens, and at its end None or what went wrong."""
    try:
        with closing(_send(connection, "POST", route, body)) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    arrived.put((row, None))
                    return
                arrived.put((row, [int(token) for token in json.loads(data)["choices"][0]["token_ids"]]))
        raise ConnectionError("the stream broke off")
    except Exception as error:  # for the thread that asked
        arrived.put((row, error))


def _hang_up(connected: socket.socket) -> None:
    """Make a thread that reads from or writes to a socket stop; closing it would not."""
    with suppress(OSError):  # closed by now
        connected.shutdown(socket.SHUT_RDWR)


def _message(body: bytes) -> str:
    text = body.decode("utf-8", errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        answer = json.loads(text)
        text = str(answer["error"]["message"] if "error" in answer else answer["message"])
    return " ".join(text.split())[:300]

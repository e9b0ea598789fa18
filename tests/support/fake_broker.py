"""A broker that does as each test tells it, connection by connection; the async client as a blocking one."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from broker import AsyncClient

SECONDS_MAX = 5.0  # no test waits longer for what must come

Scene = Callable[["FakeBroker", socket.socket], None]


class FakeBroker:
    """A broker on a free port. Each connection plays the next of `scenes`, and `courteous` after the last."""

    def __init__(self, scenes: tuple[Scene, ...] = (), replies: dict[str, str] | None = None) -> None:
        self.replies = {"GET_WORKER": "127.0.0.1", "PING": "OK", "RELEASE": "OK"} | (replies or {})
        self.over = threading.Event()
        self._heard: list[str] = []
        self._news = threading.Condition()
        self._scenes = list(scenes)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self.over.set()
        with socket.create_connection(("127.0.0.1", self.port)):  # wakes the one that accepts
            pass
        for thread in self._threads:
            thread.join(SECONDS_MAX)
        self._listener.close()

    @property
    def heard(self) -> list[str]:
        """The lines so far, without the name that every one ends with."""
        return [line.partition(" client=")[0] for line in self._heard]

    @property
    def names(self) -> list[str]:
        """The names in the lines so far, each once."""
        return list(dict.fromkeys(line.partition(" client=")[2] for line in self._heard))

    def hear(self, line: str) -> None:
        with self._news:
            self._heard.append(line)
            self._news.notify_all()

    def heard_within(self, times: int, verb: str, seconds: float = SECONDS_MAX) -> bool:
        """Whether so many lines with that verb arrive in that time."""
        with self._news:
            return self._news.wait_for(
                lambda: sum(line.startswith(verb) for line in self._heard) >= times, seconds
            )

    def _accept(self) -> None:
        while not self.over.is_set():  # `close` ends it
            connection, _ = self._listener.accept()
            scene = self._scenes.pop(0) if self._scenes and not self.over.is_set() else courteous
            self._threads.append(threading.Thread(target=self._play, args=(scene, connection)))
            self._threads[-1].start()

    def _play(self, scene: Scene, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            connection.settimeout(SECONDS_MAX)
            scene(self, connection)


def line_from(fake: FakeBroker, connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        chunk = connection.recv(1024)
        if not chunk:
            raise ConnectionResetError
        data += chunk
    fake.hear(data.decode().strip())
    return data.decode().strip()


def courteous(fake: FakeBroker, connection: socket.socket) -> None:
    line = line_from(fake, connection)
    connection.sendall(fake.replies[line.partition(" ")[0]].encode() + b"\n")


def answer(text: str) -> Scene:
    """Hears a line and sends just this, then closes."""

    def scene(fake: FakeBroker, connection: socket.socket) -> None:
        line_from(fake, connection)
        connection.sendall(text.encode())

    return scene


def refuse_unread(fake: FakeBroker, connection: socket.socket) -> None:
    connection.sendall(b"ERROR: too many connections [LIMIT]\n")


def reset(fake: FakeBroker, connection: socket.socket) -> None:
    line_from(fake, connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(fake: FakeBroker, connection: socket.socket) -> None:
    line_from(fake, connection)
    fake.over.wait(SECONDS_MAX)


class Looped:
    """An AsyncClient, called as a Client is: each call in a loop of its own."""

    def __init__(self, *where: Any, **options: Any) -> None:
        self.__dict__["_client"] = AsyncClient(*where, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._client, name, value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return (lambda *a, **k: asyncio.run(attribute(*a, **k))) if callable(attribute) else attribute

"""The process in which moto runs for `tests.support.cloud`: prints its port, ends when stdin closes.

A script, not a module of ours: it imports nothing of this project, so it starts the same from anywhere.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """moto's models are plain dictionaries: requests take turns, so that no race inside moto is ours.

    Also leaves out moto's Server header: werkzeug sends one of its own, and aiohttp in development mode
    refuses an answer that has two.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start_once(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            kept = [(name, value) for name, value in headers if name.lower() != "server"]
            return start_response(status, kept, *rest)

        with self._turn:
            return self._application(environ, start_once)


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request is noise, a traceback is not
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # an orderly end would take moto's models apart object by object, for seconds


if __name__ == "__main__":
    main()

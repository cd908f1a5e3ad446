"""A TCP proxy within the test's process, whose connections can be slowed, cut and frozen."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class TcpProxy:
    """Passes bytes on between its own port and a server's.

    Attributes:
        url: Its address, for REDIS_URL.
        delay_s: Seconds that each piece of an answer is held back.
        is_frozen: Whether answers are held back until this changes.
        is_closed: Whether new connections are cut at once.
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.is_frozen = False
        self.is_closed = False
        self._target = port
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    @contextlib.contextmanager
    def running(self) -> Iterator[TcpProxy]:
        """Take connections while the context is open."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self.cut()

    def cut(self) -> None:
        """End every connection, in the midst of whatever it carries."""
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_closed:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, slow in ((client, server, False), (server, client, True)):
                    self._open.add(source)
                    threading.Thread(target=self._pass, args=(source, sink, slow)).start()

    def _pass(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if slow:
                    time.sleep(self.delay_s)
                    while self.is_frozen and source in self._open:
                        time.sleep(0.01)
                sink.sendall(piece)
        self._open.discard(source)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

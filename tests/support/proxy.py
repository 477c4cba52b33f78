"""A port in front of a server that can hold answers back, or be closed and opened again."""

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes connections on to a server on this machine.

    Attributes:
        limit: Bytes of answers after which a connection waits until there is no limit; None lets all through.
    """

    def __init__(self, url):
        self.target = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.limit: int | None = None
        self._listener, self._open, self._port = None, set(), 0
        self.start()
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self):
        """Opens the port, the same each time."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self):
        """Closes the port and cuts all connections."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                self._open |= {client, server}
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source, target, is_answer):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(2048):
                passed = passed + len(data) if self.limit is not None else 0
                while is_answer and self.limit is not None and passed > self.limit and source in self._open:
                    time.sleep(0.02)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            self._open.discard(one)

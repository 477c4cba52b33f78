"""A port in front of a server that can be slow, or closed and opened again."""

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes connections on to a server on this machine.

    Attributes:
        delay: Seconds before each piece of an answer.
    """

    def __init__(self, url):
        self.target = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.delay, self._listener, self._open, self._port = 0.0, None, set(), 0
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

    def _pass(self, source, target, is_slow):
        with contextlib.suppress(OSError):
            while data := source.recv(2048):
                time.sleep(self.delay if is_slow else 0)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            self._open.discard(one)

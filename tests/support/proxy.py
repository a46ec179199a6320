"""A TCP proxy in front of a real server that breaks connections in the ways networks do."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


class Proxy:
    """Passes bytes on to 127.0.0.1:port; `url` is its own endpoint.

    frozen: connections are accepted and held, no byte passes, as with a stopped member or a dropping firewall.
    cut_after: each connection is closed after that many bytes from the server (None: never). rewrite: what becomes of
    the bytes from the server.
    """

    def __init__(self, port: int) -> None:
        self.port, self.frozen, self.cut_after = port, False, None  # type: int, bool, int | None
        self.rewrite: Callable[[bytes], bytes] | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.stopping = threading.Event()
        self.pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.accepted = self.upward = 0  # connections; bytes from clients

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopping.set()
        self.cut()
        self.listener.close()

    def cut(self) -> None:
        """Close every connection."""
        for pair in list(self.pairs):
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _accept(self) -> None:
        self.listener.settimeout(0.05)
        while not self.stopping.is_set():
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port), 5)
            except TimeoutError:
                continue
            except OSError:
                if self.stopping.is_set():
                    return
                client.close()  # the server is away
                continue
            self.accepted += 1
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.pairs.add((client, server))
            threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        down = 0
        try:
            with client, server:
                while not self.stopping.is_set():
                    if self.frozen:
                        time.sleep(0.02)
                        continue
                    for end in select.select([client, server], [], [], 0.05)[0]:
                        if self.frozen:
                            break
                        data = end.recv(65536)
                        if not data:
                            return
                        if end is client:
                            self.upward += len(data)
                            server.sendall(data)
                            continue
                        if self.cut_after is not None and down + len(data) > self.cut_after:
                            client.sendall(data[:max(0, self.cut_after - down)])
                            return
                        down += len(data)
                        client.sendall(self.rewrite(data) if self.rewrite else data)
        except OSError:
            pass
        finally:
            self.pairs.discard((client, server))

"""A TCP proxy that can stall, delay and reset what passes through it: the network between two parts of the service."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType

Target = str | tuple[str, int]
"""A Unix socket's path, or host and port."""
READ_BYTES = 65536


class Proxy:
    """`with Proxy(target) as proxy:` listens on 127.0.0.1, port `proxy.port`, and passes everything on."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        """Seconds that each piece of data waits."""
        self._bytes_left: int | None = None
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._do(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reset()
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stall(self, *, after: int = 0) -> None:
        """Hold back everything, in both directions, until `flow()`; connections stay open. `after`: once so many bytes passed."""

        async def hold() -> None:
            self._bytes_left = after
            if not after:
                self._flowing.clear()

        self._do(hold)

    def flow(self) -> None:
        """Let everything pass again."""

        async def let() -> None:
            self._bytes_left = None
            self._flowing.set()

        self._do(let)

    def reset(self) -> None:
        """Cut every connection with a RST; new ones are taken."""

        async def cut() -> None:
            for writer in list(self._writers):
                connection = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):  # a Unix socket knows no lingering
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

        self._do(cut)

    def _do(self, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await work()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._flowing.wait()
            if isinstance(self.target, str):
                far_reader, far_writer = await asyncio.open_unix_connection(self.target)
            else:
                far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:  # nobody listens there just now
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                self._writers.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if self._bytes_left is not None:
                    self._bytes_left -= len(data)
                    if self._bytes_left < 0:
                        self._flowing.clear()
                await self._flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

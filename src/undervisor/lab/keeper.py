"""The process that a lab lives in: it starts QEMU, serves its streams, and ends it.

    python -m undervisor.lab.keeper FOLDER

Standard input is its lifeline.  If that ends before the word `stay` came, the lab ends: whoever
wanted it is gone.  QEMU asks the kernel to be killed when the keeper dies, so that nothing is left
after a crash of either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from undervisor.lab.places import LOG, PLAN, Place, started
from undervisor.lab.ports import CONSOLE, GREETING, SHELL
from undervisor.orphans import die_with

STAY: Final = b"stay\n"
READY: Final = b"ready\n"
_PIECE: Final = 1 << 16
_BACKLOG: Final = 1 << 15
_LOG_MOST: Final = 16 << 20
_STUCK: Final = 1 << 20
_CONNECT_SECONDS: Final = 10.0
_GRACE: Final = 5.0


class Stream:
    """One of QEMU's sockets, handed on to whoever connects to ours.

    Consoles are for everybody and are logged.  The others have one user at a time; the next one
    waits, and what comes while there is none is nobody's.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name = place, name
        self._shared = name.startswith(CONSOLE)
        self._users: set[asyncio.StreamWriter] = set()
        self._turn = asyncio.Lock()
        self._last = b""
        self._greeting = GREETING if name.startswith(SHELL) else b""

    async def connect(self) -> None:
        """Connect to QEMU, and listen for users."""
        theirs = self._place.folder / f"{self._name}.qemu"
        deadline = asyncio.get_running_loop().time() + _CONNECT_SECONDS
        while True:
            try:
                self._from, self._to = await asyncio.open_unix_connection(str(theirs))
                break
            except OSError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.02)
        await asyncio.start_unix_server(self._serve, str(self._place.socket(self._name)))

    async def pump(self) -> None:
        """Everything that comes, to the log and to the users, until QEMU ends."""
        with self._place.log(self._name).open("wb") as log:
            while data := await self._from.read(_PIECE):
                if self._shared:
                    self._last = (self._last + data)[-_BACKLOG:]
                    if log.tell() < _LOG_MOST:
                        log.write(data)
                        log.flush()
                for user in list(self._users):
                    await self._hand(user, data)

    async def _hand(self, user: asyncio.StreamWriter, data: bytes) -> None:
        if self._shared and user.transport.get_write_buffer_size() > _STUCK:
            self._users.discard(user)  # it does not read, and the guest must not wait for it
            user.close()
            return
        user.write(data)
        if not self._shared:
            with contextlib.suppress(OSError):
                await user.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(writer.close)
            if not self._shared:
                await stack.enter_async_context(self._turn)
            writer.write(self._last or self._greeting)
            self._users.add(writer)
            stack.callback(self._users.discard, writer)
            with contextlib.suppress(OSError):
                while data := await reader.read(_PIECE):
                    self._to.write(data)
                    await self._to.drain()


async def _lifeline() -> None:
    """Returns when the lab has lost the one that wanted it."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if await reader.readline() == STAY:
        await loop.create_future()


async def _keep(place: Place, command: list[str], names: list[str]) -> None:
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    with (place.folder / LOG).open("wb") as log:
        qemu = await asyncio.create_subprocess_exec(
            *command,
            cwd=place.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
    try:
        streams = [Stream(place, name) for name in names]
        connecting = asyncio.gather(*(stream.connect() for stream in streams))
        ended: list[asyncio.Task[Any]] = [
            asyncio.create_task(ending.wait()),
            asyncio.create_task(_lifeline()),
            asyncio.create_task(qemu.wait()),
        ]
        await asyncio.wait([connecting, *ended], return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and not connecting.exception():
            pumps = [asyncio.ensure_future(stream.pump()) for stream in streams]
            sys.stdout.buffer.write(READY)
            sys.stdout.buffer.flush()
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if qemu.returncode is not None:  # the last words
                await asyncio.wait(pumps, timeout=1.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(qemu.pid, signal.SIGKILL)
        await asyncio.wait_for(qemu.wait(), _GRACE)


def main(folder: str) -> int:
    """Keep the lab in `folder`, whose plan holds the command and the names of the streams."""
    place = Place(Path(folder))
    held = place.hold()
    plan = json.loads((place.folder / PLAN).read_text())
    place.write({"pid": os.getpid(), "started": started(os.getpid()), **plan["about"]})
    try:
        asyncio.run(_keep(place, plan["command"], plan["streams"]))
    finally:
        for socket in (*place.folder.glob("*.sock"), *place.folder.glob("*.qemu")):
            socket.unlink(missing_ok=True)
        os.close(held)
    return 0


if __name__ == "__main__":
    # What asyncio has left to cancel must not keep the lab: everything of it is gone by now.
    os._exit(main(sys.argv[1]))

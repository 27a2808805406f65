"""QEMU and Bochs as machines with a serial line, for the tests of this folder."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"
)
BOCHS_BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
needs_bochs = pytest.mark.skipif(
    not (shutil.which("bochs-bin") and BOCHS_BIOS.exists()), reason="no bochs or no BIOS for it"
)


class Line:
    """A serial line over a socket."""

    def __init__(self, connection):
        self.connection = connection

    def send(self, data):
        self.connection.sendall(data)

    def receive(self, timeout):
        ready, _, _ = select.select([self.connection], [], [], timeout)
        if not ready:
            return b""
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError
        return data


@contextlib.contextmanager
def started(command, folder, listener):
    """A process group of its own, killed at the end; the line it opens to `listener`."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        listener.settimeout(30)
        connection, _ = listener.accept()
        with connection:
            yield Line(connection)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def qemu(media, cpu="EPYC,+svm", processors=1, memory=32):
    """QEMU TCG with `media`, options and files: {"-kernel": bytes}, {"cdrom": bytes}..."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder)
        listener.bind(f"{folder}/line")
        listener.listen()
        command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-m", str(memory)]
        command += ["-smp", str(processors), "-nodefaults", "-no-reboot", "-display", "none"]
        command += ["-chardev", f"socket,id=line,path={folder}/line", "-serial", "chardev:line"]
        for kind, data in media.items():
            (path / "medium").write_bytes(data)
            if kind == "-kernel":
                command += ["-kernel", "medium"]
            else:
                command += ["-boot", "d" if kind == "cdrom" else "c"]
                command += ["-drive", f"file=medium,format=raw,if=ide,media={kind}"]
        with started(command, folder, listener) as line:
            yield line


BOCHS = """
config_interface: textconfig
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy
memory: host=64, guest=64
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model={model}, count={count}, ips=20000000, reset_on_triple_fault=0, ignore_bad_msrs=0
boot: cdrom
ata0-master: type=cdrom, path={folder}/medium, status=inserted
com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}
clock: sync=none
panic: action=fatal
error: action=ignore
info: action=ignore
log: {folder}/log
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1, iodebug=0
"""


@contextlib.contextmanager
def bochs(iso, model, processors=1):
    """Bochs with an ISO."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        (Path(folder) / "medium").write_bytes(iso)
        (Path(folder) / "go").write_text("c\n")
        (Path(folder) / "config").write_text(
            BOCHS.format(
                model=model, count=processors, folder=folder, port=listener.getsockname()[1]
            )
        )
        command = ["bochs-bin", "-q", "-rc", f"{folder}/go", "-f", f"{folder}/config"]
        with started(command, folder, listener) as line:
            yield line

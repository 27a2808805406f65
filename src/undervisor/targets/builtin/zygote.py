"""The process that templates are copies of: it has imported everything that they need.

It is a program of its own, started by `template`: what the script of its user is, and whether that
may be imported, makes no difference.
"""

from __future__ import annotations

import pickle
import signal
import socket
import sys

from undervisor.silicon.glue import machine_code
from undervisor.targets.builtin import forks, template


def main() -> None:
    """Live as long as the socket whose number is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that we work for decides
    machine_code()
    forks.serve(socket.socket(fileno=int(sys.argv[1])), _template)


def _template(message: bytes, sockets: list[socket.socket]) -> None:
    job, cpu, quirks = pickle.loads(message)
    template.live(job, cpu, quirks, *sockets)


if __name__ == "__main__":
    main()

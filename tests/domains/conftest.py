import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from libvirt_daemon import PrivateLibvirt, why_not


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory):
    """A real libvirtd of our own, without KVM."""
    reason = why_not()
    if reason:
        pytest.skip(f"no private libvirtd: {reason}")
    daemon = PrivateLibvirt(tmp_path_factory.mktemp("libvirt"))
    yield daemon
    daemon.stop()


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Where `apply` keeps what was there before."""
    folder = tmp_path / "history"
    monkeypatch.setattr("undervisor.domains.apply._state_folder", lambda: str(folder))
    return folder


@pytest.fixture
def huge_pages():
    """Enough huge pages for one small guest, given back afterwards; there is one such number on a
    machine, so tests in other processes wait."""
    number = Path("/proc/sys/vm/nr_hugepages")
    with open(os.path.join(tempfile.gettempdir(), "undervisor-huge-pages.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = number.read_text()
        number.write_text(str(int(before) + 40))
        yield
        number.write_text(before)

import pytest
from libvirt_daemon import PrivateLibvirt, why_not


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory):
    """A real libvirtd of our own, without KVM; the tests that use it run in one process."""
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

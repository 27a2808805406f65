"""A real Linux as L1 under a real libvirt: verified through its console, with a real L2."""

import json

import pytest

from undervisor.cli.main import main
from undervisor.domains.connection import Libvirt
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.lab.cache import Cache
from undervisor.lab.images import build
from undervisor.lab.plan import Plan
from undervisor.lab.sources import sources

pytestmark = [pytest.mark.deep, pytest.mark.qemu]


@pytest.fixture
def libvirt(libvirtd):
    with Libvirt(libvirtd.uri) as connection:
        yield connection
        for name in connection.domains():
            connection.stop(name)
            connection.undefine(name)


def undervisor(*words):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return end.value.code or 0


@pytest.mark.parametrize(("disable", "code"), [("", 0), ("svm", 1)])
def test_a_linux_behind_its_console_is_verified(disable, code, libvirt, tmp_path, capsys):
    plan, cache = Plan(), Cache()
    images = build(plan, sources(plan, cache), cache)
    kernel = ["--kernel", images.kernel, "--initrd", images.initramfs, "--append",
              "console=ttyS0 quiet"]  # fmt: skip
    capsys.readouterr()
    assert undervisor("guest", "new", "l1", "--vendor", "amd", "--type", "qemu", "--cpu", "EPYC",
                      "--check", "none", "--require", "npt", "--memory", "1G", *kernel,
                      *(["--disable", disable] if disable else [])) == 0  # fmt: skip
    libvirt.define(DomainXml.parse(capsys.readouterr().out).text)
    libvirt.start("l1")
    words = ("guest", "verify", "l1", "--console", "--connect", libvirt.uri, "--json",
             "--wait", "180")  # fmt: skip
    assert undervisor(*words) == code
    said = json.loads(capsys.readouterr().out)
    steps = {step["id"]: step["verdict"] for step in said["steps"]}
    if disable:
        assert steps["flags"] == "fail"
        assert steps["nested-guest"] == "fail"
    else:
        assert steps == {"below": "note", "flags": "ok", "module": "ok", "nested-parameter": "ok",
                         "device": "ok", "nested-guest": "ok"}  # fmt: skip
    assert said["verified"] is not disable

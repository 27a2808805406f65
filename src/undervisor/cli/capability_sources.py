"""Where capabilities are read: this machine, another one, a CPU model of ours, a file, a value.

A source is a word:
  here          this machine: its msr devices, or else /dev/kvm
  msr, kvm      just the one or the other
  cpu:MODEL     a CPU model of the built-in L0
  probe:MODEL   what a guest reads there: the probe, run on the built-in L0 with that model
  user@host     another machine, over SSH
  480=..,48b=.. MSRs written out; phys=39 and linear=48 are address widths
  anything else a file or a recording's folder
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from undervisor.arch.kvm import DEVICE
from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.cli import capability_devices as devices
from undervisor.errors import BadInput
from undervisor.explain.capabilities import MSRS, CapabilitySet
from undervisor.explain.capability_texts import load, msr_index
from undervisor.host.access.opening import open_host
from undervisor.host.access.protocol import Host
from undervisor.host.access.schemes import opener
from undervisor.host.fact import Known
from undervisor.shell.capabilities import from_probe

_INLINE = re.compile(r"\s*(\w+)\s*[=:]\s*((?:0x)?[0-9a-fA-F_]+)\s*\Z")
_SVM_LEAF, _WIDTHS_LEAF = 0x8000_000A, 0x8000_0008


def read_source(word: str, ssh_config: str = "") -> CapabilitySet:
    """The capabilities that `word` names; BadInput where they can't be read."""
    if word == "here":
        return _here()
    if word == "msr":
        return _from_msr_devices()
    if word == "kvm":
        return from_kvm()
    if word.startswith("cpu:"):
        return from_model(word.removeprefix("cpu:"))
    if word.startswith("probe:"):
        return from_builtin(word.removeprefix("probe:"))
    inline = _inline(word)
    if inline is not None:
        return inline
    if os.path.isdir(word):
        return _from_host(recording=word)
    if opener(word) or ("@" in word and not os.path.exists(word)):
        return _from_host(host=word, ssh_config=ssh_config)
    return load(word)


def _inline(word: str) -> CapabilitySet | None:
    """MSRs and widths that are written out."""
    found = CapabilitySet(word, [{}])
    for part in word.split(","):
        match = _INLINE.match(part)
        if match is None:
            return None
        name, digits = match[1], match[2].replace("_", "")
        if name in ("phys", "linear"):
            setattr(found, f"{name.replace('phys', 'physical')}_width", int(digits, 10))
            continue
        index = msr_index(name)
        value = int(digits, 16)
        if index is None or value >> 64:
            return None
        found.msrs[index] = value
    return found


# --- This machine -------------------------------------------------------------------------------


def _here() -> CapabilitySet:
    """The msr devices, or else /dev/kvm, which needs no root, or else CPUID, enough for SVM."""
    reasons = []
    for read in (_from_msr_devices, from_kvm, _from_cpuid):
        try:
            found = read()
        except BadInput as error:
            reasons.append(error.message)
            continue
        found.name = "this machine"
        return found
    raise BadInput(
        "this machine's capabilities can't be read: " + "; ".join(reasons),
        hint="as root with the module msr, or in the group kvm with nesting enabled",
    )


def _from_cpuid() -> CapabilitySet:
    found = CapabilitySet("CPUID")
    _add_leaves(found)
    if not found.vendor:
        raise BadInput("CPUID reports no SVM")
    return found


def _from_msr_devices() -> CapabilitySet:
    """Every processor's MSRs from /dev/cpu/N/msr."""
    found = CapabilitySet("the msr devices", devices.msr_devices())
    _add_leaves(found)
    if not found.vendor:
        raise BadInput("the processor has no VMX capability MSRs")
    return found


def from_kvm(path: str = DEVICE) -> CapabilitySet:
    """What KVM would offer to a guest: its feature MSRs."""
    msrs = devices.kvm_feature_msrs(path)
    found = CapabilitySet("KVM's feature MSRs", [msrs] if msrs else [])
    _add_leaves(found)
    if not found.vendor:
        raise BadInput("KVM offers no VMX here", hint="modprobe kvm_intel nested=1")
    return found


# --- Other machines -------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(host: str, recording: str, ssh_config: str) -> Iterator[Host]:
    opened = open_host(host=host, recording=recording, ssh_config=ssh_config)
    try:
        yield opened
    finally:
        opened.close()


def _from_host(host: str = "", recording: str = "", ssh_config: str = "") -> CapabilitySet:
    """The first processor of another machine, or of a recorded one."""
    with _opened(host, recording, ssh_config) as opened:
        msrs = {}
        why = ""
        for index in sorted(MSRS):
            fact = opened.msr(index)
            if isinstance(fact, Known):
                msrs[index] = fact.value
            else:
                why = why or str(fact)
        if msrs.get(VmxMsr.IA32_VMX_BASIC) == 0:  # emulators without VMX read its MSRs as zeros
            msrs = {}
        known = {i: v for i, v in msrs.items() if i != VmxMsr.IA32_FEATURE_CONTROL}
        found = CapabilitySet(opened.name, [msrs] if known else [])
        _leaves(found, opened)
    if not found.vendor:
        raise BadInput(f"{host or recording}: no capabilities can be read ({why})")
    return found


def _add_leaves(found: CapabilitySet) -> None:
    with _opened("", "", "") as opened:
        _leaves(found, opened)


def _leaves(found: CapabilitySet, host: Host) -> None:
    """Address widths, and the SVM leaf of an AMD processor."""
    top = host.cpuid(0x8000_0000)
    if not isinstance(top, Known):
        return
    if top.value.eax >= _WIDTHS_LEAF:
        widths = host.cpuid(_WIDTHS_LEAF)
        if isinstance(widths, Known):
            found.physical_width = widths.value.eax & 0xFF
            found.linear_width = widths.value.eax >> 8 & 0xFF
    extended = host.cpuid(0x8000_0001)
    has_svm = isinstance(extended, Known) and extended.value.ecx >> 2 & 1
    if has_svm and top.value.eax >= _SVM_LEAF and not any(found.cpus):
        leaf = host.cpuid(_SVM_LEAF)
        if isinstance(leaf, Known):
            value = leaf.value
            found.svm = (value.eax, value.ebx, value.ecx, value.edx)


def from_model(spec: str) -> CapabilitySet:
    """A CPU model of the built-in L0."""
    from undervisor.hypervisor import models

    model = models.named(spec)
    found = CapabilitySet(f"cpu:{spec}")
    found.physical_width, found.linear_width = model.physical_width, model.linear_width
    if model.vmx is not None:
        msrs = model.msrs()
        found.cpus = [{index: msrs[index] for index in sorted(MSRS) if index in msrs}]
    elif model.has("svm"):
        answer = model.cpuid(_SVM_LEAF, 0, models.CpuidState())
        found.svm = (answer.eax, answer.ebx, answer.ecx, answer.edx)
    if not found.vendor:
        raise BadInput(f"the model {spec} has neither VMX nor SVM")
    return found


# --- Inside a target ------------------------------------------------------------------------------

PROBE_MEMORY = 64 << 20
PROBE_SECONDS = 30.0


def from_builtin(spec: str) -> CapabilitySet:
    """What the probe reads as a guest of the built-in L0."""
    from undervisor.guest.image import Image
    from undervisor.guest.probe.client import Probe
    from undervisor.guest.probe.program import program
    from undervisor.targets import Job
    from undervisor.targets.builtin import BuiltinTarget

    target = BuiltinTarget(spec)
    job = Job(Image.parse(program().elf, "probe"), memory=PROBE_MEMORY)
    with target.start(job) as running:
        probe = Probe(running, PROBE_SECONDS)
        probe.wait_for_hello()
        return from_probe(probe, f"probe:{spec}")

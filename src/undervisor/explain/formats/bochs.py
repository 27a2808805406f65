"""Bochs's log: it names the first failed check of VM entry, without the field's value.

Its lines are matched by their telling words; the ids on the right are our rules, the first one the
best fit.  "{r}" is the segment register that the line names.
"""

from __future__ import annotations

import re

from undervisor.arch.vmx.checks import RULES
from undervisor.explain.dump import VMX, Dump, Failure, Observation

MARKERS = (b"VMFAIL", b"VMENTER FAIL", b"VMENTER: ")

_LINE = re.compile(r"(VMFAIL|VMENTER FAIL|VMENTER|FAIL)\s*:\s*(.{3,160})")
_REGISTER = re.compile(r"(?<![A-Z])(ES|CS|SS|DS|FS|GS|LDTR|TR)(?![A-Z])")
_MUST_MAY = {"0-settings": "must-be-one", "1-settings": "may-be-one"}

# Words (a regular expression) -> rules.  The first row that matches counts.
ROWS: tuple[tuple[str, str], ...] = (
    (r"pin-based.*0-settings", "controls.pin.must-be-one"),
    (r"pin-based.*1-settings", "controls.pin.may-be-one"),
    (r"proc-based.*0-settings", "controls.primary.must-be-one"),
    (r"proc-based.*1-settings", "controls.primary.may-be-one"),
    (r"secondary.*0-settings", "controls.secondary.must-be-one"),
    (r"secondary.*1-settings", "controls.secondary.may-be-one"),
    (r"tertiary.*1-settings", "controls.tertiary.may-be-one"),
    (r"vmexit.*0-settings", "controls.exit.primary.must-be-one"),
    (r"vmexit.*1-settings", "controls.exit.primary.may-be-one"),
    (r"vmentry.*0-settings", "controls.entry.controls.must-be-one"),
    (r"vmentry.*1-settings", "controls.entry.controls.may-be-one"),
    (r"CR3 targets", "controls.cr3-target-count"),
    (r"I/O bitmap A", "controls.io-bitmap-a.aligned controls.io-bitmap-a.width"),
    (r"I/O bitmap B", "controls.io-bitmap-b.aligned controls.io-bitmap-b.width"),
    (r"MSR bitmap", "controls.msr-bitmap.aligned controls.msr-bitmap.width"),
    (r"virtual NMI control", "controls.virtual-nmis.nmi-exiting controls.nmi-window.virtual-nmis"),
    (r"VMREAD bitmap", "controls.vmread-bitmap.aligned controls.vmread-bitmap.width"),
    (r"VMWRITE bitmap", "controls.vmwrite-bitmap.aligned controls.vmwrite-bitmap.width"),
    (r"#VE information", "controls.virtualization-exception.aligned"),
    (r"virtual apic phy", "controls.virtual-apic.aligned controls.virtual-apic.width"),
    (r"interrupt delivery.*external", "controls.virtual-interrupts.external-interrupt-exiting"),
    (r"TPR threshold too big", "controls.tpr-threshold.reserved"),
    (r"TPR threshold >", "controls.tpr-threshold.vtpr"),
    (
        r"without TPR shadow",
        "controls.x2apic.tpr-shadow controls.apic-registers.tpr-shadow "
        "controls.virtual-interrupts.tpr-shadow",
    ),
    (r"apic access page", "controls.apic-access.aligned controls.apic-access.width"),
    (r"X2APIC mode.*APIC access", "controls.x2apic.apic-accesses"),
    (
        r"EPTPTR",
        "controls.eptp.memory-type controls.eptp.walk-length controls.eptp.reserved "
        "controls.eptp.width controls.eptp.accessed-dirty",
    ),
    (r"unrestricted guest without EPT", "controls.unrestricted-guest.ept"),
    (r"VPID == 0", "controls.vpid.zero"),
    (r"VM Functions", "controls.vm-functions.may-be-one"),
    (r"eptp list", "controls.eptp-list.aligned controls.eptp-list.width"),
    (r"EPTP-SWITCHING: EPT", "controls.eptp-switching.ept"),
    (r"PML is enabled", "controls.pml.ept"),
    (r"PML base", "controls.pml.aligned controls.pml.width"),
    (r"SPP is enabled", "controls.sub-page-permissions.ept"),
    (r"SPP base", "controls.sub-page-permissions.table.aligned"),
    (r"TSC multiplier", "controls.tsc-multiplier.zero"),
    (r"save_VMX_preemption_timer", "controls.exit.save-preemption-timer"),
    (
        r"VMEXIT CTRL: msr store",
        "controls.exit.msr-store.aligned controls.exit.msr-store.width "
        "controls.exit.msr-store.last",
    ),
    (
        r"VMEXIT CTRL: msr load",
        "controls.exit.msr-load.aligned controls.exit.msr-load.width controls.exit.msr-load.last",
    ),
    (
        r"VMENTRY CTRL: msr load",
        "controls.entry.msr-load.aligned controls.entry.msr-load.width "
        "controls.entry.msr-load.last",
    ),
    (r"outside SMM with dual", "controls.entry.smm.deactivate controls.entry.smm.entry"),
    (r"broken interruption info", "controls.entry.event.reserved"),
    (
        r"event vector \d+ broken error",
        "controls.entry.event.error-code-missing "
        "controls.entry.event.error-code-excess controls.entry.event.error-code-type",
    ),
    (
        r"injected event vector",
        "controls.entry.event.exception-vector controls.entry.event.nmi-vector",
    ),
    (r"injected event instr", "controls.entry.event.length-range controls.entry.event.length-zero"),
    (r"MTF injection", "controls.entry.event.other-vector"),
    (r"injected event type", "controls.entry.event.type controls.entry.event.other"),
    (r"bad error code", "controls.entry.event.error-code-value"),
    (r"x86-64 host control", "host.address-space.host-outside-ia32e"),
    (
        r"guest\(\d\)/host\(\d\)",
        "host.address-space.guest-outside-ia32e host.address-space.host-in-ia32e "
        "host.address-space.guest",
    ),
    (r"host state invalid CR0", "host.cr0.must-be-one host.cr0.may-be-one"),
    (r"host state invalid CR3", "host.cr3.width"),
    (r"host state invalid CR4", "host.cr4.must-be-one host.cr4.may-be-one"),
    (
        r"host segreg",
        "host.cs.rpl host.ss.rpl host.ds.rpl host.es.rpl host.fs.rpl host.gs.rpl host.tr.rpl",
    ),
    (r"host CS selector", "host.cs.null"),
    (r"host SS selector", "host.ss.null"),
    (r"host TR selector", "host.tr.null"),
    (r"host TR BASE", "host.tr.base"),
    (r"host FS BASE", "host.fs.base"),
    (r"host GS BASE", "host.gs.base"),
    (r"host GDTR BASE", "host.gdtr.base"),
    (r"host IDTR BASE", "host.idtr.base"),
    (r"host SYSENTER_ESP", "host.sysenter-esp"),
    (r"host SYSENTER_EIP", "host.sysenter-eip"),
    (r"host MSR_PAT", "host.pat"),
    (r"host IA32_S_CET/EB", "host.s-cet.canonical"),
    (r"host IA32_S_CET", "host.s-cet.reserved host.s-cet.tracker"),
    (r"host SSP\[", "host.ssp.aligned"),
    (r"host SSP", "host.ssp.canonical host.address-space.ssp-high"),
    (r"host INTERRUPT_SSP", "host.interrupt-ssp-table"),
    (r"host CR4.CET", "host.cr4.cet"),
    (r"host EFER reserved", "host.efer.reserved"),
    (r"host EFER", "host.efer.lma host.efer.lme"),
    (r"host CR4.PAE", "host.address-space.pae"),
    (r"host RIP non", "host.address-space.rip-canonical"),
    (r"host RIP >", "host.address-space.rip-high"),
    (r"host CR4.PCIDE", "host.address-space.pcide"),
    (r"RFLAGS reserved", "guest.rflags.reserved"),
    (r"RFLAGS\[1\]", "guest.rflags.bit-1"),
    (r"RFLAGS\.VM", "guest.rflags.vm-ia32e"),
    (r"RFLAGS\.IF", "guest.rflags.if"),
    (r"guest invalid CR0", "guest.cr0.must-be-one guest.cr0.may-be-one"),
    (r"CR0\.PG without", "guest.cr0.pg-without-pe"),
    (r"guest invalid CR3", "guest.cr3.width"),
    (r"guest invalid CR4", "guest.cr4.must-be-one guest.cr4.may-be-one"),
    (r"CR4\.PAE", "guest.ia32e.pae"),
    (r"CR4\.PCIDE", "guest.pcide"),
    (r"invalid DR7", "guest.dr7"),
    (r"CR4\.CET", "guest.cr4.cet"),
    (r"guest IA32_S_CET/EB", "guest.s-cet.canonical"),
    (r"guest IA32_S_CET", "guest.s-cet.reserved guest.s-cet.tracker"),
    (r"guest SSP\[", "guest.ssp.aligned"),
    (r"guest SSP", "guest.ssp.canonical guest.ssp.high"),
    (r"guest INTERRUPT_SSP", "guest.interrupt-ssp-table"),
    (r"v8086 guest bad \w+\.BASE", "guest.{r}.base-vm86"),
    (r"v8086 guest \w+\.LIMIT", "guest.{r}.limit-vm86"),
    (r"v8086 guest \w+\.AR", "guest.{r}.rights-vm86"),
    (r"IDTR/IDTR\.BASE|GDTR/IDTR\.BASE", "guest.gdtr.base guest.idtr.base"),
    (r"IDTR limit", "guest.gdtr.limit guest.idtr.limit"),
    (r"\.BASE non canonical", "guest.{r}.base-canonical"),
    (r"\.BASE > 32", "guest.{r}.base-high"),
    (r"not segment", "guest.{r}.s"),
    (r"is not system", "guest.{r}.s"),
    (r"not present", "guest.{r}.present"),
    (
        r"\.AR/LIMIT",
        "guest.{r}.granularity-byte guest.{r}.granularity-page guest.{r}.reserved-low "
        "guest.{r}.reserved-high",
    ),
    (r"conforming CS\.RPL <>", "guest.cs.dpl"),
    (r"conforming CS\.RPL <", "guest.cs.dpl-conforming"),
    (r"unrestricted guest CS\.DPL", "guest.cs.dpl-data"),
    (r"CS\.TYPE", "guest.cs.type"),
    (r"CS\.D_B", "guest.cs.d"),
    (r"SS\.TYPE", "guest.ss.type"),
    (r"not ACCESSED", "guest.{r}.accessed"),
    (r"not READABLE", "guest.{r}.readable"),
    (r"conforming \w+\.RPL <", "guest.{r}.dpl"),
    (r"CS\.RPL != SS", "guest.ss.rpl"),
    (r"SS\.RPL <>", "guest.ss.dpl"),
    (r"SS\.DPL != 0", "guest.ss.dpl-zero"),
    (r"LDTR\.TI", "guest.ldtr.ti"),
    (r"LDTR type", "guest.ldtr.type"),
    (r"TR invalid", "guest.tr.usable"),
    (r"TR\.TI", "guest.tr.ti"),
    (r"incorrect TR type", "guest.tr.type"),
    (r"guest SYSENTER_ESP", "guest.sysenter-esp"),
    (r"guest SYSENTER_EIP", "guest.sysenter-eip"),
    (r"guest MSR_PAT", "guest.pat"),
    (r"guest EFER reserved", "guest.efer.reserved"),
    (r"EFER\.LMA", "guest.efer.lma"),
    (r"guest EFER", "guest.efer.lme"),
    (r"guest RIP >", "guest.rip.high"),
    (r"guest RIP", "guest.rip.canonical"),
    (r"link pointer malformed", "guest.link.aligned guest.link.width"),
    (r"link pointer must indicate shadow", "guest.link.shadow"),
    (r"link pointer incorrect revision", "guest.link.revision"),
    (r"link pointer equal to current", "guest.link.current"),
    (r"link pointer equal to VMXON", "guest.link.executive"),
    (r"tmpDR6", "guest.pending-debug.reserved"),
    (r"activity state must not", "guest.activity.smm"),
    (r"guest activity state", "guest.activity.range guest.activity.supported"),
    (r"HLT state with SS", "guest.activity.hlt-dpl"),
    (r"entering non active", "guest.activity.blocking"),
    (r"EFLAGS\.IF = 0", "guest.interruptibility.sti-if"),
    (
        r"injecting external",
        "guest.interruptibility.external-sti guest.interruptibility.external-mov-ss "
        "guest.rflags.if",
    ),
    (
        r"injecting NMI",
        "guest.interruptibility.nmi-mov-ss guest.interruptibility.nmi-sti "
        "guest.interruptibility.virtual-nmi",
    ),
    (r"Wait-For-Sipi", "guest.activity.wait-for-sipi-event"),
    (r"shutdown state", "guest.activity.shutdown-event"),
    (r"should block SMI", "guest.interruptibility.smm"),
    (r"SMI blocked", "guest.interruptibility.smi"),
    (
        r"interruptibility state",
        "guest.interruptibility.reserved guest.interruptibility.sti-and-mov-ss",
    ),
    (
        r"EPT Guest State PDPTR",
        "guest.pdpte0.ept guest.pdpte1.ept guest.pdpte2.ept guest.pdpte3.ept",
    ),
    (r"PDPTR", "guest.pdpte0.memory guest.pdpte1.memory guest.pdpte2.memory guest.pdpte3.memory"),
)
_COMPILED = tuple((re.compile(words, re.IGNORECASE), rules) for words, rules in ROWS)
_KNOWN = {rule.id for rule in RULES}

# Failures of VMLAUNCH and VMRESUME before any field is looked at.
_ERRORS: tuple[tuple[str, int], ...] = (
    (r"VMLAUNCH.*non-clear", 4),
    (r"VMRESUME.*non-launched", 5),
    (r"VMLAUNCH.*MOV_SS", 26),
    (r"VMCALL with launched", 19),
    (r"VMPTRLD with VMXON", 10),
    (r"VMCLEAR with invalid physical", 2),
    (r"VMLEAR with VMXON", 3),
    (r"with invalid VMCS ptr", 0),
)


def rules_of(message: str) -> list[str]:
    """The ids of the rules that a message of Bochs means, the best fit first."""
    for words, rules in _COMPILED:
        if not words.search(message):
            continue
        register = _REGISTER.search(message)
        names = rules.replace("{r}", register[1].lower() if register else "cs").split()
        return [f"vmx.{name}" for name in names if f"vmx.{name}" in _KNOWN]
    return []


def read(lines: list[str]) -> list[Dump]:
    """What the last failure in the log says."""
    last: tuple[str, list[str]] | None = None
    error = None
    for line in lines:
        match = _LINE.search(line)
        if match is None:
            continue
        found = rules_of(match[2])
        for words, number in _ERRORS:
            if re.search(words, match[2]):
                last, error = (match[2].strip(), []), number
        if found:
            last, error = (match[2].strip(), found), None
        elif last is None and match[1] in ("VMFAIL", "VMENTER FAIL"):
            last = (match[2].strip(), [])
    if last is None:
        return []
    dump = Dump("Bochs log", VMX, named=last[1])
    dump.failure = Failure(error=error) if error is not None else None
    dump.observations.append(
        Observation(
            "bochs.message",
            f"Bochs says: {last[0]}",
            "Bochs stops at the first failed check and prints no values"
            if last[1]
            else "the instruction failed before any field was looked at"
            if error is not None
            else "this message is not one of Bochs's checks that is known here",
            "dump the VMCS fields of the rules below, or give them as `field = value` text"
            if last[1]
            else "",
            weight=5,
        )
    )
    return [dump]

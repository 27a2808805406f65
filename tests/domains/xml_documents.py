"""Random documents of the shape of a domain: what we know, in many words, and what we don't.

Hypothesis chooses the seed; drawing each of a document's thousand decisions by itself would take
most of the test's time.
"""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

WORDS = ("", "a", "ubuntu-guest", "ß→漢", " two  words ", "a&amp;b &lt;c&gt;", "0", "x" * 300)
CPUS = ("0", "0-3", "0-7,^2", "1,3,5", "2-3,0", "15")
UNITS = ("", "KiB", "MiB", "GiB", "b", "MB")
BOTH = ("on", "off")


class Writer:
    """Writes a document by dice."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)

    def one(self, *choices):
        return self.dice.choice(choices)

    def maybe(self, *choices):
        return self.dice.choice((None, *choices))

    def number(self, most=1 << 20):
        return str(self.dice.randint(1, most))

    def name(self):
        return "".join(
            self.dice.choices("abcdefghijklmnop0123456789-_.", k=self.dice.randint(1, 12))
        )

    def element(self, tag, body="", **attributes):
        words = "".join(f" {k.strip('_')}='{v}'" for k, v in attributes.items() if v is not None)
        return f"<{tag}{words}>{body}</{tag}>" if body else f"<{tag}{words}/>"

    def sized(self, tag):
        return self.element(tag, self.number(), unit=self.one(*UNITS) or None)

    def unknown(self, depth=2):
        """An element that no code of ours knows."""
        inner = [self.unknown(depth - 1) for _ in range(self.dice.randint(0, depth))]
        body = self.one(*WORDS) + self.one("", "<!-- a word -->", "<![CDATA[a<b]]>", "<?pi x?>")
        return self.element("x" + self.name(), body + "".join(inner), a=self.maybe(*WORDS))

    def some(self, *parts):
        """A few of `parts` in any order, with blanks, comments and unknown elements between."""
        keep = [part for part in parts if part is not None and self.dice.random() < 0.75]
        keep += [self.unknown() for _ in range(self.dice.randint(0, 2))]
        self.dice.shuffle(keep)
        return self.one("", "\n  ", "<!-- between -->", "\t\n").join(keep)

    def features(self):
        names = {self.name() for _ in range(self.dice.randint(0, 4))}
        policies = ("force", "require", "optional", "disable", "forbid")
        return [
            self.element("feature", policy=self.maybe(*policies), name=n) for n in sorted(names)
        ]

    def cell(self, number):
        return self.element(
            "cell",
            self.one("", "<distances><sibling id='0' value='10'/></distances>"),
            id=self.maybe(number), cpus=self.one(*CPUS), memory=self.number(),
            unit=self.maybe("MiB", "GiB"), memAccess=self.maybe("shared"),
        )  # fmt: skip

    def cpu(self):
        cells = "".join(self.cell(n) for n in range(self.dice.randint(0, 2)))
        fallback, vendor = self.maybe("allow", "forbid"), self.maybe("AuthenticAMD")
        body = self.some(
            self.element("model", self.name(), fallback=fallback, vendor_id=vendor),
            "<vendor>Intel</vendor>",
            self.element("topology", sockets="1", dies=self.maybe("1"), cores=self.number(64),
                         threads="2", clusters=self.maybe("1")),
            self.element("maxphysaddr", mode=self.one("emulate", "passthrough"),
                         bits=self.maybe("40"), limit=self.maybe("46")),
            "<cache level='3' mode='emulate'/>",
            f"<numa>{cells}</numa>" if cells else None,
            *self.features(),
        )  # fmt: skip
        modes = ("custom", "host-model", "host-passthrough", "maximum")
        return self.element("cpu", body, mode=self.maybe(*modes), match=self.maybe("exact"),
                            check=self.maybe("partial"), migratable=self.maybe(*BOTH))  # fmt: skip

    def disk(self):
        body = self.some(
            self.element("driver", name="qemu", type="qcow2", cache=self.maybe("none"),
                         discard=self.maybe("unmap"), queues=self.maybe("4")),
            self.element("source", file=self.name(), startupPolicy=self.maybe("optional")),
            self.element("target", dev="vda", bus=self.maybe("virtio")),
            "<readonly/>", "<boot order='1'/>",
        )  # fmt: skip
        kinds = ("file", "block", "dir", "network", "volume", "nvme")
        return self.element("disk", body, type=self.maybe(*kinds), device=self.maybe("cdrom"),
                            snapshot=self.maybe("no"))  # fmt: skip

    def interface(self):
        body = self.some(
            "<mac address='52:54:00:00:00:01'/>",
            self.element("source", network=self.name(), portgroup=self.maybe("p")),
            "<model type='virtio'/>",
            self.element("driver", name="vhost", queues=self.maybe("4")),
        )
        kinds = ("network", "bridge", "user", "direct", "hostdev")
        return self.element("interface", body, type=self.one(*kinds))

    def devices(self):
        address = "<address type='pci' domain='0x0000' bus='0x00' slot='0x08' function='0x0'/>"
        target = "<target type='virtio' name='{}'/>"
        return self.element("devices", self.some(
            "<emulator>/usr/bin/qemu-system-x86_64</emulator>",
            self.disk(), self.disk(), self.interface(), self.interface(),
            "<serial type='pty'><target port='0'/></serial>",
            self.element("console", type=self.one("pty", "file")),
            self.element("channel", target.format("org.qemu.guest_agent.0"), type="unix"),
            self.element("channel", target.format("com.redhat.spice.0"), type="spicevmc"),
            self.element("memballoon", address, model="virtio", autodeflate=self.maybe("on")),
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
            "<hostdev mode='subsystem' type='pci'/>",
        ))  # fmt: skip

    def tuning(self):
        pins = [self.element("vcpupin", vcpu=n, cpuset=self.one(*CPUS)) for n in (0, 1, 7)]
        limits = ("shares", "period", "quota", "emulator_period", "global_quota")
        return self.element("cputune", self.some(
            *(self.element(tag, self.number()) for tag in limits), *pins,
            self.element("emulatorpin", cpuset=self.one(*CPUS)),
            self.element("iothreadpin", iothread="1", cpuset=self.one(*CPUS)),
            "<vcpusched vcpus='0' scheduler='fifo' priority='1'/>",
        ))  # fmt: skip

    def backing(self):
        page = self.element("page", size="2048", unit="KiB", nodeset=self.maybe(*CPUS))
        return self.element("memoryBacking", self.some(
            self.element("hugepages", self.one("", page)), "<locked/>", "<source type='memfd'/>",
            "<access mode='shared'/>", "<nosharepages/>",
        ))  # fmt: skip

    def system(self):
        return "<os><type arch='x86_64' machine='q35'>hvm</type>" + self.some(
            "<loader readonly='yes' type='pflash'>/code.fd</loader>", "<nvram>/vars.fd</nvram>",
            "<boot dev='hd'/>", "<kernel>/k</kernel>", "<cmdline>console=ttyS0 a=b</cmdline>",
            "<bootmenu enable='yes'/>",
        ) + "</os>"  # fmt: skip

    def document(self):
        vcpu = self.element("vcpu", self.number(64), placement=self.maybe("static", "auto"),
                            cpuset=self.maybe(*CPUS), current=self.maybe("1"))  # fmt: skip
        body = self.some(
            "<uuid>4b21b526-67a6-4c8b-9d2f-83c21e9cabf2</uuid>", self.sized("currentMemory"), vcpu,
            "<iothreads>2</iothreads>", self.tuning(), self.backing(), self.system(), self.cpu(),
            self.element("memtune", self.some(self.sized("hard_limit"), self.sized("soft_limit"))),
            "<numatune><memory mode='strict' nodeset='0'/>"
            "<memnode cellid='0' mode='strict' nodeset='1'/></numatune>",
            self.devices(), "<features><acpi/></features>", "<clock offset='utc'/>",
            "<metadata><my:x xmlns:my='urn:mine'>1</my:x></metadata>",
            "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            "<qemu:arg value='-s'/><qemu:env name='A' value='B'/></qemu:commandline>",
        )  # fmt: skip
        head = f"<name>{self.name()}</name>{self.sized('memory')}"
        return f"<domain type='{self.one('kvm', 'qemu')}'>{head}{body}</domain>"


def documents():
    """Domains that libvirt might refuse, but that are well-formed and readable."""
    return st.integers(0, 1 << 32).map(lambda seed: Writer(seed).document())

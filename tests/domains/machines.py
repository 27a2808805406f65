"""Recorded machines of a chosen shape, for tuning; each a folder that RecordedHost reads."""

from __future__ import annotations

import json
from pathlib import Path

INTEL = ("GenuineIntel", 6, 79, "Intel(R) Xeon(R) CPU E5-2697 v4 @ 2.30GHz",
         "vmx ept vpid rtm hle", 46)  # fmt: skip
HASWELL = ("GenuineIntel", 6, 63, "Intel(R) Xeon(R) CPU E5-2680 v3", "vmx ept vpid ibrs ibpb", 46)
CLIENT = ("GenuineIntel", 6, 158, "Intel(R) Core(TM) i7-8700K", "vmx ept vpid rtm hle", 39)
AMD = ("AuthenticAMD", 23, 49, "AMD EPYC 7402P", "svm npt nrip_save", 43)


def machine(
    folder: Path,
    *,
    cpu=INTEL,
    nodes=1,
    cores=4,
    threads=2,
    adjacent=True,
    free=32 << 20,
    pages=None,
    vhost=True,
    filesystem="ext4",
    known=("vmx", "svm", "invtsc", "spec-ctrl", "amd-stibp", "xsave", "xsaves"),
) -> str:
    """`cores` and `free` KiB of each node; siblings are adjacent numbers, or a half apart.

    `pages` maps a size in KiB to (total, free) on each node.
    """
    vendor, family, model, name, flags, bits = cpu
    total = nodes * cores * threads
    files = {
        "/proc/cpuinfo": "\n".join(
            f"processor\t: {n}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
            f"model name\t: {name}\nflags\t\t: fpu {flags}\n"
            f"address sizes\t: {bits} bits physical, 48 bits virtual\n"
            for n in range(total)
        ),
        "/sys/devices/system/cpu/online": f"0-{total - 1}\n",
        "/sys/devices/system/node/online": f"0-{nodes - 1}\n" if nodes > 1 else "0\n",
    }
    for node in range(nodes):
        mine = []
        for core in range(cores):
            number = node * cores + core
            if adjacent:
                siblings = [number * threads + t for t in range(threads)]
            else:
                siblings = [number + t * nodes * cores for t in range(threads)]
            mine += siblings
            for cpu_number in siblings:
                path = f"/sys/devices/system/cpu/cpu{cpu_number}/topology/thread_siblings_list"
                files[path] = ",".join(map(str, siblings)) + "\n"
        where = f"/sys/devices/system/node/node{node}"
        files[f"{where}/cpulist"] = ",".join(map(str, sorted(mine))) + "\n"
        files[f"{where}/meminfo"] = f"Node {node} MemFree:        {free} kB\n"
        for size, (count, unused) in (pages or {2048: (0, 0)}).items():
            files[f"{where}/hugepages/hugepages-{size}kB/nr_hugepages"] = f"{count}\n"
            files[f"{where}/hugepages/hugepages-{size}kB/free_hugepages"] = f"{unused}\n"
    features = "".join(f"<feature name='{n}'/>" for n in known)
    files["/usr/share/libvirt/cpu_map/x86_features.xml"] = f"<cpus>{features}</cpus>"
    for path, text in files.items():
        place = folder / "files" / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    said = {
        "format": 1,
        "name": "a machine",
        "stat": {"/dev/vhost-net": {"kind": "character", "mode": "0660", "owner": "root",
                                    "group": "kvm"}} if vhost else {},
        "absent": [] if vhost else ["/dev/vhost-net"],
        "commands": [
            {"argv": ["uname", "-m"], "stdout": "x86_64\n"},
            *(
                {"argv": ["findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", place],
                 "stdout": f"{filesystem} /dev/nvme0n1p2\n"}
                for place in ("/var/lib/libvirt/images/vm.qcow2", "/var/lib/libvirt/images")
            ),
        ],
    }  # fmt: skip
    (folder / "machine.json").write_text(json.dumps(said))
    return str(folder)

"""`enable` in a throw-away root with the distribution's real initramfs tool."""

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
set -e
undervisor() {{ {python} -c "from undervisor.cli.main import main; main()" "$@"; }}
mount -t tmpfs none {work}; cd {work}; mkdir upper scratch root
mount -t overlay overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/scratch {work}/root
mkdir -p root/lib/modules/{version}/kernel root/boot
mount -t proc proc root/proc; mount --bind /dev root/dev
: > root/boot/vmlinuz-{version}; echo CONFIG_RD_GZIP=y > root/boot/config-{version}
chroot root depmod {version} 2>&1
chroot root update-initramfs -c -k {version} 2>&1
undervisor enable --root {work}/root --yes
echo "IN THE IMAGE"
chroot root unmkinitramfs /boot/initrd.img-{version} /image
cat root/image/etc/modprobe.d/zz-undervisor-nested.conf
undervisor enable --undo --root {work}/root --yes
echo "AFTER UNDO"
rm -r root/image; chroot root unmkinitramfs /boot/initrd.img-{version} /image
ls root/image/etc/modprobe.d root/etc/modprobe.d
"""


@pytest.mark.deep
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay, which needs root")
@pytest.mark.skipif(
    not shutil.which("update-initramfs", path="/usr/sbin"), reason="no initramfs-tools"
)
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_the_real_initramfs_holds_the_configuration_and_undo_takes_it_out(tmp_path):
    text = SCRIPT.format(work=tmp_path, version="6.1.0-test", python=sys.executable)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", text], capture_output=True, text=True, timeout=300
    )
    if "overlay" in done.stderr and "mount" in done.stderr:
        pytest.skip(f"no overlay file system here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "options kvm_intel nested=1" in done.stdout.partition("IN THE IMAGE")[2]
    assert "zz-undervisor" not in done.stdout.partition("AFTER UNDO")[2]
    assert not os.path.exists("/etc/modprobe.d/zz-undervisor-nested.conf")

#!/bin/busybox sh
# The first process of a Linux that is there for its KVM alone: modules, then the agent.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
dmesg -n 1

for module in $(cat /lab/modules/order); do
    case $module in
    kvm_amd) grep -qw svm /proc/cpuinfo || continue ;;
    kvm_intel) grep -qw vmx /proc/cpuinfo || continue ;;
    virtio*) continue ;;
    esac
    insmod "/lab/modules/$module.ko"
done

python3 /lab/agent.pyz /dev/ttyS0
poweroff -f

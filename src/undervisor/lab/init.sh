#!/bin/busybox sh
# The first process of every level: mounts, modules, streams, then shells for whoever asks.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=vt100
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin /lab/ports
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
dmesg -n 1

level=1 ports=0
for word in $(cat /proc/cmdline); do
    case $word in
    lab.level=*) level=${word#*=} ;;
    lab.ports=*) ports=${word#*=} ;;
    esac
done
hostname "l$level"
ifconfig lo 127.0.0.1 up

for module in $(cat /lab/modules/order); do
    case $module in
    kvm_amd) grep -qw svm /proc/cpuinfo || continue ;;
    kvm_intel) grep -qw vmx /proc/cpuinfo || continue ;;
    esac
    insmod "/lab/modules/$module.ko"
done

# Ports get their names after they appear.
until set -- /sys/class/virtio-ports/*/name; [ $# -ge "$ports" ] && [ -e "$1" ]; do
    sleep 0.01
done
for name; do
    device=${name%/name}
    ln -s "/dev/${device##*/}" "/lab/ports/$(cat "$name")"
done

# A port can be opened once: the same descriptor reads and writes.
while :; do
    setsid sh -c 'echo $$ >/run/shell.pid; exec sh' 0<>"/lab/ports/shell.l$level" 1>&0 2>/dev/null
    sleep 0.1
done &
while read -r word; do
    case $word in
    off) poweroff -f ;;
    *)
        # The group of a shell whose command does not end. Bytes that come before the next shell
        # has opened the port are lost, so whoever asked waits for an answer.
        old=$(cat /run/shell.pid)
        kill -9 "-$old"
        while [ "$(cat /run/shell.pid)" = "$old" ]; do sleep 0.05; done
        echo again >&0
        ;;
    esac
done 0<>"/lab/ports/control.l$level" &

echo "l$level is up: Linux $(uname -r)"
while :; do
    setsid cttyhack sh
    sleep 0.1
done

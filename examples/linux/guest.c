/*
 * The smallest user of KVM: one real-mode guest that says "hi" on the serial port, asks CPUID a
 * thousand times and halts.  Inside a Linux that runs as L1, that guest is L2.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { RAM = 0x10000, ENTRY = 0x1000, STACK = 0x8000 };

static const unsigned char code[] = {
    0xba, 0xf8, 0x03,                                   /* mov $0x3f8, %dx */
    0xb0, 'h', 0xee, 0xb0, 'i', 0xee, 0xb0, '\n', 0xee, /* out: "hi" */
    0xb9, 0xe8, 0x03,                                   /* mov $1000, %cx */
    0x51, 0x0f, 0xa2, 0x59, 0xe2, 0xfa,                 /* 1: push; cpuid; pop; loop 1b */
    0xf4,                                               /* hlt */
};

static int need(int value, const char *what)
{
    if (value < 0) {
        perror(what);
        exit(1);
    }
    return value;
}

static void *map(int file, size_t size, const char *what)
{
    int flags = MAP_SHARED | (file < 0 ? MAP_ANONYMOUS : 0);
    void *area = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);

    need(area == MAP_FAILED ? -1 : 0, what);
    return area;
}

static int new_vcpu(int vm, unsigned char *ram)
{
    struct kvm_userspace_memory_region region = {
        .memory_size = RAM, .userspace_addr = (uintptr_t)ram,
    };
    struct kvm_regs registers = { .rip = ENTRY, .rsp = STACK, .rflags = 2 };
    struct kvm_sregs system;
    int vcpu;

    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    need(ioctl(vcpu, KVM_GET_SREGS, &system), "KVM_GET_SREGS");
    system.cs.base = 0;
    system.cs.selector = 0;
    need(ioctl(vcpu, KVM_SET_SREGS, &system), "KVM_SET_SREGS");
    need(ioctl(vcpu, KVM_SET_REGS, &registers), "KVM_SET_REGS");
    return vcpu;
}

int main(void)
{
    int kvm = need(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    unsigned char *ram = map(-1, RAM, "memory");
    int vcpu = new_vcpu(vm, ram);
    size_t size = need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = map(vcpu, size, "vCPU");

    memcpy(ram + ENTRY, code, sizeof code);
    printf("L2 says: ");
    for (;;) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_HLT)
            break;
        if (run->exit_reason != KVM_EXIT_IO) {
            printf("unexpected exit %u, hardware reason %#llx\n", run->exit_reason,
                   (unsigned long long)run->hw.hardware_exit_reason);
            return 1;
        }
        putchar(*((char *)run + run->io.data_offset));
    }
    puts("L2 halted: KVM works inside");
    return 0;
}

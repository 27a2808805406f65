#include "machine.h"

#include "console.h"
#include "cpu.h"

enum { PORT_DEBUG_EXIT = 0xf4, PORT_BOCHS = 0x8900, PORT_PIC_1 = 0x21, PORT_PIC_2 = 0xa1 };

/* 8254 channel 2, gated by port 0x61, counts 1193182 times a second. */
enum { PORT_PIT_COUNT = 0x42, PORT_PIT_COMMAND = 0x43, PORT_PIT_GATE = 0x61 };
enum { PIT_CHANNEL_2_ONE_SHOT = 0xb0, PIT_GATE = 1, PIT_SPEAKER = 2, PIT_OUTPUT = 0x20 };
enum { PIT_HERTZ = 1193182 };

extern u8 image_end[];

static struct lock memory_lock, clock_lock;
static u64 next_page, memory_top;

void finish(enum outcome outcome)
{
    console_drain();
    outl(PORT_DEBUG_EXIT, outcome);
    for (const char *c = "Shutdown"; *c; c++)
        outb(PORT_BOCHS, (u8)*c);
    for (;;) {
        interrupts_off();
        halt();
    }
}

void panic(enum outcome outcome, const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    print_arguments(format, arguments);
    print_arguments("\n", arguments);
    __builtin_va_end(arguments);
    finish(outcome);
}

void memory_start(u64 top)
{
    next_page = physical(image_end);
    memory_top = top;
}

void *allocate_pages(unsigned count)
{
    lock(&memory_lock);
    u64 start = next_page;
    next_page += count * PAGE_SIZE;
    bool enough = next_page <= memory_top;
    unlock(&memory_lock);
    if (!enough)
        panic(FAILED_SUPPORT, "out of memory: %lu KiB are too few", memory_top / KIB(1));
    u64 *words = pointer(start);
    for (u64 i = 0; i < count * PAGE_SIZE / sizeof *words; i++)
        words[i] = 0;
    return words;
}

void *allocate_page(void) { return allocate_pages(1); }

void delay_microseconds(unsigned microseconds)
{
    unsigned ticks = (unsigned)((u64)microseconds * PIT_HERTZ / 1000000) + 1;

    lock(&clock_lock);
    u8 gate = inb(PORT_PIT_GATE) & (u8)~(PIT_GATE | PIT_SPEAKER);
    outb(PORT_PIT_GATE, gate);
    outb(PORT_PIT_COMMAND, PIT_CHANNEL_2_ONE_SHOT);
    outb(PORT_PIT_COUNT, (u8)ticks);
    outb(PORT_PIT_COUNT, (u8)(ticks >> 8));
    outb(PORT_PIT_GATE, gate | PIT_GATE);
    /* Bounded, for a machine without the timer. */
    for (int i = 0; i < 1000000 && !(inb(PORT_PIT_GATE) & PIT_OUTPUT); i++)
        pause();
    unlock(&clock_lock);
}

bool wait_for(const volatile u32 *value, u32 least, unsigned milliseconds)
{
    for (unsigned waited = 0; waited < milliseconds; waited++) {
        for (int i = 0; i < 1000; i++) {
            if (*value >= least)
                return true;
            pause();
        }
        delay_microseconds(1000);
    }
    return *value >= least;
}

void mask_legacy_interrupts(void)
{
    outb(PORT_PIC_1, 0xff);
    outb(PORT_PIC_2, 0xff);
}

/* The compiler calls these for structures and loops. */
void *memset(void *to, int value, size_t count);
void *memcpy(void *restrict to, const void *restrict from, size_t count);

void *memset(void *to, int value, size_t count)
{
    void *start = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    void *start = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

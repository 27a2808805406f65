/* The machine around the processors: its memory, its clock, its command line and its end. */
#pragma once

#include "types.h"

/* The value written to the debug exit port; QEMU's status is (value << 1) | 1. */
enum outcome {
    PASSED = 0,
    FAILED_CHECK = 1,       /* L2 saw something it should not have seen */
    FAILED_SUPPORT = 2,     /* the processor or the machine lacks what is needed */
    FAILED_ENTRY = 3,       /* the processor refused to run L2 */
    FAILED_EXIT = 4,        /* an exit that nobody expected */
    FAILED_EXCEPTION = 5,   /* an exception that nobody expected */
    FAILED_STARTUP = 6,     /* a processor did not come, or did not go on, in time */
    FAILED_OPTION = 7,      /* a word on the command line that means nothing */
};

/* Ends the machine: debug exit port, then Bochs' port, then a halt for ever. */
void NORETURN finish(enum outcome outcome);

/* Prints a line, whatever lock is held, and ends the machine. */
void NORETURN panic(enum outcome outcome, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Zeroed pages after the image, never freed.  Any processor, either level. */
void memory_start(u64 top);
void *allocate_pages(unsigned count);
void *allocate_page(void);

/* By the programmable interval timer, the one clock whose rate is the same everywhere. */
void delay_microseconds(unsigned microseconds);

/* Waits until *value >= least.  False when the time is over. */
bool wait_for(const volatile u32 *value, u32 least, unsigned milliseconds);
enum {
    PATIENCE = 20000, /* no working machine needs so long, however busy its host is */
    INIT_PATIENCE = 2000,
};

/* Masks the two 8259 interrupt controllers, which nobody here listens to. */
void mask_legacy_interrupts(void);

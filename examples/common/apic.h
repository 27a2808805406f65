/* The local APIC of the processor that calls, in xAPIC or x2APIC mode as the firmware left it. */
#pragma once

#include "types.h"

/* Registers, by their xAPIC offset. */
enum apic_register {
    APIC_ID = 0x20,
    APIC_EOI = 0xb0,
    APIC_SPURIOUS = 0xf0,
    APIC_COMMAND = 0x300,
    APIC_DESTINATION = 0x310,
};

/* Interrupt command register: delivery modes, status and level. */
enum {
    COMMAND_FIXED = 0 << 8,
    COMMAND_INIT = 5 << 8,
    COMMAND_STARTUP = 6 << 8,
    COMMAND_MODE = 7 << 8,
    COMMAND_PENDING = 1 << 12,
    COMMAND_ASSERT = 1 << 14,
    COMMAND_LEVEL = 1 << 15,
};

#define APIC_PAGE 0xfee00000UL

void apic_enable(void);
bool apic_is_mapped(void); /* xAPIC mode */
u32 apic_id(void);
void apic_send(u32 apic_id, u32 command);
void apic_end_of_interrupt(void);

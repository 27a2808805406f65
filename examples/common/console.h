/* Text to the first serial port. */
#pragma once

#include "types.h"

void console_start(void);
void console_drain(void); /* waits until the last character has left */

/* Understands %c %s %u %d %x %lu %lx %% with a width, `0` and `-`. */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void print_arguments(const char *format, __builtin_va_list arguments);

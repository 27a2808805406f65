#include "console.h"

#include "cpu.h"

/* 16550: registers from the base port. */
enum { COM1 = 0x3f8, DATA = 0, INTERRUPTS = 1, FIFO = 2, LINE = 3, MODEM = 4, LINE_STATUS = 5 };
enum { HOLDING_EMPTY = 0x20, ALL_SENT = 0x40, DIVISOR_LATCH = 0x80, EIGHT_BITS = 3 };

static struct lock console_lock;

void console_start(void)
{
    outb(COM1 + INTERRUPTS, 0);
    outb(COM1 + LINE, DIVISOR_LATCH);
    outb(COM1 + DATA, 1); /* 115200 baud */
    outb(COM1 + INTERRUPTS, 0);
    outb(COM1 + LINE, EIGHT_BITS);
    outb(COM1 + FIFO, 7);
    outb(COM1 + MODEM, 3);
}

/* Bounded, so that a machine without the port still reaches its end. */
static void wait_for_line(u8 status)
{
    for (int i = 0; i < 100000 && !(inb(COM1 + LINE_STATUS) & status); i++)
        pause();
}

void console_drain(void) { wait_for_line(ALL_SENT); }

static void put(char c)
{
    wait_for_line(HOLDING_EMPTY);
    outb(COM1 + DATA, (u8)c);
}

struct conversion {
    unsigned width;
    bool left, zeros, is_long;
};

static void put_padded(const char *text, unsigned length, const struct conversion *c)
{
    unsigned padding = c->width > length ? c->width - length : 0;
    for (unsigned i = 0; !c->left && i < padding; i++)
        put(c->zeros ? '0' : ' ');
    for (unsigned i = 0; i < length; i++)
        put(text[i]);
    for (unsigned i = 0; c->left && i < padding; i++)
        put(' ');
}

static void put_number(u64 value, unsigned base, bool negative, const struct conversion *c)
{
    char digits[24];
    unsigned at = sizeof digits;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    if (negative)
        digits[--at] = '-';
    put_padded(digits + at, sizeof digits - at, c);
}

static const char *read_conversion(const char *format, struct conversion *c)
{
    for (; *format == '-' || *format == '0'; format++) {
        c->left |= *format == '-';
        c->zeros |= *format == '0';
    }
    for (; *format >= '0' && *format <= '9'; format++)
        c->width = c->width * 10 + (unsigned)(*format - '0');
    for (; *format == 'l'; format++)
        c->is_long = true;
    return format;
}

static unsigned length_of(const char *text)
{
    unsigned length = 0;
    while (text[length])
        length++;
    return length;
}

void print_arguments(const char *format, __builtin_va_list arguments)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        struct conversion c = {0};
        format = read_conversion(format + 1, &c);
        switch (*format) {
        case 'u':
        case 'x': {
            u64 value = c.is_long ? __builtin_va_arg(arguments, u64)
                                  : __builtin_va_arg(arguments, u32);
            put_number(value, *format == 'x' ? 16 : 10, false, &c);
            break;
        }
        case 'd': {
            int value = __builtin_va_arg(arguments, int);
            put_number(value < 0 ? -(u64)value : (u64)value, 10, value < 0, &c);
            break;
        }
        case 's': {
            const char *text = __builtin_va_arg(arguments, const char *);
            put_padded(text, length_of(text), &c);
            break;
        }
        case 'c':
            put((char)__builtin_va_arg(arguments, int));
            break;
        case '%':
            put('%');
            break;
        }
    }
}

void print(const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    lock(&console_lock);
    print_arguments(format, arguments);
    unlock(&console_lock);
    __builtin_va_end(arguments);
}

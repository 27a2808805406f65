/* Integers by their width, and the few macros that every file uses. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PACKED __attribute__((packed))
#define ALIGNED(n) __attribute__((aligned(n)))
#define NORETURN __attribute__((noreturn))

#define KIB(n) ((u64)(n) << 10)
#define MIB(n) ((u64)(n) << 20)
#define GIB(n) ((u64)(n) << 30)
#define PAGE_SIZE KIB(4)
#define BIT(n) (1ULL << (n))

#define ROUND_UP(value, unit) (((value) + (unit) - 1) / (unit) * (unit))

/* Memory is mapped one to one: a physical address is a pointer and the reverse. */
static inline u64 physical(const volatile void *pointer) { return (u64)(uintptr_t)pointer; }
static inline void *pointer(u64 address)
{
    asm("" : "+r"(address)); /* the compiler shall not think that low addresses are null */
    return (void *)(uintptr_t)address;
}

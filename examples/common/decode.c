#include "decode.h"

enum opcode {
    MOV_STORE = 0x89,
    MOV_LOAD = 0x8b,
    MOV_LOAD_ABSOLUTE = 0xa1,
    MOV_STORE_ABSOLUTE = 0xa3,
    MOV_STORE_IMMEDIATE = 0xc7,
};
enum { ADDRESS_SIZE = 0x67, REX = 0x40, REX_R = 4, REX_W = 8 };

/* Registers by their number in an instruction. */
static u64 *find_register(struct registers *r, unsigned number)
{
    u64 *const by_number[16] = {
        &r->rax, &r->rcx, &r->rdx, &r->rbx, NULL,    &r->rbp, &r->rsi, &r->rdi,
        &r->r8,  &r->r9,  &r->r10, &r->r11, &r->r12, &r->r13, &r->r14, &r->r15,
    };
    return by_number[number];
}

/* Bytes of ModR/M, SIB and displacement; 0 if the operand is no memory. */
static unsigned length_of_operand(const u8 *code)
{
    unsigned mode = code[0] >> 6, memory = code[0] & 7;
    unsigned length = 1;

    if (mode == 3)
        return 0;
    if (memory == 4) {
        length++;
        if (mode == 0 && (code[1] & 7) == 5)
            length += 4;
    }
    if (mode == 0 && memory == 5)
        length += 4;
    return length + (mode == 1 ? 1 : mode == 2 ? 4 : 0);
}

static u32 read_immediate(const u8 *code)
{
    return (u32)code[0] | (u32)code[1] << 8 | (u32)code[2] << 16 | (u32)code[3] << 24;
}

bool decode_memory_access(const u8 *code, struct registers *registers,
                          struct memory_access *access)
{
    const u8 *at = code;
    bool has_short_address = *at == ADDRESS_SIZE;
    at += has_short_address;
    u8 rex = (*at & 0xf0) == REX ? *at++ : 0;
    u8 opcode = *at++;
    if (rex & REX_W)
        return false;

    unsigned operand = length_of_operand(at);
    unsigned number = (at[0] >> 3 & 7) | (rex & REX_R ? 8 : 0);
    *access = (struct memory_access){.is_store = opcode != MOV_LOAD && opcode != MOV_LOAD_ABSOLUTE};
    switch (opcode) {
    case MOV_STORE_IMMEDIATE:
        access->has_immediate = true;
        access->immediate = read_immediate(at + operand);
        access->length = (u8)(at - code + operand + 4);
        return operand && number % 8 == 0;
    case MOV_STORE:
    case MOV_LOAD:
        access->reg = find_register(registers, number);
        access->length = (u8)(at - code + operand);
        return operand && access->reg;
    case MOV_STORE_ABSOLUTE:
    case MOV_LOAD_ABSOLUTE:
        access->reg = &registers->rax;
        access->length = (u8)(at - code + (has_short_address ? 4 : 8));
        return true;
    }
    return false;
}

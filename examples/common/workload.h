/* What runs in L2 on every processor. */
#pragma once

#include "hypervisor.h"

/* Uses everything that L1 offers, then computes; what is wrong goes to cpu->failure. */
void run_workload(struct cpu *cpu);

/* How often the processors counted together. */
extern volatile u32 shared_count;
#define COUNTS_PER_CPU 1000

/* Starting the other processors. */
#pragma once

#include "hypervisor.h"

/* Fills machine.cpus; the processor that calls becomes cpu 0. */
void find_cpus(void);

/* Gives the calling processor its descriptor tables, its GS base and its local APIC. */
void start_this_cpu(struct cpu *cpu);

/* INIT-SIPI-SIPI to each of the others, one by one.  Each calls `entry` with its cpu. */
void start_other_cpus(void (*entry)(struct cpu *));

/* For L1: the same for one processor, which goes on in `run_from_startup`. */
void start_cpu_in_host(struct cpu *cpu);

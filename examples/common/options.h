/* The command line: words like `pages=4k`. */
#pragma once

#include "hypervisor.h"

/* Panics at a word that it does not know; the first word may be the image's name. */
struct options parse_options(const char *command_line);

#include "options.h"

#include "console.h"
#include "machine.h"

static bool starts_with(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

static bool is_end(char c) { return c == 0 || c == ' '; }

static bool is_word(const char *text, const char *word)
{
    unsigned length = 0;
    while (word[length])
        length++;
    return starts_with(text, word) && is_end(text[length]);
}

static bool parse_word(const char *word, struct options *options)
{
    if (is_word(word, "pages=4k"))
        options->page_size = KIB(4);
    else if (is_word(word, "pages=2m"))
        options->page_size = MIB(2);
    else if (is_word(word, "pages=1g"))
        options->page_size = GIB(1);
    else if (is_word(word, "apic=trap"))
        options->trap_apic = true;
    else if (is_word(word, "apic=x2"))
        options->use_x2apic = true;
    else if (is_word(word, catch_init_option))
        options->catch_init = true;
    else if (is_word(word, "verbose"))
        options->verbose = true;
    else
        return false;
    return true;
}

struct options parse_options(const char *command_line)
{
    struct options options = {.page_size = MIB(2)};
    bool is_first = true;

    for (const char *at = command_line; *at;) {
        if (*at == ' ') {
            at++;
            continue;
        }
        if (!parse_word(at, &options) && !is_first)
            panic(FAILED_OPTION,
                  "unknown option at \"%s\"; known are: pages=4k|2m|1g apic=trap|x2 %s verbose",
                  at, catch_init_option);
        is_first = false;
        while (!is_end(*at))
            at++;
    }
    if (options.trap_apic && options.use_x2apic)
        panic(FAILED_OPTION, "apic=trap and apic=x2 exclude each other: one needs the page");
    if (options.trap_apic && options.catch_init)
        panic(FAILED_OPTION, "apic=trap and %s exclude each other: both are for the same INIT",
              catch_init_option);
    return options;
}

// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * One global per shared struct: a struct that is only used through a ring buffer is missing from
 * its own program's BTF. Never loaded; tests/kernel/test_abi.py reads its BTF.
 */
#include <linux/types.h>

#include "mis.h"

struct mis_key mis_key;
struct mis_port mis_port;
struct mis_entry mis_entry;
struct mis_settings mis_settings;
struct mis_counter mis_counter;
struct mis_net_event mis_net_event;

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
struct mis_place mis_place;
struct mis_rule mis_rule;
struct mis_agent mis_agent;
struct mis_state mis_state;
struct mis_plane mis_plane;
struct mis_lsm_event mis_lsm_event;
enum mis_act mis_act;

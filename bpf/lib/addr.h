/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* addr.h - questions about struct addr, the one form for both IP versions. */
#ifndef EBPFPROXY_ADDR_H
#define EBPFPROXY_ADDR_H

#include "platform.h"

static __always_inline void addr_set_v4(struct addr *addr, __be32 ip)
{
	addr->w[0] = 0;
	addr->w[1] = 0;
	addr->w[2] = bpf_htonl(0xffff);
	addr->w[3] = ip;
}

static __always_inline bool addr_is_v4(const struct addr *addr)
{
	return !(addr->w[0] | addr->w[1]) && addr->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return !((a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]) |
		 (a->w[3] ^ b->w[3]));
}

/* 0.0.0.0 or :: */
static __always_inline bool addr_is_any(const struct addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[3]) &&
	       (!addr->w[2] || addr->w[2] == bpf_htonl(0xffff));
}

/* 127.0.0.0/8 (RFC 1122 3.2.1.3) */
static __always_inline bool addr_is_loopback4(const struct addr *addr)
{
	return addr_is_v4(addr) && bpf_ntohl(addr->w[3]) >> 24 == 127;
}

/* ::1 (RFC 4291 2.5.3) */
static __always_inline bool addr_is_loopback6(const struct addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[2]) && addr->w[3] == bpf_htonl(1);
}

#endif /* EBPFPROXY_ADDR_H */

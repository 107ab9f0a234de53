/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sum.h - the Internet checksum after a change, in plain arithmetic. A sum is 64 bits wide: some hundred 32-bit words
 * fit before it is folded.
 */
#ifndef EBPFPROXY_SUM_H
#define EBPFPROXY_SUM_H

#include "addr.h"

/* One's complement sum (RFC 1071) with `from` taken out and `to` put in (RFC 1624, equation 3). */
static __always_inline __u64 sum_exchange(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __u64 sum_exchange_addr(__u64 sum, const struct addr *from,
					       const struct addr *to)
{
	sum = sum_exchange(sum, from->w[0], to->w[0]);
	sum = sum_exchange(sum, from->w[1], to->w[1]);
	sum = sum_exchange(sum, from->w[2], to->w[2]);
	return sum_exchange(sum, from->w[3], to->w[3]);
}

static __always_inline __u16 sum_finish(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

#endif /* EBPFPROXY_SUM_H */

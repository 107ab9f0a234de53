/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* verdict.h - counts why the dataplane did what it did. Every exit of a program passes count(). */
#ifndef EBPFPROXY_VERDICT_H
#define EBPFPROXY_VERDICT_H

#include "maps.h"

/* Counts a packet, or a call of 0 bytes. */
static __always_inline void count(enum verdict verdict, __u32 bytes)
{
	__u32 index = verdict;
	struct verdict_count *counter = map_lookup(verdicts, &index);

	if (counter) {
		counter->packets += 1;
		counter->octets += bytes;
	}
}

static __always_inline bool is_translated(enum verdict verdict)
{
	return verdict == VERDICT_NEW || verdict == VERDICT_ESTABLISHED || verdict == VERDICT_REPLY;
}

/* Refused with an answer, as nobody listens; the other refusals are silent. */
static __always_inline bool is_rejection(enum verdict verdict)
{
	return verdict == VERDICT_REJECT_EMPTY || verdict == VERDICT_REJECT_UNUSED;
}

/* Can't be sent on: the sender is told, as a router tells it. */
static __always_inline bool is_stuck(enum verdict verdict)
{
	return verdict == VERDICT_HOPS || verdict == VERDICT_TOO_BIG;
}

static __always_inline bool is_refusal(enum verdict verdict)
{
	switch (verdict) {
	case VERDICT_REJECT_EMPTY:
	case VERDICT_REJECT_UNUSED:
	case VERDICT_REJECT_LIMITED:
	case VERDICT_DROP_EMPTY:
	case VERDICT_DROP_SOURCE:
	case VERDICT_MAP_FULL:
	case VERDICT_SNAT_FULL:
	case VERDICT_NO_ROUTE:
	case VERDICT_HOPS:
	case VERDICT_TOO_BIG:
	case VERDICT_REWRITE_FAILED:
	case VERDICT_BIND_DENIED:
		return true;
	default:
		return false;
	}
}

#endif /* EBPFPROXY_VERDICT_H */

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fragments.h - fragments follow their first one, which alone shows the ports. Map fragments remembers them.
 *
 * The kernel's reassembly comes behind us, so each fragment is translated by itself: the later ones get other
 * addresses, and have no checksum but IPv4's. Offsets and lengths are not looked at: fragments that overlap are for
 * the receiver to refuse (RFC 5722).
 */
#ifndef EBPFPROXY_FRAGMENTS_H
#define EBPFPROXY_FRAGMENTS_H

#include "packet.h"

/* So long the receiver waits for the rest of a packet (net.ipv4.ipfrag_time); the identification may be another's then. */
#define FRAGMENT_LIFE_NS (30 * NSEC_PER_SEC)

static __always_inline void make_fragment_key(const struct packet *packet, struct fragment_key *key)
{
	key->src = packet->flow.src;
	key->dst = packet->flow.dst;
	key->id = packet->fragment_id;
	key->proto = packet->version == IP4_VERSION ? packet->next : 0;
	key->pad[0] = 0;
	key->pad[1] = 0;
	key->pad[2] = 0;
}

/* Remembers the ports of a first fragment. The oldest make room. */
static __always_inline void note_first(const struct packet *packet, __u64 now)
{
	struct fragment first = {
		.sport = packet->flow.sport,
		.dport = packet->flow.dport,
		.proto = packet->flow.proto,
		.seen_ns = now,
	};
	struct fragment_key key;

	make_fragment_key(packet, &key);
	map_update(fragments, &key, &first, BPF_ANY);
}

/* Gives a later fragment the ports of its first. */
static __always_inline enum verdict follow_first(struct packet *packet)
{
	struct fragment_key key;
	struct fragment *first;

	make_fragment_key(packet, &key);
	first = map_lookup(fragments, &key);
	if (!first || since(first->seen_ns, now_ns()) >= (__s64)FRAGMENT_LIFE_NS)
		return VERDICT_FRAGMENT;
	packet->flow.sport = first->sport;
	packet->flow.dport = first->dport;
	packet->flow.proto = first->proto;
	packet->flow.pad[0] = 0;
	packet->flow.pad[1] = 0;
	packet->events = 0;
	return VERDICT_CONTINUE;
}

#endif /* EBPFPROXY_FRAGMENTS_H */

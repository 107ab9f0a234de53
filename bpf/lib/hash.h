/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * hash.h - the one hash for choices that all nodes must make alike: sh, dh and maglev.
 *
 * MurmurHash3 x86_32 (Austin Appleby, public domain) with seed 0 over the bytes as they stand in memory:
 * addresses and ports are in network byte order there, so the node's own byte order has no say.
 */
#ifndef EBPFPROXY_HASH_H
#define EBPFPROXY_HASH_H

#include "byteorder.h"

static __always_inline __u32 hash_mix(__u32 hash, __u32 word)
{
	word *= 0xcc9e2d51;
	word = (word << 15 | word >> 17) * 0x1b873593;
	hash ^= word;
	return (hash << 13 | hash >> 19) * 5 + 0xe6546b64;
}

static __always_inline __u32 hash_finish(__u32 hash, __u32 size)
{
	hash ^= size;
	hash = (hash ^ hash >> 16) * 0x85ebca6b;
	hash = (hash ^ hash >> 13) * 0xc2b2ae35;
	return hash ^ hash >> 16;
}

static __always_inline __u32 hash_mix_addr(__u32 hash, const struct addr *addr)
{
	hash = hash_mix(hash, le32(addr->w[0]));
	hash = hash_mix(hash, le32(addr->w[1]));
	hash = hash_mix(hash, le32(addr->w[2]));
	return hash_mix(hash, le32(addr->w[3]));
}

/* Hash of the 16 bytes of an address. */
static __always_inline __u32 hash_addr(const struct addr *addr)
{
	return hash_finish(hash_mix_addr(0, addr), sizeof(*addr));
}

/* Hash of 40 bytes: client, VIP, client's port, VIP's port, protocol, three zeros: struct flow_key, FORWARD. */
static __always_inline __u32 hash_flow(const struct flow_key *flow)
{
	__u32 hash = hash_mix_addr(hash_mix_addr(0, &flow->src), &flow->dst);

	hash = hash_mix(hash, le16(flow->sport) | (__u32)le16(flow->dport) << 16);
	hash = hash_mix(hash, flow->proto);
	return hash_finish(hash, sizeof(*flow));
}

#endif /* EBPFPROXY_HASH_H */

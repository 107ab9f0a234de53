/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * rewrite.h - address translation of a packet, checksums included. Beside parse.h the only code that
 * knows two IP versions.
 *
 * The kernel's helpers are used for every step, as they know the offload state: with CHECKSUM_PARTIAL
 * the field holds the pseudo header's sum only, with CHECKSUM_COMPLETE skb->csum must follow.
 */
#ifndef EBPFPROXY_REWRITE_H
#define EBPFPROXY_REWRITE_H

#include "byteorder.h"
#include "crc32c.h"
#include "parse.h"

/* Offset and flags of the L4 checksum. UDP's 0 means "none" and stays; a computed 0 becomes 0xffff (RFC 768). */
static __always_inline __u32 l4_checksum(const struct packet *packet, __u64 *flags)
{
	*flags = 0;
	if (packet->flow.proto == IPPROTO_TCP)
		return packet->l4 + offsetof(struct tcphdr, check);
	*flags = BPF_F_MARK_MANGLED_0;
	return packet->l4 + offsetof(struct udphdr, check);
}

/* Whether the packet has a checksum of L4 that covers the addresses. */
static __always_inline bool sums_addresses(const struct packet *packet)
{
	return packet->flow.proto != IPPROTO_SCTP && packet->fragment != FRAGMENT_LATER;
}

static __always_inline long rewrite_ip4(struct __sk_buff *skb, const struct packet *packet,
					bool is_source, const struct addr *old,
					const struct addr *new)
{
	__u32 at = packet->l3 +
		   (is_source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
	__be32 from = old->w[3], to = new->w[3];
	__u64 flags;
	__u32 check = l4_checksum(packet, &flags);
	long err = 0;

	if (sums_addresses(packet))
		err = bpf_l4_csum_replace(skb, check, from, to,
					  flags | BPF_F_PSEUDO_HDR | sizeof(to));
	return err ?: bpf_l3_csum_replace(skb, packet->l3 + offsetof(struct iphdr, check), from, to, sizeof(to))
		   ?: bpf_skb_store_bytes(skb, at, &to, sizeof(to), 0);
}

static __always_inline long rewrite_ip6(struct __sk_buff *skb, const struct packet *packet,
					bool is_source, struct addr *old, struct addr *new)
{
	__u32 at = packet->l3 +
		   (is_source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
	__u64 flags;
	__u32 check = l4_checksum(packet, &flags);
	long err = 0;

	if (sums_addresses(packet)) {
		__s64 diff = bpf_csum_diff(old->w, sizeof(*old), new->w, sizeof(*new), 0);

		err = bpf_l4_csum_replace(skb, check, 0, diff, flags | BPF_F_PSEUDO_HDR);
	}
	/* IPv6 has no header checksum that would balance the new address in skb->csum (CHECKSUM_COMPLETE):
	 * RECOMPUTE_CSUM adds what the line above took away. (6.16 has BPF_F_IPV6 for the same.)
	 */
	return err
		       ?: bpf_skb_store_bytes(
				  skb, at, new, sizeof(*new),
				  packet->flow.proto == IPPROTO_SCTP ? 0 : BPF_F_RECOMPUTE_CSUM);
}

/* Corrects SCTP's checksum after a change of ports. It comes last, as it is 4,000 steps for the verifier on every
 * path that leads here.
 */
static __always_inline bool finish_sctp(struct __sk_buff *skb, const struct scratch *room)
{
	const struct packet *packet = &room->packet;
	__u32 at = packet->l4 + offsetof(struct sctp_header, checksum);
	__le32 checksum;

	if (bpf_skb_load_bytes(skb, at, &checksum, sizeof(checksum)))
		return false;
	/* 0: not computed yet, the device will (CHECKSUM_PARTIAL). */
	if (!checksum)
		return true;
	checksum ^= le32(crc32c_delta(room->sctp_change, packet->l4_size));
	return !bpf_skb_store_bytes(skb, at, &checksum, sizeof(checksum), 0);
}

/* Both ports, as they stand in memory: TCP, UDP and SCTP all begin with source and destination. */
struct ports {
	__be16 source;
	__be16 dest;
};

static __always_inline long rewrite_ports(struct __sk_buff *skb, struct scratch *room,
					  const struct ports *new)
{
	const struct packet *packet = &room->packet;
	struct ports old = {packet->flow.sport, packet->flow.dport};
	__u64 flags;
	__u32 check = l4_checksum(packet, &flags), from, to;
	long err = 0;

	__builtin_memcpy(&from, &old, sizeof(from));
	__builtin_memcpy(&to, new, sizeof(to));
	if (from == to || packet->fragment == FRAGMENT_LATER)
		return 0;
	/* SCTP's correction depends on how long the whole packet is, which its first fragment does not say. */
	if (packet->flow.proto == IPPROTO_SCTP && packet->fragment)
		return -1;
	if (packet->flow.proto == IPPROTO_SCTP)
		room->sctp_change = le32(from ^ to);
	else
		err = bpf_l4_csum_replace(skb, check, from, to, flags | sizeof(to));
	return err ?: bpf_skb_store_bytes(skb, packet->l4, &to, sizeof(to), 0);
}

static __always_inline long rewrite_addr(struct __sk_buff *skb, const struct packet *packet,
					 bool is_source, struct addr *old, struct addr *new)
{
	if (addr_equal(old, new))
		return 0;
	return packet->version == IP4_VERSION ? rewrite_ip4(skb, packet, is_source, old, new)
					      : rewrite_ip6(skb, packet, is_source, old, new);
}

/* Gives the packet what the flow says; finish_sctp() has to follow. False: the kernel refused, the packet may be half changed. */
static __always_inline bool rewrite(struct __sk_buff *skb, struct scratch *room, struct flow *flow)
{
	struct packet *packet = &room->packet;
	struct ports ports = {flow->sport, flow->dport};

	if (addr_is_v4(&flow->dst) != (packet->version == IP4_VERSION))
		return false;
	return !(rewrite_addr(skb, packet, false, &packet->flow.dst, &flow->dst)
			 ?: rewrite_addr(skb, packet, true, &packet->flow.src, &flow->src)
			 ?: rewrite_ports(skb, room, &ports));
}

/* Writes TTL or hop limit. */
static __always_inline bool set_hops(struct __sk_buff *skb, const struct packet *packet, __u8 hops)
{
	if (packet->version == IP6_VERSION)
		return !bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, hop_limit),
					    &hops, sizeof(hops), BPF_F_RECOMPUTE_CSUM);
	/* TTL and protocol are one word of the checksum. */
	return !bpf_l3_csum_replace(skb, packet->l3 + offsetof(struct iphdr, check),
				    bpf_htons(packet->hops << 8), bpf_htons(hops << 8),
				    sizeof(__be16)) &&
	       !bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct iphdr, ttl), &hops,
				    sizeof(hops), 0);
}

/* One router less, as the kernel's own forwarding has it (RFC 1812 5.3.1, RFC 8200 3). */
static __always_inline bool take_hop(struct __sk_buff *skb, const struct packet *packet)
{
	return set_hops(skb, packet, packet->hops - 1);
}

#endif /* EBPFPROXY_REWRITE_H */

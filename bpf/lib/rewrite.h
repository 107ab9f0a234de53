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

	if (packet->flow.proto != IPPROTO_SCTP)
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

	if (packet->flow.proto != IPPROTO_SCTP) {
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

static __always_inline long rewrite_sctp_checksum(struct __sk_buff *skb,
						  const struct packet *packet, bool is_source,
						  __be16 old, __be16 new)
{
	__u32 at = packet->l4 + offsetof(struct sctp_header, checksum);
	__u32 change = le16(old ^ new);
	__le32 checksum;
	long err = bpf_skb_load_bytes(skb, at, &checksum, sizeof(checksum));

	/* 0: not computed yet, the device will (CHECKSUM_PARTIAL). */
	if (err || !checksum)
		return err;
	/* The source port is the first two bytes, the destination port the next. */
	if (!is_source)
		change <<= 16;
	checksum ^= le32(crc32c_delta(change, packet->l4_size));
	return bpf_skb_store_bytes(skb, at, &checksum, sizeof(checksum), 0);
}

static __always_inline long rewrite_port(struct __sk_buff *skb, const struct packet *packet,
					 bool is_source, __be16 old, __be16 new)
{
	/* Source port, destination port: TCP, UDP and SCTP all begin so. */
	__u32 at = packet->l4 + (is_source ? 0 : sizeof(old));
	__u64 flags;
	__u32 check = l4_checksum(packet, &flags);
	long err;

	if (old == new)
		return 0;
	if (packet->flow.proto == IPPROTO_SCTP)
		err = rewrite_sctp_checksum(skb, packet, is_source, old, new);
	else
		err = bpf_l4_csum_replace(skb, check, old, new, flags | sizeof(new));
	return err ?: bpf_skb_store_bytes(skb, at, &new, sizeof(new), 0);
}

/* Gives the packet a new source or destination. False: the kernel refused, the packet may be half changed. */
static __always_inline bool rewrite(struct __sk_buff *skb, struct packet *packet, bool is_source,
				    struct addr *addr, __be16 port)
{
	struct addr *old = is_source ? &packet->flow.src : &packet->flow.dst;
	long err;

	if (addr_is_v4(addr) != (packet->version == IP4_VERSION))
		return false;
	if (packet->version == IP4_VERSION)
		err = rewrite_ip4(skb, packet, is_source, old, addr);
	else
		err = rewrite_ip6(skb, packet, is_source, old, addr);
	return !err && !rewrite_port(skb, packet, is_source,
				     is_source ? packet->flow.sport : packet->flow.dport, port);
}

#endif /* EBPFPROXY_REWRITE_H */

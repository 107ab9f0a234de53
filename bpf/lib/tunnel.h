/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * tunnel.h - puts an skb into an IP packet and takes it out again, offloads included.
 *
 * The kernel is told that it is an encapsulation, so that a batch (GSO) is cut into parts that each have both
 * headers, and unfinished checksums are finished inside.
 */
#ifndef EBPFPROXY_TUNNEL_H
#define EBPFPROXY_TUNNEL_H

#include "ipip.h"
#include "parse.h"

/* Whether the kernel makes the parts of a batch smaller by what the header adds. Those of UDP are datagrams. */
static __always_inline bool parts_shrink(struct __sk_buff *skb, const struct packet *packet)
{
	return skb->gso_size && packet->flow.proto == IPPROTO_TCP;
}

/* What the kernel may have left in the wrong place.
 *
 * bpf_skb_adjust_room() works behind the MAC header. A packet that generic XDP had to copy shows none to tc, though it
 * has one (its mac_len is lost; seen with Linux 6.18): then these bytes of IP stay in front. They are put where they
 * belong; on a device without MAC headers they are there already.
 */
struct stray {
	__u8 bytes[ETH_HLEN];
};

/* Reads the bytes that an IP packet at `from` begins with. */
static __always_inline bool read_stray(struct __sk_buff *skb, __u32 from, struct stray *stray)
{
	return !bpf_skb_load_bytes(skb, from, stray, sizeof(*stray));
}

/* Puts them where that IP packet is now. With a MAC header in sight they are there. */
static __always_inline bool put_stray(struct __sk_buff *skb, __u32 to, bool has_mac,
				      const struct stray *stray)
{
	return has_mac ||
	       !bpf_skb_store_bytes(skb, to, stray, sizeof(*stray), BPF_F_RECOMPUTE_CSUM);
}

/* False: the kernel refused, the packet is as it was or half done. */
static __always_inline bool wrap(struct __sk_buff *skb, struct packet *packet,
				 const struct flow *flow)
{
	bool is_v4 = packet->version == IP4_VERSION;
	__u64 flags = is_v4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
	union tunnel_header outer;
	struct stray stray;
	__be32 first;

	if (!read_stray(skb, packet->l3, &stray))
		return false;
	__builtin_memcpy(&first, stray.bytes, sizeof(first));
	if (!parts_shrink(skb, packet))
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	if (is_v4) {
		make_tunnel4(&outer.ip4, packet, flow, bpf_ntohl(first) >> 16);
		return !bpf_skb_adjust_room(skb, sizeof(outer.ip4), BPF_ADJ_ROOM_MAC, flags) &&
		       put_stray(skb, packet->l3 + sizeof(outer.ip4), packet->l3, &stray) &&
		       !bpf_skb_store_bytes(skb, packet->l3, &outer.ip4, sizeof(outer.ip4),
					    BPF_F_RECOMPUTE_CSUM);
	}
	make_tunnel6(&outer.ip6, packet, flow, ip6_class(first));
	return !bpf_skb_adjust_room(skb, sizeof(outer.ip6), BPF_ADJ_ROOM_MAC, flags) &&
	       put_stray(skb, packet->l3 + sizeof(outer.ip6), packet->l3, &stray) &&
	       !bpf_skb_store_bytes(skb, packet->l3, &outer.ip6, sizeof(outer.ip6),
				    BPF_F_RECOMPUTE_CSUM);
}

/* Takes `size` bytes of headers away that stand in front of `packet`. False: the kernel refused. */
static __always_inline bool unwrap(struct __sk_buff *skb, struct packet *packet, __u32 size)
{
	struct stray stray;

	if (!read_stray(skb, packet->l3, &stray))
		return false;
	/* Parts of a batch stay what they were before they came in one. */
	if (bpf_skb_adjust_room(skb, -(__s32)size, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return false;
	packet->l3 -= size;
	packet->l4 -= size;
	return put_stray(skb, packet->l3, packet->l3, &stray);
}

#endif /* EBPFPROXY_TUNNEL_H */

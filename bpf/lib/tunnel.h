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

/* False: the kernel refused, the packet is as it was or half done. */
static __always_inline bool wrap(struct __sk_buff *skb, struct packet *packet,
				 const struct flow *flow)
{
	bool is_v4 = packet->version == IP4_VERSION;
	__u64 flags = is_v4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
	union tunnel_header outer;
	__be32 first;

	if (bpf_skb_load_bytes(skb, packet->l3, &first, sizeof(first)))
		return false;
	if (!parts_shrink(skb, packet))
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	if (is_v4) {
		make_tunnel4(&outer.ip4, packet, flow, bpf_ntohl(first) >> 16);
		return !bpf_skb_adjust_room(skb, sizeof(outer.ip4), BPF_ADJ_ROOM_MAC, flags) &&
		       !bpf_skb_store_bytes(skb, packet->l3, &outer.ip4, sizeof(outer.ip4),
					    BPF_F_RECOMPUTE_CSUM);
	}
	make_tunnel6(&outer.ip6, packet, flow, ip6_class(first));
	return !bpf_skb_adjust_room(skb, sizeof(outer.ip6), BPF_ADJ_ROOM_MAC, flags) &&
	       !bpf_skb_store_bytes(skb, packet->l3, &outer.ip6, sizeof(outer.ip6),
				    BPF_F_RECOMPUTE_CSUM);
}

/* Takes `size` bytes of outer header away; `packet` is the inner one. False: the kernel refused. */
static __always_inline bool unwrap(struct __sk_buff *skb, struct packet *packet, __u32 size)
{
	/* Parts of a batch stay what they were before they came in one. */
	if (bpf_skb_adjust_room(skb, -(__s32)size, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return false;
	packet->l3 -= size;
	packet->l4 -= size;
	return true;
}

#endif /* EBPFPROXY_TUNNEL_H */

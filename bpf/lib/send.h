/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * send.h - sends a translated skb to its next hop, past the kernel's routing.
 *
 * That is needed where the source became an address of this node: the kernel takes no packet in that claims to come
 * from itself (RFC 1122 3.3.8, "martian").
 */
#ifndef EBPFPROXY_SEND_H
#define EBPFPROXY_SEND_H

#include "hop.h"
#include "rewrite.h"

/* Gives a packet without Ethernet, from a tunnel, room for such a header. */
static __always_inline long add_ethernet(struct __sk_buff *skb, struct packet *packet)
{
	__be16 type = bpf_htons(packet->version == IP4_VERSION ? ETHERTYPE_IP4 : ETHERTYPE_IP6);
	long err = bpf_skb_change_head(skb, sizeof(struct ethhdr), 0);

	packet->l3 += sizeof(struct ethhdr);
	packet->l4 += sizeof(struct ethhdr);
	return err
		       ?: bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type,
					      sizeof(type), 0);
}

/* The action that sends the packet on. TC_ACT_SHOT: the kernel refused. */
static __always_inline int send_on(struct __sk_buff *skb, struct packet *packet,
				   const struct next_hop *hop, bool through_kernel)
{
	if (!packet->l3 && add_ethernet(skb, packet))
		return TC_ACT_SHOT;
	if (hop->kind == HOP_NEIGHBOUR || through_kernel)
		return bpf_redirect_neigh(hop->device, NULL, 0, 0);
	if (bpf_skb_store_bytes(skb, 0, hop->to_mac, 2 * ETH_ALEN, 0))
		return TC_ACT_SHOT;
	return bpf_redirect(hop->device, 0);
}

#endif /* EBPFPROXY_SEND_H */

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * tunnel_error.h - an ICMP error that a router sends to this node because a packet of FLOW_DSR is too big for it.
 *
 * The client can do something about it, this node can't. What the error quotes is the client's packet behind our outer
 * header: the error is cut down to that, and answered as if it had been too big here (reject.h). RFC 2003 4.1.1, RFC
 * 2473 8.1. Other errors say nothing that a client could use.
 */
#ifndef EBPFPROXY_TUNNEL_ERROR_H
#define EBPFPROXY_TUNNEL_ERROR_H

#include "icmp.h"
#include "tunnel.h"

/* RFC 8200 5: no sender makes packets smaller than that. A path where our header does not fit beside can't have dsr. */
#define IP6_MTU_MIN 1280

/* Whether the error that read_error() has read is about a packet that this node encapsulated. */
static __always_inline bool is_tunnel_error(const struct packet *packet, __u32 kinds)
{
	return kinds & VIP_SNAT && packet->flow.proto == tunnel_proto(packet);
}

/* The MTU that the error tells; 0: it is another error, or tells none (before RFC 1191). */
static __always_inline __u32 told_mtu(struct __sk_buff *skb, const struct packet *packet)
{
	struct icmp_header *icmp = header(skb, packet->l4, sizeof(*icmp));

	if (!icmp)
		return 0;
	if (packet->version == IP6_VERSION)
		return icmp->type == ICMP6_TOO_BIG ? bpf_ntohl(icmp->rest) : 0;
	return icmp->type == ICMP4_UNREACHABLE && icmp->code == ICMP4_FRAGMENT_NEEDED
		       ? bpf_ntohl(icmp->rest) & 0xffff
		       : 0;
}

/* Makes the packet that the error quotes out of the error. VERDICT_TOO_BIG: done, and room->mtu is the client's. */
static __always_inline enum verdict open_tunnel_error(struct __sk_buff *skb, struct scratch *room)
{
	struct packet *packet = &room->packet;
	__u32 size = tunnel_size(packet->version), l3 = packet->l3;
	__u32 mtu = told_mtu(skb, packet);
	enum verdict verdict;
	struct flow *flow;
	bool is_new;

	if (mtu <= size)
		return VERDICT_UNKNOWN_L4;
	mtu -= size;
	if (packet->version == IP6_VERSION && mtu < IP6_MTU_MIN)
		mtu = IP6_MTU_MIN;
	room->mtu = mtu;
	room->outer_dst = packet->flow.src;
	packet->l3 = packet->l4 + room->quote.l4;
	verdict = packet->version == IP4_VERSION ? parse_ip4(skb, packet) : parse_ip6(skb, packet);
	verdict = forget_path(room, verdict ?: parse_ports(skb, packet));
	if (verdict)
		return VERDICT_UNKNOWN_L4;
	packet->flow.dir = FLOW_FORWARD;
	flow = find_flow(&packet->flow, &is_new);
	if (!flow || !(flow->flags & FLOW_DSR) || !addr_equal(&flow->dst, &room->outer_dst))
		return VERDICT_UNKNOWN_L4;
	if (!unwrap(skb, packet, packet->l3 - l3))
		return VERDICT_REWRITE_FAILED;
	packet->l4_size = skb->len - packet->l4;
	return VERDICT_TOO_BIG;
}

#endif /* EBPFPROXY_TUNNEL_ERROR_H */

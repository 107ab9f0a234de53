/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* tunnel_frame.h - as tunnel.h, for a frame in XDP: room is made or taken in front, and Ethernet moves. */
#ifndef EBPFPROXY_TUNNEL_FRAME_H
#define EBPFPROXY_TUNNEL_FRAME_H

#include "frame.h"
#include "ipip.h"

/* Reads the packet inside, as read_addresses() the one outside. */
static __always_inline void *read_inside(struct xdp_md *ctx, struct packet *packet)
{
	if (packet->version == IP4_VERSION)
		return read_ip(ctx, packet, true, FRAME_L3 + sizeof(struct iphdr));
	return read_ip(ctx, packet, false, FRAME_L3 + sizeof(struct ipv6hdr));
}

/* Takes `size` bytes of outer header away; `packet` is the inner one. False: nothing was changed. */
static __always_inline bool unwrap_frame(struct xdp_md *ctx, struct packet *packet, __u32 size)
{
	struct ethhdr *start = (void *)(long)ctx->data, eth;

	if (!frame_holds(start, sizeof(*start), (void *)(long)ctx->data_end))
		return false;
	eth = *start;
	if (bpf_xdp_adjust_head(ctx, size))
		return false;
	start = (void *)(long)ctx->data;
	if (frame_holds(start, sizeof(*start), (void *)(long)ctx->data_end))
		*start = eth;
	packet->l3 -= size;
	packet->l4 -= size;
	return true;
}

/* Takes a hop, and puts a header that leads to flow->dst in front. False: nothing was changed. */
static __always_inline bool wrap_frame4(struct xdp_md *ctx, const struct packet *packet,
					const struct flow *flow)
{
	struct iphdr *outer, *inner;
	struct ethhdr *eth;
	__u64 sum;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*outer)))
		return false;
	eth = (void *)(long)ctx->data;
	outer = (void *)(eth + 1);
	inner = outer + 1;
	if (!frame_holds(inner, sizeof(*inner), (void *)(long)ctx->data_end))
		return false;
	sum = sum_exchange((__u16)~inner->check, bpf_htons(inner->ttl << 8),
			   bpf_htons((inner->ttl - 1) << 8));
	inner->check = sum_finish(sum);
	inner->ttl--;
	make_tunnel4(outer, packet, flow, inner->tos);
	eth->h_proto = bpf_htons(ETHERTYPE_IP4);
	return true;
}

static __always_inline bool wrap_frame6(struct xdp_md *ctx, const struct packet *packet,
					const struct flow *flow)
{
	struct ipv6hdr *outer, *inner;
	struct ethhdr *eth;
	__be32 first;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*outer)))
		return false;
	eth = (void *)(long)ctx->data;
	outer = (void *)(eth + 1);
	inner = outer + 1;
	if (!frame_holds(inner, sizeof(*inner), (void *)(long)ctx->data_end))
		return false;
	__builtin_memcpy(&first, inner, sizeof(first));
	inner->hop_limit--;
	make_tunnel6(outer, packet, flow, ip6_class(first));
	eth->h_proto = bpf_htons(ETHERTYPE_IP6);
	return true;
}

/* The caller writes the MAC addresses. */
static __always_inline bool wrap_frame(struct xdp_md *ctx, const struct packet *packet,
				       const struct flow *flow)
{
	return packet->version == IP4_VERSION ? wrap_frame4(ctx, packet, flow)
					      : wrap_frame6(ctx, packet, flow);
}

#endif /* EBPFPROXY_TUNNEL_FRAME_H */

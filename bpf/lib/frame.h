/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * frame.h - reads and translates a frame in XDP, by direct access.
 *
 * Only what is frequent and simple: untagged Ethernet, whole packets, no IP options or extension headers, TCP and
 * UDP. Everything else is for tc_lb, which does all of it. A frame has its checksums finished, unlike an skb.
 */
#ifndef EBPFPROXY_FRAME_H
#define EBPFPROXY_FRAME_H

#include "packet.h"
#include "sum.h"

#define FRAME_L3 sizeof(struct ethhdr)

/* Whether the `size` bytes from `start` on are there. */
#define frame_holds(start, size, end) ((void *)(start) + (size) <= (end))

/* Finishes what read_addresses() began; false: not a frame for XDP. */
static __always_inline bool read_ports(struct xdp_md *ctx, struct packet *packet, void *l4)
{
	void *end = (void *)(long)ctx->data_end;
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	switch (packet->next) {
	case IPPROTO_TCP:
		if (!frame_holds(tcp, sizeof(*tcp), end) || packet->l4_size < sizeof(*tcp))
			return false;
		packet->flow.sport = tcp->source;
		packet->flow.dport = tcp->dest;
		packet->events = tcp_events(tcp);
		return true;
	case IPPROTO_UDP:
		if (!frame_holds(udp, sizeof(*udp), end) || packet->l4_size < sizeof(*udp))
			return false;
		packet->flow.sport = udp->source;
		packet->flow.dport = udp->dest;
		packet->events = 0;
		return true;
	default:
		return false;
	}
}

/* Reads the IP header at `l3` and returns what is behind it; NULL: not for XDP. */
static __always_inline void *read_ip(struct xdp_md *ctx, struct packet *packet, bool is_v4,
				     __u32 l3)
{
	void *start = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ipv6hdr *ip6 = start + l3;
	struct iphdr *ip4 = start + l3;
	__u32 size, header;

	if (is_v4) {
		if (!frame_holds(ip4, sizeof(*ip4), end))
			return NULL;
		size = bpf_ntohs(ip4->tot_len);
		header = sizeof(*ip4);
		if (ip4->version != IP4_VERSION || ip4->ihl != IP4_HEADER_MIN ||
		    ip4->frag_off & bpf_htons(IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET))
			return NULL;
		addr_set_v4(&packet->flow.src, ip4->saddr);
		addr_set_v4(&packet->flow.dst, ip4->daddr);
		packet->version = IP4_VERSION;
		packet->next = ip4->protocol;
		packet->hops = ip4->ttl;
	} else {
		if (!frame_holds(ip6, sizeof(*ip6), end) || ip6->version != IP6_VERSION)
			return NULL;
		size = bpf_ntohs(ip6->payload_len) + sizeof(*ip6);
		header = sizeof(*ip6);
		__builtin_memcpy(&packet->flow.src, &ip6->saddr, sizeof(packet->flow.src));
		__builtin_memcpy(&packet->flow.dst, &ip6->daddr, sizeof(packet->flow.dst));
		packet->version = IP6_VERSION;
		packet->next = ip6->nexthdr;
		packet->hops = ip6->hop_limit;
	}
	/* Cut short, or in several buffers. Before Linux 5.14 the verifier knows no bound of a number whose bytes were swapped:
	 * it is compared, never added to a pointer.
	 */
	if (size < header || size > end - start - l3)
		return NULL;
	packet->l3 = l3;
	packet->l4 = l3 + header;
	packet->l4_size = size - header;
	packet->fragment = FRAGMENT_NONE;
	packet->count = 1;
	packet->flow.proto = packet->next;
	packet->flow.pad[0] = 0;
	packet->flow.pad[1] = 0;
	return start + l3 + header;
}

/* Reads addresses; returns what is behind the IP header; NULL: not a frame for XDP. */
static __always_inline void *read_addresses(struct xdp_md *ctx, struct packet *packet)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if (!frame_holds(eth, sizeof(*eth), (void *)(long)ctx->data_end))
		return NULL;
	if (eth->h_proto == bpf_htons(ETHERTYPE_IP4))
		return read_ip(ctx, packet, true, FRAME_L3);
	if (eth->h_proto == bpf_htons(ETHERTYPE_IP6))
		return read_ip(ctx, packet, false, FRAME_L3);
	return NULL;
}

static __always_inline __u16 l4_sum(__u16 check, const struct packet *packet,
				    const struct flow *flow)
{
	__u64 sum = (__u16)~check;

	/* IPv4 addresses have the same words in front on both sides: no difference. */
	sum = sum_exchange_addr(sum, &packet->flow.src, &flow->src);
	sum = sum_exchange_addr(sum, &packet->flow.dst, &flow->dst);
	sum = sum_exchange(sum, packet->flow.sport, flow->sport);
	sum = sum_exchange(sum, packet->flow.dport, flow->dport);
	return sum_finish(sum);
}

/* Gives what is behind the IP header the ports and the checksum of the flow. False: nothing was changed. */
static __always_inline bool write_l4(void *l4, void *end, const struct packet *packet,
				     const struct flow *flow)
{
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	if (packet->next == IPPROTO_TCP) {
		if (!frame_holds(tcp, sizeof(*tcp), end))
			return false;
		tcp->source = flow->sport;
		tcp->dest = flow->dport;
		tcp->check = l4_sum(tcp->check, packet, flow);
		return true;
	}
	if (!frame_holds(udp, sizeof(*udp), end))
		return false;
	udp->source = flow->sport;
	udp->dest = flow->dport;
	/* 0: the sender made none; a computed 0 is sent as 0xffff (RFC 768). */
	if (udp->check)
		udp->check = l4_sum(udp->check, packet, flow) ?: 0xffff;
	return true;
}

static __always_inline bool write_frame4(struct xdp_md *ctx, const struct packet *packet,
					 const struct flow *flow, bool forwarded)
{
	struct iphdr *ip = (void *)(long)ctx->data + FRAME_L3;
	__u64 sum;

	if (!write_l4(ip + 1, (void *)(long)ctx->data_end, packet, flow))
		return false;
	sum = (__u16)~ip->check;
	sum = sum_exchange(sum, ip->saddr, flow->src.w[3]);
	sum = sum_exchange(sum, ip->daddr, flow->dst.w[3]);
	if (forwarded)
		sum = sum_exchange(sum, bpf_htons(packet->hops << 8),
				   bpf_htons((packet->hops - 1) << 8));
	ip->check = sum_finish(sum);
	ip->saddr = flow->src.w[3];
	ip->daddr = flow->dst.w[3];
	ip->ttl -= forwarded;
	return true;
}

static __always_inline bool write_frame6(struct xdp_md *ctx, const struct packet *packet,
					 const struct flow *flow, bool forwarded)
{
	struct ipv6hdr *ip = (void *)(long)ctx->data + FRAME_L3;

	if (!write_l4(ip + 1, (void *)(long)ctx->data_end, packet, flow))
		return false;
	__builtin_memcpy(&ip->saddr, &flow->src, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &flow->dst, sizeof(ip->daddr));
	ip->hop_limit -= forwarded;
	return true;
}

/* Gives the frame what the flow says, and one hop less if it is `forwarded`. False: nothing was changed.
 *
 * The versions are apart from here on: of a pointer that is one of two, Linux 5.10's verifier forgets which one it was.
 */
static __always_inline bool write_frame(struct xdp_md *ctx, const struct packet *packet,
					const struct flow *flow, bool forwarded)
{
	bool is_v4 = packet->version == IP4_VERSION;

	if (addr_is_v4(&flow->dst) != is_v4)
		return false;
	return is_v4 ? write_frame4(ctx, packet, flow, forwarded)
		     : write_frame6(ctx, packet, flow, forwarded);
}

static __always_inline void write_macs(struct xdp_md *ctx, const struct next_hop *hop)
{
	void *start = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (frame_holds(start, 2 * ETH_ALEN, end))
		__builtin_memcpy(start, hop->to_mac, 2 * ETH_ALEN);
}

#endif /* EBPFPROXY_FRAME_H */

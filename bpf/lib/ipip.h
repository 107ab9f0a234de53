/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ipip.h - the IP header that a packet gets in front when it goes to another node as it is (FLOW_DSR): IP in IP,
 * RFC 2003 and RFC 2473. It says node and backend, so that routers need to know no more than they do, and the node
 * there which of its backends is meant.
 */
#ifndef EBPFPROXY_IPIP_H
#define EBPFPROXY_IPIP_H

#include "hash.h"
#include "packet.h"

/* RFC 2003 3.1 wants the path's length from the outer TTL; what hosts send today (RFC 1122 1.2.2). */
#define TUNNEL_HOPS 64

#define IP4_DONT_FRAGMENT 0x4000
#define IP6_FLOW_LABEL	  0xfffff

/* What is written: one or the other. */
union tunnel_header {
	struct iphdr ip4;
	struct ipv6hdr ip6;
};

static __always_inline __u32 tunnel_size(__u8 version)
{
	return version == IP4_VERSION ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* Bytes that a packet grows by on its way out. */
static __always_inline __u32 tunnel_growth(const struct packet *packet, const struct flow *flow)
{
	return flow->flags & FLOW_DSR ? tunnel_size(packet->version) : 0;
}

/* What the header in front says of the packet inside. */
static __always_inline __u8 tunnel_proto(const struct packet *packet)
{
	return packet->version == IP4_VERSION ? IPPROTO_IPIP : IPPROTO_IPV6;
}

/* Whether a packet may be one that another node sent: of one version inside and out, without options. */
static __always_inline bool is_tunnelled(const struct packet *packet)
{
	return packet->next == tunnel_proto(packet) && !packet->fragment &&
	       packet->l4 - packet->l3 == tunnel_size(packet->version);
}

/* 0 where the field can't hold it: a batch of the kernel's own (BIG TCP), each part of which gets its size. */
static __always_inline __be16 tunnel_length(__u32 size)
{
	return size > 0xffff ? 0 : bpf_htons(size);
}

/* Traffic class and congestion marks are the inner packet's (RFC 6040 4.1, normal mode): `tos`. */
static __always_inline void make_tunnel4(struct iphdr *ip, const struct packet *packet,
					 const struct flow *flow, __u8 tos)
{
	__u16 *words = (__u16 *)ip;
	__u32 sum = 0;

	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = IP4_VERSION;
	ip->ihl = IP4_HEADER_MIN;
	ip->tos = tos;
	ip->tot_len = tunnel_length(ip_size(packet) + sizeof(*ip));
	/* Never cut on its way: the node there could not put it together. Needs no identification then (RFC 6864). */
	ip->frag_off = bpf_htons(IP4_DONT_FRAGMENT);
	ip->ttl = TUNNEL_HOPS;
	ip->protocol = IPPROTO_IPIP;
	ip->saddr = flow->src.w[3];
	ip->daddr = flow->dst.w[3];
#pragma unroll
	for (__u32 i = 0; i < sizeof(*ip) / sizeof(*words); i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~((sum & 0xffff) + (sum >> 16));
}

static __always_inline void make_tunnel6(struct ipv6hdr *ip, const struct packet *packet,
					 const struct flow *flow, __u8 tos)
{
	/* Routers spread load by the label, as the ports are out of their sight (RFC 6438). */
	__be32 first = bpf_htonl((__u32)IP6_VERSION << 28 | (__u32)tos << 20 |
				 (hash_flow(&packet->flow) & IP6_FLOW_LABEL));

	__builtin_memcpy(ip, &first, sizeof(first));
	ip->payload_len = tunnel_length(ip_size(packet));
	ip->nexthdr = IPPROTO_IPV6;
	ip->hop_limit = TUNNEL_HOPS;
	__builtin_memcpy(&ip->saddr, &flow->src, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &flow->dst, sizeof(ip->daddr));
}

/* Traffic class of the version-6 header that begins so. */
static __always_inline __u8 ip6_class(__be32 first)
{
	return bpf_ntohl(first) >> 20;
}

#endif /* EBPFPROXY_IPIP_H */

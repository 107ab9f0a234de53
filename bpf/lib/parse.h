/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * parse.h - from a packet to its flow. Only this header and rewrite.h know that there are two IP versions.
 *
 * In two steps, as most packets are not ours and the addresses show it: parse_addresses(), parse_ports().
 */
#ifndef EBPFPROXY_PARSE_H
#define EBPFPROXY_PARSE_H

#include "fragments.h"
#include "packet.h"

/* IEEE 802.1ad allows one service and one customer tag; the kernel keeps the outer one beside the packet. */
#define VLAN_TAGS_MAX 2

/* RFC 8200 4.1: at most six extension headers stand before a readable L4 header.
 * The bound also keeps the loop provable; more is VERDICT_UNKNOWN_L4.
 */
#define IP6_EXT_MAX 6

/* Ethernet, two tags, IPv6, and six extension headers of at most 2048 bytes (RFC 8200 4.3: 8 * 255 + 8):
 * no header starts later. The bound lets the verifier trust the offset.
 */
#define HEADER_OFFSET_MAX (14 + 2 * 4 + 40 + IP6_EXT_MAX * 2048)

/* RFC 8200 4.5 */
#define IP6_MORE_FRAGMENTS  1
#define IP6_FRAGMENT_OFFSET 0xfff8

/* IANA protocol numbers that <linux/in.h> leaves out. */
#define NEXT_MOBILITY 135
#define NEXT_HIP      139
#define NEXT_SHIM6    140

struct vlan_tag {
	__be16 tci;
	__be16 ethertype; /* of what follows */
};

/* RFC 8200 4: what hop-by-hop, routing, destination and fragment headers begin with. */
struct ip6_extension {
	__u8 next;
	__u8 length; /* in 8 bytes, the first 8 not counted; fragment: reserved */
	__be16 rest; /* routing: type, segments left; fragment: offset, more */
	__be32 id; /* fragment */
};

/* Returns `size` bytes at `offset` if they are in the linear part. */
static __always_inline void *linear(struct __sk_buff *skb, __u64 offset, __u32 size)
{
	void *data, *end;

	/* Else the compiler may keep the address of a field of the context, through which the verifier lets nobody read. */
	barrier_var(skb);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	/* Keeps the compiler from handling the pointers as 32-bit numbers, as which the context declares them. */
	barrier_var(data);
	barrier_var(end);
	data += offset;
	/* One pointer for the check and the access: the verifier does not see that two are the same. */
	barrier_var(data);
	return data + size <= end ? data : NULL;
}

/* Returns `size` readable bytes at `offset`, or NULL past the packet's end. Earlier pointers are void after it. */
static __always_inline void *header(struct __sk_buff *skb, __u32 from, __u32 size)
{
	__u64 offset = from;
	void *at;

	/* One number for the bound and for the use, 64 bits wide: old kernels lose the bound with a copy of 32. */
	barrier_var(offset);
	if (offset > HEADER_OFFSET_MAX)
		return NULL;
	at = linear(skb, offset, size);
	/* Headers in fragments of the skb: rare, drivers keep them in the linear part. */
	if (!at && !bpf_skb_pull_data(skb, offset + size))
		at = linear(skb, offset, size);
	return at;
}

/* Whether the packet starts with an Ethernet header: tunnels and WireGuard have none, and nothing tells us.
 * The type field in the right place says yes, the IP version in the first byte says no; where a MAC address
 * looks like an IP version (or an IP address like a type), the kernel's own mark of the IP header decides.
 */
static __always_inline bool has_ethernet(struct __sk_buff *skb, const struct ethhdr *start)
{
	__u8 version = start->h_dest[0] >> 4;
	__u64 here, there;

	if (start->h_proto != (__be16)skb->protocol)
		return false;
	if (version != IP4_VERSION && version != IP6_VERSION)
		return true;
	if (bpf_skb_load_bytes_relative(skb, 0, &there, sizeof(there), BPF_HDR_START_NET) ||
	    bpf_skb_load_bytes(skb, 0, &here, sizeof(here)))
		return true;
	return here != there;
}

static __always_inline enum fragment_kind fragment_kind(bool has_offset, bool has_more)
{
	if (has_offset)
		return FRAGMENT_LATER;
	return has_more ? FRAGMENT_FIRST : FRAGMENT_NONE;
}

static __always_inline enum verdict parse_ip4(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr *ip = header(skb, packet->l3, sizeof(*ip));
	__u32 size, length;

	if (!ip || ip->ihl < IP4_HEADER_MIN || ip->version != IP4_VERSION)
		return VERDICT_TRUNCATED;
	size = ip->ihl * IP4_WORD;
	length = bpf_ntohs(ip->tot_len);
	/* 0: longer than the field can say, the kernel's own batches (BIG TCP, 6.3). */
	if (!length)
		length = skb->len - packet->l3;
	if (length < size)
		return VERDICT_TRUNCATED;
	addr_set_v4(&packet->flow.src, ip->saddr);
	addr_set_v4(&packet->flow.dst, ip->daddr);
	packet->version = IP4_VERSION;
	packet->l4 = packet->l3 + size;
	packet->l4_size = length - size;
	packet->next = ip->protocol;
	packet->hops = ip->ttl;
	packet->fragment = fragment_kind(ip->frag_off & bpf_htons(IP4_FRAGMENT_OFFSET),
					 ip->frag_off & bpf_htons(IP4_MORE_FRAGMENTS));
	packet->fragment_id = ip->id;
	return VERDICT_CONTINUE;
}

static __always_inline enum verdict parse_ip6(struct __sk_buff *skb, struct packet *packet)
{
	struct ipv6hdr *ip = header(skb, packet->l3, sizeof(*ip));
	__u32 length;

	if (!ip || ip->version != IP6_VERSION)
		return VERDICT_TRUNCATED;
	length = bpf_ntohs(ip->payload_len);
	/* 0: a jumbogram, or the kernel's own batches (BIG TCP, 5.19). */
	if (!length)
		length = skb->len - packet->l3 - sizeof(*ip);
	__builtin_memcpy(&packet->flow.src, &ip->saddr, sizeof(packet->flow.src));
	__builtin_memcpy(&packet->flow.dst, &ip->daddr, sizeof(packet->flow.dst));
	packet->version = IP6_VERSION;
	packet->l4 = packet->l3 + sizeof(*ip);
	packet->l4_size = length;
	packet->next = ip->nexthdr;
	packet->hops = ip->hop_limit;
	packet->fragment = FRAGMENT_NONE;
	return VERDICT_CONTINUE;
}

/* Reads L2 and the IP header: fills everything of `packet` but ports and events. */
static __always_inline enum verdict parse_addresses(struct __sk_buff *skb, struct packet *packet)
{
	struct ethhdr *eth = header(skb, 0, sizeof(*eth));
	__be16 type = (__be16)skb->protocol;

	packet->count = skb->gso_segs ?: 1;
	/* IP needs more than 14 bytes, with and without Ethernet. */
	if (!eth)
		return VERDICT_TRUNCATED;
	packet->l3 = 0;
	if (has_ethernet(skb, eth)) {
		packet->l3 = sizeof(*eth);
#pragma unroll
		for (int i = 0; i < VLAN_TAGS_MAX; i++) {
			struct vlan_tag *tag;

			if (type != bpf_htons(ETHERTYPE_VLAN) && type != bpf_htons(ETHERTYPE_QINQ))
				break;
			tag = header(skb, packet->l3, sizeof(*tag));
			if (!tag)
				return VERDICT_TRUNCATED;
			type = tag->ethertype;
			packet->l3 += sizeof(*tag);
		}
	}
	if (type == bpf_htons(ETHERTYPE_IP4))
		return parse_ip4(skb, packet);
	if (type == bpf_htons(ETHERTYPE_IP6))
		return parse_ip6(skb, packet);
	return VERDICT_NOT_OURS;
}

/* Steps over extension headers, to a header that has none behind it; in a later fragment there is none to find. */
static __always_inline enum verdict skip_extensions(struct __sk_buff *skb, struct packet *packet)
{
	for (int i = 0; i <= IP6_EXT_MAX; i++) {
		struct ip6_extension *extension;
		__u32 size;

		switch (packet->next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
		case NEXT_MOBILITY:
		case NEXT_HIP:
		case NEXT_SHIM6:
			break;
		default:
			/* Also AH: it signs the addresses, nobody may translate them. */
			return VERDICT_CONTINUE;
		}
		extension = header(skb, packet->l4, sizeof(*extension));
		if (!extension)
			return VERDICT_TRUNCATED;
		size = 8;
		if (packet->next == IPPROTO_FRAGMENT) {
			/* RFC 6946: an atomic fragment is a whole packet. */
			packet->fragment =
				fragment_kind(extension->rest & bpf_htons(IP6_FRAGMENT_OFFSET),
					      extension->rest & bpf_htons(IP6_MORE_FRAGMENTS));
			packet->fragment_id = extension->id;
		} else {
			/* Segments left: the destination is a waypoint, not the packet's end. */
			if (packet->next == IPPROTO_ROUTING && extension->rest & bpf_htons(0xff))
				return VERDICT_UNKNOWN_L4;
			size += extension->length * 8;
		}
		if (size > packet->l4_size)
			return VERDICT_TRUNCATED;
		packet->next = extension->next;
		packet->l4 += size;
		packet->l4_size -= size;
		if (packet->fragment == FRAGMENT_LATER)
			return VERDICT_CONTINUE;
	}
	return VERDICT_UNKNOWN_L4;
}

static __always_inline enum verdict parse_tcp(struct __sk_buff *skb, struct packet *packet)
{
	struct tcphdr *tcp = header(skb, packet->l4, sizeof(*tcp));

	if (!tcp || packet->l4_size < sizeof(*tcp))
		return VERDICT_TRUNCATED;
	packet->flow.sport = tcp->source;
	packet->flow.dport = tcp->dest;
	packet->events = tcp_events(tcp);
	return VERDICT_CONTINUE;
}

static __always_inline enum verdict parse_udp(struct __sk_buff *skb, struct packet *packet)
{
	struct udphdr *udp = header(skb, packet->l4, sizeof(*udp));

	if (!udp || packet->l4_size < sizeof(*udp))
		return VERDICT_TRUNCATED;
	packet->flow.sport = udp->source;
	packet->flow.dport = udp->dest;
	return VERDICT_CONTINUE;
}

static __always_inline enum verdict parse_sctp(struct __sk_buff *skb, struct packet *packet)
{
	/* RFC 9260 3: a packet without a chunk is none. */
	struct sctp_header *sctp = header(skb, packet->l4, sizeof(*sctp) + 1);

	if (!sctp || packet->l4_size <= sizeof(*sctp))
		return VERDICT_TRUNCATED;
	packet->flow.sport = sctp->source;
	packet->flow.dport = sctp->dest;
	/* INIT, ABORT after it and SHUTDOWN COMPLETE come first in their packets (RFC 9260 6.10). */
	switch (*(__u8 *)(sctp + 1)) {
	case SCTP_INIT:
		packet->events = EVENT_OPEN;
		break;
	case SCTP_INIT_ACK:
		packet->events = EVENT_ACCEPT;
		break;
	case SCTP_SHUTDOWN:
		packet->events = EVENT_FIN;
		break;
	case SCTP_ABORT:
	case SCTP_SHUTDOWN_COMPLETE:
		packet->events = EVENT_RESET;
		break;
	}
	return VERDICT_CONTINUE;
}

/* Finishes what parse_addresses() began: protocol, ports and events. A later fragment has those of its first. */
static __always_inline enum verdict parse_ports(struct __sk_buff *skb, struct packet *packet)
{
	enum verdict verdict = VERDICT_CONTINUE;

	if (packet->version == IP6_VERSION)
		verdict = skip_extensions(skb, packet);
	if (verdict)
		return verdict;
	if (packet->fragment == FRAGMENT_LATER)
		return follow_first(packet);
	packet->flow.proto = packet->next;
	packet->flow.pad[0] = 0;
	packet->flow.pad[1] = 0;
	packet->events = 0;
	switch (packet->next) {
	case IPPROTO_TCP:
		return parse_tcp(skb, packet);
	case IPPROTO_UDP:
		return parse_udp(skb, packet);
	case IPPROTO_SCTP:
		return parse_sctp(skb, packet);
	default:
		return VERDICT_UNKNOWN_L4;
	}
}

#endif /* EBPFPROXY_PARSE_H */

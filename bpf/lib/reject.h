/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * reject.h - the answer to a packet that goes no further. To a connection that nobody serves: TCP RST, else ICMP port
 * unreachable. To a packet that can't be sent on: ICMP time exceeded, ICMP packet too big (IPv4: fragmentation needed).
 *
 * The refused packet becomes the answer: it is cut to size, overwritten, and leaves by the device it came from.
 * The answer has no options, and right checksums in software: its buffer may have come with a checksum that a device
 * was to finish (CHECKSUM_PARTIAL), which must not be done to the answer. Refusals come from the VIP, as a host's
 * would; what a router says comes from this node, so that traceroute shows it. The quote is always the packet as it came.
 */
#ifndef EBPFPROXY_REJECT_H
#define EBPFPROXY_REJECT_H

#include "maps.h"
#include "hop.h"
#include "parse.h"
#include "verdict.h"

/* net.ipv4.icmp_msgs_per_sec, the kernel's own limit, here for each CPU; that many may come at once: a service
 * that loses its last backend has all its clients back in an instant.
 */
#define REJECTS_PER_SEC 1000
#define REJECT_NS	(NSEC_PER_SEC / REJECTS_PER_SEC)
#define REJECT_BURST_NS NSEC_PER_SEC

#define IP4_SIZE     20
#define IP6_SIZE     40
#define IP4_SIZE_MAX 60
#define TCP_SIZE     20

/* RFC 1812 4.3.2.3: as much as fits into 576 bytes; RFC 4443 2.4 (c): as much as fits into 1280. */
#define IP4_QUOTE_MAX (576 - IP4_SIZE - ICMP_SIZE)
#define IP6_QUOTE_MAX (1280 - IP6_SIZE - ICMP_SIZE)

/* RFC 1122 1.2.2, RFC 8504: what hosts send today. */
#define REJECT_HOPS 64

/* RFC 1812 4.3.2.5: errors have precedence "internetwork control". */
#define TOS_CONTROL 0xc0

#define IP4_DONT_FRAGMENT 0x4000
#define TCP_FLAG_RST	  0x04
#define TCP_FLAG_ACK	  0x10

/* Codes of "destination unreachable": RFC 792; RFC 4443 3.1. */
#define ICMP4_PORT	      3
#define ICMP4_FRAGMENT_NEEDED 4
#define ICMP6_PORT	      4

/* linux/if_packet.h */
#define PACKET_BROADCAST 1
#define PACKET_MULTICAST 2

/* bpf_csum_diff() takes at most the size of a program's stack (before 6.13); an L4 answer has at most three parts. */
#define SUM_MAX	  512
#define SUM_PARTS 3

/* The answer is made here before it is written to the packet: struct reject.packet. L4 always starts at the
 * same place, an IPv4 header leaves room in front.
 */
#define REJECT_L4 IP6_SIZE

/* Whether an answer may be sent to `addr`, or in its name: one host, and not this one's loopback (RFC 1122 3.2.2,
 * RFC 4443 2.4 (e)).
 */
static __always_inline bool is_host(const struct addr *addr, __u8 version)
{
	__u8 first = bpf_ntohl(addr->w[3]) >> 24;

	if (version == IP6_VERSION)
		return !addr_is_any(addr) && !addr_is_loopback6(addr) && !addr_is_v4(addr) &&
		       bpf_ntohl(addr->w[0]) >> 24 != 0xff;
	/* 0.0.0.0/8 "this network", 127.0.0.0/8, multicast, and 240.0.0.0/4 with the broadcast address. */
	return first && first != 127 && first < 224;
}

/* Whether a size is in these bounds, in a form that the verifier can follow with every compiler: 64 bits wide,
 * one comparison after the other, and right before the use, as old kernels forget what they knew about a number
 * that was in memory meanwhile.
 */
static __always_inline bool is_between(__u64 *size, __u64 min, __u64 max)
{
	barrier_var(*size);
	if (*size < min)
		return false;
	barrier_var(*size);
	return *size <= max;
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Whether the IPv4 header is undamaged: the stack has not looked at it yet. `scratch` has room for it. */
static __always_inline bool is_sound_ip4(struct __sk_buff *skb, const struct packet *packet,
					 __u8 *scratch)
{
	__u64 size = packet->l4 - packet->l3;

	if (!is_between(&size, IP4_SIZE, IP4_SIZE_MAX) ||
	    bpf_skb_load_bytes(skb, packet->l3, scratch, size))
		return false;
	return !fold(bpf_csum_diff(NULL, 0, (__be32 *)scratch, size, 0));
}

/* Whether the packet may be answered at all (RFC 1122 3.2.2, RFC 4443 2.4 (e)). */
static __always_inline bool may_answer(struct __sk_buff *skb, const struct packet *packet,
				       struct reject *scratch)
{
	if (packet->events & EVENT_RESET || packet->l4 + packet->l4_size > skb->len)
		return false;
	if (packet->fragment == FRAGMENT_LATER)
		return false;
	if (skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_MULTICAST)
		return false;
	return is_host(&packet->flow.src, packet->version) &&
	       is_host(&packet->flow.dst, packet->version) &&
	       (packet->version == IP6_VERSION || is_sound_ip4(skb, packet, scratch->packet));
}

/* Takes one answer out of the budget: a bucket of REJECT_BURST_NS that time fills. */
static __always_inline bool take_budget(struct reject *scratch)
{
	__u64 now = bpf_ktime_get_ns(), paid = scratch->paid_ns;

	if (paid + REJECT_BURST_NS < now)
		paid = now - REJECT_BURST_NS;
	if (paid + REJECT_NS > now)
		return false;
	scratch->paid_ns = paid + REJECT_NS;
	return true;
}

/* Checksum of the `size` bytes of L4 in the scratch, which zeros follow. */
static __always_inline __u16 sum_l4(struct reject *scratch, __u64 size, __u32 sum)
{
	size = (size + 3) & ~3ULL;
#pragma unroll
	for (int i = 0; i < SUM_PARTS; i++) {
		__u64 part = size < SUM_MAX ? size : SUM_MAX;

		size -= part;
		if (is_between(&part, 0, SUM_MAX))
			sum = bpf_csum_diff(NULL, 0,
					    (__be32 *)(scratch->packet + REJECT_L4 + i * SUM_MAX),
					    part, sum);
	}
	return fold(sum);
}

/* Sum of the pseudo header. IPv4's is the same in the long form: ::ffff adds 0xffff, which is zero here. */
static __always_inline __u32 sum_pseudo(const struct packet *packet, __u8 proto, __u32 size)
{
	return bpf_csum_diff(NULL, 0, (__be32 *)&packet->flow, 2 * sizeof(struct addr),
			     bpf_htonl(size + proto));
}

/* RFC 9293 3.10.7.1, for a connection in state CLOSED. Returns the size of the answer's L4, 0 if there is none. */
static __always_inline __u32 make_reset(struct __sk_buff *skb, const struct packet *packet,
					struct reject *scratch)
{
	struct tcphdr *tcp = header(skb, packet->l4, sizeof(*tcp));
	struct tcphdr *reset = (struct tcphdr *)(scratch->packet + REJECT_L4);
	__u32 data_at;

	if (!tcp)
		return 0;
	data_at = tcp->doff * 4;
	if (data_at < TCP_SIZE || data_at > packet->l4_size)
		return 0;
	__builtin_memset(reset, 0, sizeof(*reset));
	reset->source = packet->flow.dport;
	reset->dest = packet->flow.sport;
	reset->doff = TCP_SIZE / 4;
	reset->rst = 1;
	if (tcp->ack) {
		reset->seq = tcp->ack_seq;
	} else {
		reset->ack = 1;
		reset->ack_seq = bpf_htonl(bpf_ntohl(tcp->seq) + tcp->syn + tcp->fin +
					   packet->l4_size - data_at);
	}
	reset->check = sum_l4(scratch, TCP_SIZE, sum_pseudo(packet, IPPROTO_TCP, TCP_SIZE));
	return TCP_SIZE;
}

/* Writes type, code and MTU of the error that a verdict asks for. RFC 1191 4: the MTU is the lower half of `rest`;
 * RFC 4443 3.2: all of it.
 */
static __always_inline void fill_error(struct icmp_header *icmp, bool is_v4, enum verdict verdict,
				       __u32 mtu)
{
	icmp->checksum = 0;
	icmp->rest = 0;
	switch (verdict) {
	case VERDICT_HOPS:
		icmp->type = is_v4 ? ICMP4_TIME_EXCEEDED : ICMP6_TIME_EXCEEDED;
		icmp->code = 0;
		break;
	case VERDICT_TOO_BIG:
		icmp->type = is_v4 ? ICMP4_UNREACHABLE : ICMP6_TOO_BIG;
		icmp->code = is_v4 ? ICMP4_FRAGMENT_NEEDED : 0;
		icmp->rest = bpf_htonl(mtu);
		break;
	default:
		icmp->type = is_v4 ? ICMP4_UNREACHABLE : ICMP6_UNREACHABLE;
		icmp->code = is_v4 ? ICMP4_PORT : ICMP6_PORT;
	}
}

/* An ICMP error, with the start of the packet it is about. Returns the size of the answer's L4, 0 on failure. */
static __always_inline __u32 make_error(struct __sk_buff *skb, const struct scratch *room,
					struct reject *scratch, enum verdict verdict)
{
	const struct packet *packet = &room->packet;
	struct icmp_header *icmp = (struct icmp_header *)(scratch->packet + REJECT_L4);
	__u8 *quote = scratch->packet + REJECT_L4 + ICMP_SIZE;
	bool is_v4 = packet->version == IP4_VERSION;
	__u64 size = packet->l4 - packet->l3 + packet->l4_size;
	__u64 size_max = is_v4 ? IP4_QUOTE_MAX : IP6_QUOTE_MAX;
	__u32 sum = 0;

	if (size > size_max)
		size = size_max;
	if (!is_between(&size, IP4_SIZE, IP6_QUOTE_MAX) ||
	    bpf_skb_load_bytes(skb, packet->l3, quote, size))
		return 0;
	quote[size] = 0;
	quote[size + 1] = 0;
	quote[size + 2] = 0;
	fill_error(icmp, is_v4, verdict, room->mtu);
	size += ICMP_SIZE;
	if (!is_v4)
		sum = sum_pseudo(packet, IPPROTO_ICMPV6, size);
	icmp->checksum = sum_l4(scratch, size, sum);
	return size;
}

/* Writes the IP header in front of L4 and returns its size. */
static __always_inline __u32 make_ip(const struct packet *packet, struct reject *scratch,
				     __u8 proto, __u32 l4_size)
{
	struct ipv6hdr *ip6 = (struct ipv6hdr *)scratch->packet;
	struct iphdr *ip4 = (struct iphdr *)(scratch->packet + REJECT_L4 - IP4_SIZE);

	if (packet->version == IP4_VERSION) {
		__builtin_memset(ip4, 0, sizeof(*ip4));
		ip4->version = IP4_VERSION;
		ip4->ihl = IP4_HEADER_MIN;
		ip4->tos = proto == IPPROTO_ICMP ? TOS_CONTROL : 0;
		ip4->tot_len = bpf_htons(IP4_SIZE + l4_size);
		/* With it the packet needs no identification (RFC 6864 4.1). */
		ip4->frag_off = bpf_htons(IP4_DONT_FRAGMENT);
		ip4->ttl = REJECT_HOPS;
		ip4->protocol = proto;
		ip4->saddr = packet->flow.dst.w[3];
		ip4->daddr = packet->flow.src.w[3];
		ip4->check = fold(bpf_csum_diff(NULL, 0, (__be32 *)ip4, IP4_SIZE, 0));
		return IP4_SIZE;
	}
	__builtin_memset(ip6, 0, sizeof(*ip6));
	ip6->version = IP6_VERSION;
	ip6->payload_len = bpf_htons(l4_size);
	ip6->nexthdr = proto;
	ip6->hop_limit = REJECT_HOPS;
	__builtin_memcpy(&ip6->saddr, &packet->flow.dst, sizeof(ip6->saddr));
	__builtin_memcpy(&ip6->daddr, &packet->flow.src, sizeof(ip6->daddr));
	return IP6_SIZE;
}

static __always_inline long swap_macs(struct __sk_buff *skb)
{
	__u8 macs[2 * ETH_ALEN];

	return bpf_skb_load_bytes(skb, 0, macs, sizeof(macs))
		       ?: bpf_skb_store_bytes(skb, 0, macs + ETH_ALEN, ETH_ALEN, 0)
		       ?: bpf_skb_store_bytes(skb, ETH_ALEN, macs, ETH_ALEN, 0);
}

/* Replaces everything behind L2 by the answer.
 *
 * CHECKSUM_PARTIAL ends when the place where summing starts, the old L4 header, is cut off in front of the data:
 * so the packet is first made longer by what is then cut away. bpf_skb_adjust_room() can't do that where a tag
 * stands in the packet. That is the inner of two; a local sender's unfinished checksum stays unfinished there.
 */
static __always_inline long replace(struct __sk_buff *skb, const struct packet *packet,
				    struct reject *scratch, __u32 ip_size, __u32 l4_size)
{
	bool is_tagged = packet->l3 > sizeof(struct ethhdr);
	/* Beyond the start of L4, and a multiple of 4: headers keep their alignment. */
	__u32 cut = is_tagged ? 0 : (packet->l4 + 4) & ~3;
	__u64 size = ip_size + l4_size;
	__u8 *answer = scratch->packet + REJECT_L4 - ip_size;
	long err = bpf_skb_change_tail(skb, packet->l3 + cut + size, 0);

	if (!err && cut)
		err = bpf_skb_adjust_room(skb, -(__s32)cut, BPF_ADJ_ROOM_MAC, 0);
	if (!err && packet->l3)
		err = swap_macs(skb);
	if (err || !is_between(&size, IP4_SIZE, IP6_SIZE + ICMP_SIZE + IP6_QUOTE_MAX))
		return -1;
	return bpf_skb_store_bytes(skb, packet->l3, answer, size,
				   BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
}

/* Turns a packet that goes no further, for `verdict`, into its answer. Returns what to count; *is_answer: send it. */
static __always_inline enum verdict answer(struct __sk_buff *skb, struct scratch *room,
					   enum verdict verdict, bool *is_answer)
{
	struct packet *packet = &room->packet;
	bool is_reset = is_rejection(verdict) && packet->flow.proto == IPPROTO_TCP;
	bool is_v4 = packet->version == IP4_VERSION;
	__u32 zero = 0, ip_size, l4_size;
	struct reject *scratch = map_lookup(rejects, &zero);
	__u8 proto = is_v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;

	/* An error about an error would have no end. */
	if (!scratch || is_icmp(packet) || !may_answer(skb, packet, scratch))
		return verdict;
	if (!take_budget(scratch))
		return VERDICT_REJECT_LIMITED;
	if (is_reset)
		proto = IPPROTO_TCP;
	else if (!is_rejection(verdict))
		find_source(skb->ifindex, is_v4, &packet->flow.dst);
	l4_size = is_reset ? make_reset(skb, packet, scratch)
			   : make_error(skb, room, scratch, verdict);
	if (!l4_size)
		return verdict;
	ip_size = make_ip(packet, scratch, proto, l4_size);
	if (replace(skb, packet, scratch, ip_size, l4_size))
		return VERDICT_REWRITE_FAILED;
	*is_answer = true;
	return verdict;
}

#endif /* EBPFPROXY_REJECT_H */

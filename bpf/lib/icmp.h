/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * icmp.h - ICMP for flows and VIPs: errors about a translated packet are translated, echo requests to a VIP answered.
 *
 * An error quotes the packet that it is about, as that was where the error was made: after translation by us. The
 * quote's flow, turned around, is the key of an entry; the entry says what the error's receiver sent or would have seen.
 * Only 8 bytes of L4 are certain to be in the quote (RFC 792): ports, and UDP's checksum. TCP's checksum is corrected
 * where it is there (RFC 5508 4.2); SCTP's can't be checked from a part of the packet, and stays.
 *
 * The outer source becomes the VIP where the backend itself reports. A router's address stays where the kernel's routing
 * goes on; where the flow's source is translated, the error gets this node's address, as the packet it is about had:
 * its way leads back, often through the very router, which takes nothing that claims to come from itself.
 */
#ifndef EBPFPROXY_ICMP_H
#define EBPFPROXY_ICMP_H

#include "reject.h"
#include "rewrite.h"
#include "service.h"
#include "sum.h"

/* TCP's checksum, RFC 9293 3.1; bytes that the quote must have for it. */
#define TCP_CHECK_AT  offsetof(struct tcphdr, check)
#define TCP_CHECK_END (TCP_CHECK_AT + sizeof(__be16))

/* Whether errors of this type quote a packet. Redirects are for neighbours, and never about what we sent. */
static __always_inline bool is_error(const struct packet *packet, __u8 type)
{
	if (packet->version == IP4_VERSION)
		return type == ICMP4_UNREACHABLE || type == ICMP4_TIME_EXCEEDED ||
		       type == ICMP4_PARAMETER;
	return type >= ICMP6_UNREACHABLE && type <= ICMP6_PARAMETER;
}

/* Reads a quoted IPv4 header. An error goes to the one who sent what it quotes: another receiver is a forgery. */
static __always_inline bool read_quote4(struct __sk_buff *skb, struct scratch *room)
{
	struct packet *packet = &room->packet;
	struct quote *quote = &room->quote;
	struct iphdr *ip = header(skb, packet->l4 + ICMP_SIZE, sizeof(*ip));

	if (!ip || ip->version != IP4_VERSION || ip->ihl < IP4_HEADER_MIN ||
	    ip->frag_off & bpf_htons(IP4_FRAGMENT_OFFSET) || ip->saddr != packet->flow.dst.w[3])
		return false;
	quote->l4 = ICMP_SIZE + ip->ihl * IP4_WORD;
	packet->flow.proto = ip->protocol;
	addr_set_v4(&packet->flow.src, ip->daddr);
	return true;
}

/* Reads a quoted IPv6 header; only a fragment header may follow. */
static __always_inline bool read_quote6(struct __sk_buff *skb, struct scratch *room)
{
	struct packet *packet = &room->packet;
	struct quote *quote = &room->quote;
	struct ipv6hdr *ip = header(skb, packet->l4 + ICMP_SIZE, sizeof(*ip));
	struct ip6_extension *fragment;
	struct addr src;

	if (!ip || ip->version != IP6_VERSION)
		return false;
	__builtin_memcpy(&src, &ip->saddr, sizeof(src));
	if (!addr_equal(&src, &packet->flow.dst))
		return false;
	__builtin_memcpy(&packet->flow.src, &ip->daddr, sizeof(packet->flow.src));
	packet->flow.proto = ip->nexthdr;
	quote->l4 = ICMP_SIZE + sizeof(*ip);
	if (packet->flow.proto != IPPROTO_FRAGMENT)
		return true;
	fragment = header(skb, packet->l4 + quote->l4, sizeof(*fragment));
	if (!fragment || fragment->rest & bpf_htons(IP6_FRAGMENT_OFFSET))
		return false;
	packet->flow.proto = fragment->next;
	quote->l4 += sizeof(*fragment);
	return true;
}

/* Whether the packet is an error about a flow. Its quote's flow, turned around, is in packet->flow then: as a packet
 * of the error's own direction would show it.
 */
static __always_inline bool read_error(struct __sk_buff *skb, struct scratch *room)
{
	struct packet *packet = &room->packet;
	struct quote *quote = &room->quote;
	struct icmp_header *icmp;
	struct ports *ports;

	if (!is_icmp(packet) || packet->fragment || packet->l4 + packet->l4_size > skb->len)
		return false;
	icmp = header(skb, packet->l4, sizeof(*icmp));
	if (!icmp || !is_error(packet, icmp->type))
		return false;
	quote->reporter = packet->flow.src;
	if (!(packet->version == IP4_VERSION ? read_quote4(skb, room) : read_quote6(skb, room)))
		return false;
	ports = header(skb, packet->l4 + quote->l4, 2 * sizeof(*ports));
	if (!ports || quote->l4 + 2 * sizeof(*ports) > packet->l4_size)
		return false;
	packet->flow.sport = ports->dest;
	packet->flow.dport = ports->source;
	packet->flow.pad[0] = 0;
	packet->flow.pad[1] = 0;
	packet->events = 0;
	quote->l4_size = packet->l4_size - quote->l4;
	return true;
}

/* Finds the flow of an error that came to an address of map vips, or from another node (dsr.h). */
static __always_inline enum verdict find_related(struct origin *origin, __u32 kinds,
						 struct flow **found)
{
	struct scratch *room = origin->room;
	struct packet *packet = &room->packet;
	struct flow *flow;
	bool is_new;

	if (kinds & VIP_SNAT) {
		packet->flow.dir = FLOW_REPLY;
		flow = find_flow(&packet->flow, &is_new);
		*found = flow;
		if (flow && flow->flags & FLOW_SNAT)
			return VERDICT_RELATED;
	}
	packet->flow.dir = FLOW_FORWARD;
	flow = find_flow(&packet->flow, &is_new);
	*found = flow;
	if (!origin->outer)
		return flow ? VERDICT_RELATED : VERDICT_UNKNOWN_L4;
	return flow && flow->flags & FLOW_LOCAL && addr_equal(&flow->dst, &room->outer_dst)
		       ? VERDICT_RELATED
		       : VERDICT_NOT_OURS;
}

static __always_inline bool is_echo(struct __sk_buff *skb, const struct packet *packet)
{
	struct icmp_header *icmp;

	if (!is_icmp(packet) || packet->fragment)
		return false;
	icmp = header(skb, packet->l4, sizeof(*icmp));
	return icmp && icmp->type == (packet->version == IP4_VERSION ? ICMP4_ECHO : ICMP6_ECHO) &&
	       packet->l4_size >= sizeof(*icmp);
}

/* What happens to an echo request to a VIP. The node itself answers for its own addresses; what nobody would answer is
 * dropped, as it would only wander between the routers and this node.
 */
static __always_inline enum verdict judge_echo(__u32 kinds)
{
	if (unused_port(kinds) == VERDICT_NOT_OURS)
		return VERDICT_UNKNOWN_L4;
	return kinds & VIP_PINGABLE ? VERDICT_ECHO : VERDICT_DROP_EMPTY;
}

/* Puts another 16-bit checksum at `at`, of which `change` was exchanged, and returns the change of the checksum itself. */
static __always_inline __u64 exchange_check(struct __sk_buff *skb, __u32 at, __u64 change,
					    bool is_udp, long *err)
{
	__u16 old = 0, new;

	*err |= bpf_skb_load_bytes(skb, at, &old, sizeof(old));
	/* RFC 768: 0 is "none", and a computed 0 is sent as 0xffff. */
	if (is_udp && !old)
		return 0;
	new = sum_finish((__u16)~old + change);
	if (is_udp && !new)
		new = 0xffff;
	*err |= bpf_skb_store_bytes(skb, at, &new, sizeof(new), BPF_F_RECOMPUTE_CSUM);
	return sum_exchange(0, old, new);
}

static __always_inline long write_addrs(struct __sk_buff *skb, bool is_v4, __u32 l3,
					struct addr *src, struct addr *dst)
{
	__u32 at = l3 + (is_v4 ? offsetof(struct iphdr, saddr) : offsetof(struct ipv6hdr, saddr));
	__be32 pair[2] = {src->w[3], dst->w[3]};

	if (is_v4)
		return bpf_skb_store_bytes(skb, at, pair, sizeof(pair), BPF_F_RECOMPUTE_CSUM);
	return bpf_skb_store_bytes(skb, at, src, sizeof(*src), BPF_F_RECOMPUTE_CSUM)
		       ?: bpf_skb_store_bytes(skb, at + sizeof(*src), dst, sizeof(*dst),
					      BPF_F_RECOMPUTE_CSUM);
}

/* Gives an error what its flow says, outer and inner header. False: the kernel refused, it may be half changed. */
static __always_inline bool rewrite_error(struct __sk_buff *skb, const struct scratch *room,
					  struct flow *flow)
{
	const struct packet *packet = &room->packet;
	const struct quote *quote = &room->quote;
	const struct flow_key *key = &packet->flow;
	__u32 quoted_l3 = packet->l4 + ICMP_SIZE, quoted_l4 = packet->l4 + quote->l4;
	bool is_v4 = packet->version == IP4_VERSION;
	struct ports ports = {flow->dport, flow->sport};
	struct addr shown = quote->reporter;
	__u64 outer, addrs, l4, icmp;
	long err = 0;

	if (addr_is_v4(&flow->dst) != is_v4)
		return false;
	/* A sum does not know the order: the quote has the same addresses and ports, turned around. */
	outer = sum_exchange_addr(0, &key->dst, &flow->dst);
	addrs = sum_exchange_addr(outer, &key->src, &flow->src);
	if (addr_equal(&shown, &key->src) || (flow->flags & FLOW_SNAT && key->dir == FLOW_FORWARD))
		shown = flow->src;
	else if (flow->flags & FLOW_SNAT)
		shown = key->dst;
	outer = sum_exchange_addr(outer, &quote->reporter, &shown);
	l4 = sum_exchange(sum_exchange(0, key->sport, flow->sport), key->dport, flow->dport);
	icmp = addrs + l4;
	if (key->proto == IPPROTO_UDP)
		icmp += exchange_check(skb, quoted_l4 + offsetof(struct udphdr, check), addrs + l4,
				       true, &err);
	else if (key->proto == IPPROTO_TCP && quote->l4_size >= TCP_CHECK_END)
		icmp += exchange_check(skb, quoted_l4 + TCP_CHECK_AT, addrs + l4, false, &err);
	if (is_v4) {
		icmp += exchange_check(skb, quoted_l3 + offsetof(struct iphdr, check), addrs, false,
				       &err);
		exchange_check(skb, packet->l3 + offsetof(struct iphdr, check), outer, false, &err);
	} else {
		/* The pseudo header (RFC 4443 2.3). */
		icmp += outer;
	}
	exchange_check(skb, packet->l4 + offsetof(struct icmp_header, checksum), icmp, false, &err);
	return !(err
			 ?: bpf_skb_store_bytes(skb, quoted_l4, &ports, sizeof(ports),
						BPF_F_RECOMPUTE_CSUM)
			 ?: write_addrs(skb, is_v4, quoted_l3, &flow->dst, &flow->src)
			 ?: write_addrs(skb, is_v4, packet->l3, &shown, &flow->dst));
}

/* Turns an echo request around. */
static __always_inline enum verdict echo(struct __sk_buff *skb, struct packet *packet)
{
	bool is_v4 = packet->version == IP4_VERSION;
	__u8 type = is_v4 ? 0 : ICMP6_ECHO_REPLY;
	__u32 zero = 0, at = packet->l4 + offsetof(struct icmp_header, checksum);
	struct reject *scratch = map_lookup(rejects, &zero);
	long err = 0;

	if (!scratch || !may_answer(skb, packet, scratch))
		return VERDICT_UNKNOWN_L4;
	/* Type and code are one word of the checksum; the code is 0 in both (RFC 792, RFC 4443 4.2). */
	exchange_check(skb, at,
		       sum_exchange(0, bpf_htons((is_v4 ? ICMP4_ECHO : ICMP6_ECHO) << 8),
				    bpf_htons(type << 8)),
		       false, &err);
	err |= bpf_skb_store_bytes(skb, packet->l4, &type, sizeof(type), BPF_F_RECOMPUTE_CSUM);
	err |= write_addrs(skb, is_v4, packet->l3, &packet->flow.dst, &packet->flow.src);
	if (packet->l3)
		err |= swap_macs(skb);
	if (err || !set_hops(skb, packet, REJECT_HOPS))
		return VERDICT_REWRITE_FAILED;
	return VERDICT_ECHO;
}

#endif /* EBPFPROXY_ICMP_H */

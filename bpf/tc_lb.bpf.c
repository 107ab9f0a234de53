// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * tc_lb - Services for packets that enter the node from pods and other hosts, and for the replies.
 *
 * tc_ingress sends packets to a VIP on to a backend (destination NAT), tc_egress gives replies the VIP as
 * source again. Where a reply might not come back through this node the source becomes this node's, too: both
 * directions are then translated by tc_ingress, and leave by their next hop past the kernel's routing.
 *
 * ICMP errors about a flow are translated with it (icmp.h), fragments follow their first (fragments.h).
 *
 * Limits. An SCTP association is known by its first pair of addresses: no multihoming; in fragments it keeps its port
 * or is dropped. AH can't be translated.
 */
#include "platform.h"
#include "dsr.h"
#include "icmp.h"
#include "parse.h"
#include "reject.h"
#include "rewrite.h"
#include "send.h"
#include "tunnel_error.h"

LICENSE("Dual BSD/GPL");

/* Whether the packet is larger than the route takes. What the kernel batched (GSO) it cuts again. */
static __always_inline bool exceeds(struct __sk_buff *skb, const struct packet *packet,
				    const struct flow *flow)
{
	__u32 size = ip_size(packet);

	/* At most 60 bytes of TCP header stand before each part. */
	if (skb->gso_size)
		size = packet->l4 - packet->l3 + sizeof(struct tcphdr) + skb->gso_size;
	if (!parts_shrink(skb, packet))
		size += tunnel_growth(packet, flow);
	return is_too_big(&flow->hop, size);
}

/* Why a packet can't be sent on to its next hop; VERDICT_CONTINUE: it can. */
static __always_inline enum verdict check_hop(struct __sk_buff *skb, struct scratch *room,
					      const struct flow *flow)
{
	if (room->packet.hops <= 1)
		return VERDICT_HOPS;
	room->mtu = flow->hop.mtu - tunnel_growth(&room->packet, flow);
	return exceeds(skb, &room->packet, flow) ? VERDICT_TOO_BIG : VERDICT_CONTINUE;
}

/* Turns to the packet inside, if the one outside may come from another node (dsr.h). */
static __always_inline enum verdict look_inside(struct __sk_buff *skb, struct origin *origin)
{
	struct scratch *room = origin->room;
	struct packet *packet = &room->packet;
	__u32 size = packet->l4_size;
	enum verdict verdict;

	/* The VLAN's own device sees it again. */
	if (!is_tunnelled(packet) || skb->vlan_present)
		return VERDICT_CONTINUE;
	room->outer_src = packet->flow.src;
	room->outer_dst = packet->flow.dst;
	origin->outer = packet->l4 - packet->l3;
	packet->l3 = packet->l4;
	verdict = packet->version == IP4_VERSION ? parse_ip4(skb, packet) : parse_ip6(skb, packet);
	return verdict || ip_size(packet) > size ? VERDICT_NOT_OURS : VERDICT_CONTINUE;
}

/* A fragment whose first is not known. The node's own traffic is put together by the stack; on its way to a VIP the
 * fragment would only wander between the routers and this node.
 */
static __always_inline enum verdict judge_early(struct scratch *room, __u32 kinds)
{
	if (unused_port(kinds) != VERDICT_NOT_OURS)
		room->action = TC_ACT_SHOT;
	return VERDICT_FRAGMENT_EARLY;
}

static __always_inline enum verdict find(struct __sk_buff *skb, struct origin *origin, __u64 now,
					 struct flow **flow)
{
	struct scratch *room = origin->room;
	struct packet *packet = &room->packet;
	enum verdict verdict;
	struct vip *vip;
	__u32 kinds = 0;

	verdict = forget_path(room, parse_addresses(skb, packet));
	verdict = forget_path(room, verdict ?: look_inside(skb, origin));
	if (verdict)
		return verdict;
	if (!origin->outer) {
		vip = map_lookup(vips, &packet->flow.dst);
		if (!vip)
			return VERDICT_NOT_OURS;
		kinds = vip->kinds;
	}
	kinds = forget(room, kinds);
	origin->outer = forget(room, origin->outer);
	verdict = forget_path(room, parse_ports(skb, packet));
	if (verdict == VERDICT_UNKNOWN_L4 && read_error(skb, room))
		return is_tunnel_error(packet, kinds) ? open_tunnel_error(skb, room)
						      : find_related(origin, kinds, flow);
	if (verdict && origin->outer)
		return VERDICT_NOT_OURS;
	if (verdict == VERDICT_UNKNOWN_L4 && is_echo(skb, packet))
		return judge_echo(kinds);
	if (verdict == VERDICT_FRAGMENT)
		return judge_early(room, kinds);
	if (verdict)
		return verdict;
	if (packet->fragment == FRAGMENT_FIRST)
		note_first(packet, now);
	return origin->outer ? track_received(origin, now, flow) : track(origin, kinds, now, flow);
}

/* Translates a packet. room->action: what to do with it, where that is not the next filter's matter. */
static __always_inline enum verdict translate(struct __sk_buff *skb, struct scratch *room)
{
	/* The VLAN's own device sees a tagged packet again, and knows the routes there. */
	struct origin origin = {
		.ctx = skb,
		.room = room,
		.device = skb->ifindex,
		.can_forward = !skb->vlan_present,
	};
	struct packet *packet = &room->packet;
	__u64 now = now_ns();
	bool is_forwarded = false;
	struct flow *flow = NULL;
	enum verdict verdict, problem;

	verdict = forget_path(room, find(skb, &origin, now, &flow));
	if (!flow || !(is_translated(verdict) || verdict == VERDICT_RELATED))
		return verdict;
	if (flow->flags & (FLOW_SNAT | FLOW_DSR))
		renew_hop(&origin, flow, now);
	if (is_translated(verdict) && verdict != VERDICT_NEW)
		count_packet(packet, flow);
	/* One place for entries of every map: for the verifier they are one then, and what follows is walked once. */
	room->flow = *flow;
	flow = &room->flow;
	origin.is_renewed = forget(room, origin.is_renewed);
	verdict = forget_path(room, verdict);
	if (flow->flags & (FLOW_SNAT | FLOW_DSR)) {
		is_forwarded = flow->hop.kind != HOP_HERE;
		if (!is_forwarded && flow->flags & FLOW_DSR)
			return VERDICT_NO_ROUTE;
		problem = is_forwarded ? check_hop(skb, room, flow) : VERDICT_CONTINUE;
		/* Who sent the packet inside of another is not asked to send less. */
		if (problem)
			return origin.outer ? VERDICT_NO_ROUTE : problem;
	}
	is_forwarded = forget(room, is_forwarded);
	if (origin.outer && !unwrap(skb, packet, origin.outer))
		return VERDICT_REWRITE_FAILED;
	/* To a backend of FLOW_DSR the packet goes as it is; the node there translates it. */
	if (!(flow->flags & FLOW_DSR) &&
	    !(verdict == VERDICT_RELATED ? rewrite_error(skb, room, flow)
					 : rewrite(skb, room, flow)))
		return VERDICT_REWRITE_FAILED;
	if (!is_forwarded)
		return verdict;
	if (!take_hop(skb, packet))
		return VERDICT_REWRITE_FAILED;
	if (flow->flags & FLOW_DSR && !wrap(skb, packet, flow))
		return VERDICT_REWRITE_FAILED;
	room->action = send_on(skb, packet, &flow->hop, origin.is_renewed);
	return room->action == TC_ACT_SHOT ? VERDICT_REWRITE_FAILED : verdict;
}

static __always_inline enum verdict restore(struct __sk_buff *skb, struct scratch *room)
{
	struct packet *packet = &room->packet;
	struct flow *flow;
	enum verdict verdict;
	bool is_new, is_related = false;

	verdict = forget_path(room, parse_addresses(skb, packet) ?: parse_ports(skb, packet));
	if (verdict == VERDICT_UNKNOWN_L4)
		is_related = read_error(skb, room);
	if (verdict && !is_related)
		return verdict;
	packet->flow.dir = FLOW_REPLY;
	flow = find_flow(&packet->flow, &is_new);
	/* Of a translated source the reply came in by tc_ingress. */
	if (!flow || flow->flags & FLOW_SNAT)
		return verdict ?: VERDICT_NOT_OURS;
	if (is_related)
		return rewrite_error(skb, room, flow) ? VERDICT_RELATED : VERDICT_REWRITE_FAILED;
	if (packet->fragment == FRAGMENT_FIRST)
		note_first(packet, now_ns());
	if (is_bypass(packet, flow)) {
		remove_flow(room, flow);
		return VERDICT_NOT_OURS;
	}
	note_packet(room, flow, is_new, now_ns());
	count_packet(packet, flow);
	return rewrite(skb, room, flow) ? VERDICT_REPLY : VERDICT_REWRITE_FAILED;
}

/* Ends a program. Pass means "next": filters of others behind ours see the packet too. What SCTP needs comes when
 * nothing else is left to be known: for the verifier every path is the same here.
 */
static __always_inline int tc_exit(struct __sk_buff *skb, struct scratch *room,
				   enum verdict verdict)
{
	count(verdict, skb->len);
	if (room->action == TC_ACT_UNSPEC && is_refusal(verdict))
		room->action = TC_ACT_SHOT;
	barrier();
	if (room->sctp_change && !finish_sctp(skb, room))
		return TC_ACT_SHOT;
	return room->action;
}

/* The action that sends an answer out of the device that it came through. A device without MAC headers needs none. One
 * that has them, where generic XDP hid this packet's (tunnel.h), gets one of the kernel's making: such devices are in
 * map xdp_devices, and they need a route back.
 */
static __always_inline int send_back(struct __sk_buff *skb, struct packet *packet)
{
	__u32 device = skb->ifindex;

	if (packet->l3 || !map_lookup(xdp_devices, &device))
		return bpf_redirect(device, 0);
	return add_ethernet(skb, packet) ? TC_ACT_SHOT : bpf_redirect_neigh(device, NULL, 0, 0);
}

SEC("tc")
int tc_ingress(struct __sk_buff *skb)
{
	struct scratch *room = get_scratch();
	bool is_answer = false;
	enum verdict verdict;

	if (!room)
		return TC_ACT_UNSPEC;
	room->action = TC_ACT_UNSPEC;
	room->sctp_change = 0;
	verdict = forget_path(room, translate(skb, room));
	if (verdict == VERDICT_ECHO) {
		verdict = echo(skb, &room->packet);
		is_answer = verdict == VERDICT_ECHO;
	} else if (is_rejection(verdict) || is_stuck(verdict)) {
		verdict = answer(skb, room, verdict, &is_answer);
	}
	if (is_answer)
		room->action = send_back(skb, &room->packet);
	return tc_exit(skb, room, verdict);
}

SEC("tc")
int tc_egress(struct __sk_buff *skb)
{
	struct scratch *room = get_scratch();

	if (!room)
		return TC_ACT_UNSPEC;
	room->action = TC_ACT_UNSPEC;
	room->sctp_change = 0;
	return tc_exit(skb, room, forget_path(room, restore(skb, room)));
}

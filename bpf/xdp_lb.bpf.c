// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * xdp_lb - Services for clients outside, before the kernel allocates a packet.
 *
 * It does what tc_lb does, with the same maps and the same code, for the frequent and simple frames: select,
 * translate, send on to the next hop; or translate and pass, where the backend is on this node (tc_egress gives the
 * replies the VIP back). What it can't do is passed untouched, and tc_lb does it: answers, ICMP, fragments, SCTP,
 * tags, options, next hops whose neighbour has to be found. So XDP is speed alone, and may be off.
 */
#include "platform.h"
#include "dsr.h"
#include "frame.h"
#include "tunnel_frame.h"

LICENSE("Dual BSD/GPL");

/* Translates and sends on. VERDICT_CONTINUE: nothing was done, for tc. */
static __always_inline enum verdict forward(struct xdp_md *ctx, struct origin *origin,
					    struct flow *flow, enum verdict verdict, __u64 now,
					    int *action)
{
	const struct packet *packet = &origin->room->packet;
	struct next_hop *hop = &flow->hop;

	renew_hop(origin, flow, now);
	if (!xdp_can_send(origin, packet, flow) || hop_is_aged(hop, now))
		return VERDICT_CONTINUE;
	if (!(flow->flags & FLOW_DSR ? wrap_frame(ctx, packet, flow)
				     : write_frame(ctx, packet, flow, true)))
		return VERDICT_CONTINUE;
	write_macs(ctx, hop);
	if (verdict != VERDICT_NEW)
		count_packet(packet, flow);
	*action = hop->device == origin->device ? XDP_TX : bpf_redirect(hop->device, 0);
	return verdict;
}

static __always_inline enum verdict find(struct xdp_md *ctx, struct origin *origin, __u64 *now,
					 struct flow **flow)
{
	struct scratch *room = origin->room;
	struct packet *packet = &room->packet;
	void *l4 = read_addresses(ctx, packet);
	__u32 size = packet->l4_size;
	struct vip *vip;

	if (!l4)
		return VERDICT_CONTINUE;
	if (is_tunnelled(packet)) {
		room->outer_src = packet->flow.src;
		room->outer_dst = packet->flow.dst;
		origin->outer = tunnel_size(packet->version);
		l4 = read_inside(ctx, packet);
		if (!l4 || ip_size(packet) > size || !read_ports(ctx, packet, l4))
			return VERDICT_CONTINUE;
		*now = now_ns();
		return track_received(origin, *now, flow);
	}
	vip = map_lookup(vips, &packet->flow.dst);
	if (!vip || !read_ports(ctx, packet, l4))
		return VERDICT_CONTINUE;
	*now = now_ns();
	return track(origin, vip->kinds, *now, flow);
}

static __always_inline enum verdict translate(struct xdp_md *ctx, struct scratch *room, int *action)
{
	struct origin origin = {
		.ctx = ctx,
		.room = room,
		.device = ctx->ingress_ifindex,
		.is_xdp = true,
		.can_forward = true,
	};
	struct packet *packet = &room->packet;
	struct flow *flow = NULL;
	enum verdict verdict;
	__u64 now = 0;

	verdict = find(ctx, &origin, &now, &flow);
	if (!is_translated(verdict) || !flow)
		return is_refusal(verdict) && !is_rejection(verdict) ? verdict : VERDICT_CONTINUE;
	if (flow->flags & (FLOW_SNAT | FLOW_DSR))
		return forward(ctx, &origin, flow, verdict, now, action);
	if (origin.outer && !unwrap_frame(ctx, packet, origin.outer))
		return VERDICT_CONTINUE;
	if (!write_frame(ctx, packet, flow, false))
		return VERDICT_CONTINUE;
	if (verdict != VERDICT_NEW)
		count_packet(packet, flow);
	return verdict;
}

/* What is left to tc is counted there. */
SEC("xdp")
int xdp_lb(struct xdp_md *ctx)
{
	struct scratch *room = get_scratch();
	enum verdict verdict = VERDICT_CONTINUE;
	int action = XDP_PASS;
	__u64 start, end;

	if (room)
		verdict = translate(ctx, room, &action);
	if (verdict == VERDICT_CONTINUE)
		return XDP_PASS;
	/* Half of a pointer can't be put aside, and they are pointers until they are numbers. */
	start = ctx->data;
	end = ctx->data_end;
	barrier_var(start);
	barrier_var(end);
	count(verdict, end - start);
	return is_refusal(verdict) ? XDP_DROP : action;
}

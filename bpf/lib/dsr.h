/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * dsr.h - the far end of FLOW_DSR: a packet that another node encapsulated and sent to a backend of this one.
 *
 * The other node chose the backend; here both directions of the flow are remembered, so that tc_egress gives the
 * replies the VIP as source. Nobody says which hosts are nodes. So only that is taken out of its tunnel which
 * is for a backend here, of a Service that is forwarded so; what it could do it could do without a tunnel.
 */
#ifndef EBPFPROXY_DSR_H
#define EBPFPROXY_DSR_H

#include "track.h"

/* The Service that the other node found. Of a NodePort the destination is the other node's address. */
static __always_inline struct service *find_sent_service(const struct flow_key *key)
{
	struct vip *vip = map_lookup(vips, &key->dst);

	return find_service((vip ? vip->kinds : 0) | VIP_NODE, &key->dst, key->dport, key->proto,
			    SCOPE_EXTERNAL);
}

static __always_inline enum verdict begin_received(struct origin *origin, __u64 now,
						   struct flow **begun)
{
	struct scratch *room = origin->room;
	const struct flow_key *key = &room->packet.flow;
	struct dsr_backend_key sent = {.address = room->outer_dst};
	struct backend *backend;
	struct service *service;
	enum verdict verdict;
	__u32 *id;

	service = find_sent_service(key);
	/* Pods don't encapsulate. A hairpin is never sent so, as it needs its source translated. */
	if (!service || source_kinds(&room->outer_src) || addr_equal(&key->src, &room->outer_dst))
		return VERDICT_NOT_OURS;
	sent.service = service->id;
	id = map_lookup(dsr_backends, &sent);
	backend = id ? map_lookup(backends, id) : NULL;
	if (!backend || !is_same_backend(backend, service->id, &room->outer_dst, backend->port))
		return VERDICT_NOT_OURS;
	if (service->flags & SERVICE_SOURCE_RANGES && !in_source_ranges(service->id, &key->src))
		return refuse(origin, service, VERDICT_DROP_SOURCE);
	verdict = make_flow(origin, service, backend, *id, true, now);
	if (verdict)
		return refuse(origin, service, verdict);
	room->flow.flags |= FLOW_DSR_IN;
	verdict = forget_path(room, add_flow());
	if (verdict)
		return refuse(origin, service, verdict);
	open_backend(room->flow.service, room->flow.backend);
	*begun = &room->flow;
	return VERDICT_NEW;
}

/* As track(), for the inner packet. It may go on a flow that began through this node itself. */
static __always_inline enum verdict track_received(struct origin *origin, __u64 now,
						   struct flow **found)
{
	struct scratch *room = origin->room;
	struct flow *flow;
	bool is_new;

	room->packet.flow.dir = FLOW_FORWARD;
	flow = find_flow(&room->packet.flow, &is_new);
	if (flow && flow->flags & FLOW_LOCAL && addr_equal(&flow->dst, &room->outer_dst) &&
	    !is_over(&room->packet, flow, now)) {
		*found = go_on(origin, flow, is_new, now);
		return VERDICT_ESTABLISHED;
	}
	if (flow)
		remove_flow(room, flow);
	return begin_received(origin, now, found);
}

#endif /* EBPFPROXY_DSR_H */

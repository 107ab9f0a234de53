/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * track.h - from a packet to its flow: known, or begun here. The same for XDP and tc; nothing of the packet itself
 * is read or written.
 */
#ifndef EBPFPROXY_TRACK_H
#define EBPFPROXY_TRACK_H

#include "ipip.h"
#include "snat.h"
#include "verdict.h"

/* A packet in the middle of a TCP or SCTP connection that we don't know: only maglev finds its backend again,
 * as every node and every restart computes the same table.
 */
static __always_inline bool may_begin(const struct packet *packet, const struct service *service)
{
	if (packet->flow.proto == IPPROTO_UDP || packet->events & EVENT_OPEN)
		return true;
	return service->scheduler == SCHED_MAGLEV && !packet->events;
}

/* What XDP can't answer goes to tc, and is counted there. */
static __always_inline enum verdict refuse(struct origin *origin, const struct service *service,
					   enum verdict verdict)
{
	if (!origin->is_xdp || !is_rejection(verdict))
		count_refused(service->id);
	return verdict;
}

/* Whether XDP itself can send a packet of this size and TTL on. */
static __always_inline bool xdp_can_send(struct origin *origin, const struct packet *packet,
					 const struct flow *flow)
{
	const struct next_hop *hop = &flow->hop;

	return hop->kind == HOP_FORWARD && (hop->is_xdp || hop->device == origin->device) &&
	       !is_too_big(hop, ip_size(packet) + tunnel_growth(packet, flow)) && packet->hops > 1;
}

/* Fills the forward value of a new flow to `backend`. */
static __always_inline enum verdict make_flow(struct origin *origin, const struct service *service,
					      const struct backend *backend, __u32 id, bool is_own,
					      __u64 now)
{
	const struct packet *packet = &origin->room->packet;
	struct flow *flow = &origin->room->flow;
	const struct flow_key *key = &packet->flow;
	struct backend_hop *way;
	bool is_counted = true, is_dsr = needs_dsr(service, backend, &key->src, is_own);

	__builtin_memset(flow, 0, sizeof(*flow));
	flow->src = key->src;
	flow->sport = key->sport;
	flow->dst = backend->address;
	flow->dport = backend->port;
	flow->service = service->id;
	flow->backend = id;
	flow->last_seen_ns = now;
	flow->syn_tries = origin->except ? origin->syn_tries : service->syn_tries;
	if (backend->flags & BACKEND_LOCAL)
		flow->flags = FLOW_LOCAL;
	if (service->flags & SERVICE_EJECTS)
		flow->flags |= FLOW_WATCHED;
	if (is_dsr || needs_snat(service, backend, &key->src, is_own)) {
		if (!origin->can_forward)
			return VERDICT_NOT_OURS;
		way = backend_way(origin, id, &key->src, &backend->address, now);
		if (!way)
			return VERDICT_NO_ROUTE;
		/* Here: it comes back for sure, or the kernel tells the client that there is no way. */
		if (way->hop.kind != HOP_HERE) {
			if (addr_is_any(&way->source))
				return VERDICT_SNAT_FULL;
			flow->flags |= is_dsr ? FLOW_DSR : FLOW_SNAT;
			/* Whether it is answered can't be seen from here. */
			if (is_dsr)
				flow->syn_tries = 0;
			flow->src = way->source;
			flow->hop = way->hop;
			is_counted = !origin->is_xdp || xdp_can_send(origin, packet, flow);
		}
	}
	/* What XDP does not send itself is counted by tc. */
	if (is_counted)
		count_packet(packet, flow);
	return VERDICT_CONTINUE;
}

/* Finds a backend for a new flow and remembers both. VERDICT_NEW: *begun is a copy of its forward value. */
static __always_inline enum verdict begin_flow(struct origin *origin, __u32 kinds, __u64 now,
					       struct flow **begun)
{
	struct scratch *room = origin->room;
	const struct packet *packet = &room->packet;
	struct request request = {
		.flow = packet->flow, .except = origin->except, .client_kind = CLIENT_ADDR};
	const struct flow_key *key = &packet->flow;
	struct backend *backend;
	struct service *service;
	enum verdict verdict;
	__u32 id, source;

	source = source_kinds(&key->src);
	service = find_service(kinds, &key->dst, key->dport, key->proto,
			       source & SOURCE_LOCAL ? SCOPE_INTERNAL : SCOPE_EXTERNAL);
	if (!service)
		return unused_port(kinds);
	if (!may_begin(packet, service))
		return VERDICT_NOT_OURS;
	if (service->flags & SERVICE_SOURCE_RANGES && !in_source_ranges(service->id, &key->src))
		return refuse(origin, service, VERDICT_DROP_SOURCE);
	id = select_backend(service, &request, now);
	backend = map_lookup(backends, &id);
	if (!id || !backend)
		return refuse(origin, service,
			      service->flags & SERVICE_DROP_EMPTY ? VERDICT_DROP_EMPTY
								  : VERDICT_REJECT_EMPTY);
	verdict = make_flow(origin, service, backend, id, source & SOURCE_OWN, now) ?: add_flow();
	if (verdict == VERDICT_NOT_OURS)
		return verdict;
	if (verdict)
		return refuse(origin, service, verdict);
	open_backend(room->flow.service, id);
	*begun = &room->flow;
	return VERDICT_NEW;
}

/* Notes a packet of a known flow. Returns the flow's entry, where it is now. */
static __always_inline struct flow *go_on(struct origin *origin, struct flow *flow, bool is_new,
					  __u64 now)
{
	note_packet(origin->room, flow, is_new, now);
	return is_new && is_established(&origin->room->packet, flow) ? establish(origin->room, flow)
								     : flow;
}

/* Notes that a backend did not answer: another one is chosen now. */
static __always_inline void retry(struct origin *origin, const struct flow *flow, __u64 now)
{
	struct service_stats *stats = map_lookup(service_stats, &flow->service);

	origin->except = flow->backend;
	origin->syn_tries = flow->syn_tries - 1;
	if (stats)
		atomic_add(&stats->retried, 1);
	if (flow->flags & FLOW_WATCHED)
		note_failure(flow->service, flow->backend, now);
}

/* Finds the flow of a packet to an address of map vips, or begins one. VERDICT_NEW, VERDICT_ESTABLISHED,
 * VERDICT_REPLY (of a translated source): *found says how to translate it, and packet->flow.dir which way it goes.
 */
static __always_inline enum verdict track(struct origin *origin, __u32 kinds, __u64 now,
					  struct flow **found)
{
	struct packet *packet = &origin->room->packet;
	struct flow *flow;
	bool is_new;

	if (kinds & VIP_SNAT && is_snat_port(packet)) {
		packet->flow.dir = FLOW_REPLY;
		flow = find_flow(&packet->flow, &is_new);
		if (flow && flow->flags & FLOW_SNAT) {
			note_packet(origin->room, flow, is_new, now);
			*found = flow;
			return VERDICT_REPLY;
		}
	}
	packet->flow.dir = FLOW_FORWARD;
	if (kinds && !may_serve(kinds, packet->flow.dport))
		return VERDICT_NOT_OURS;
	flow = find_flow(&packet->flow, &is_new);
	if (flow && !is_over(packet, flow, now)) {
		if (!is_new || !is_unanswered(packet, flow, now)) {
			*found = go_on(origin, flow, is_new, now);
			return VERDICT_ESTABLISHED;
		}
		retry(origin, flow, now);
	}
	if (flow)
		remove_flow(origin->room, flow);
	return begin_flow(origin, kinds, now, found);
}

#endif /* EBPFPROXY_TRACK_H */

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * conntrack.h - the memory of translated flows: two entries a flow, one for each direction.
 *
 *	new_flows	from the first packet until the client has answered the backend. The oldest are forgotten
 *			when it is full: a flood of openings pushes out other openings only.
 *	conntrack	from then on. It forgets nothing by itself; full, flows stay among the new ones.
 *
 * FLOW_DSR has one entry only: its replies don't pass here. Else the two are twins: each can be computed from the other, so what was evicted or deleted from one side
 * is made again by the next packet of the other, at the once-a-second touch.
 */
#ifndef EBPFPROXY_CONNTRACK_H
#define EBPFPROXY_CONNTRACK_H

#include "packet.h"
#include "select.h"

/* A SYN is sent again for at most 127 s (tcp_syn_retries 6: 1 + 2 + ... + 64); after more silence it is a new one. */
#define SYN_RETRY_NS (128 * NSEC_PER_SEC)

/* last_seen_ns is written at most so often: a write makes other CPUs' copy of the line void. */
#define TOUCH_NS NSEC_PER_SEC

#define FLOW_FIN_BOTH (FLOW_FIN_FORWARD | FLOW_FIN_REPLY)

static __always_inline bool is_closed(__u8 state)
{
	return state & FLOW_RESET || (state & FLOW_FIN_BOTH) == FLOW_FIN_BOTH;
}

/* Makes the key of the other direction of an entry. */
static __always_inline void make_twin_key(const struct flow_key *key, const struct flow *flow,
					  struct flow_key *twin_key)
{
	twin_key->src = flow->dst;
	twin_key->dst = flow->src;
	twin_key->sport = flow->dport;
	twin_key->dport = flow->sport;
	twin_key->proto = key->proto;
	twin_key->dir = key->dir == FLOW_FORWARD ? FLOW_REPLY : FLOW_FORWARD;
	twin_key->pad[0] = 0;
	twin_key->pad[1] = 0;
}

/* Makes the value of the other direction of an entry: nothing counted, next hop not known. */
static __always_inline void make_twin(const struct flow_key *key, const struct flow *flow,
				      struct flow *twin)
{
	__builtin_memset(twin, 0, sizeof(*twin));
	twin->src = key->dst;
	twin->dst = key->src;
	twin->sport = key->dport;
	twin->dport = key->sport;
	twin->state = flow->state;
	twin->flags = flow->flags;
	twin->service = flow->service;
	twin->backend = flow->backend;
	twin->last_seen_ns = flow->last_seen_ns;
}

static __always_inline bool is_twin(const struct flow_key *key, const struct flow *twin)
{
	return twin->sport == key->dport && twin->dport == key->sport &&
	       addr_equal(&twin->src, &key->dst) && addr_equal(&twin->dst, &key->src);
}

static __always_inline struct flow *find_flow(const struct flow_key *key, bool *is_new)
{
	struct flow *flow = map_lookup(conntrack, key);

	*is_new = !flow;
	return flow ?: map_lookup(new_flows, key);
}

static __always_inline bool has_twin(const struct flow *flow)
{
	return !(flow->flags & FLOW_DSR);
}

static __always_inline void delete_flow(const struct flow_key *key)
{
	if (map_delete(conntrack, key))
		map_delete(new_flows, key);
}

/* What a packet says of a flow whose replies don't pass here. The client goes on: it was answered. It ends: the
 * backend's end is not seen, as in IPVS (ip_vs_proto_tcp.c, input only).
 */
static __always_inline __u8 one_way_bits(const struct packet *packet)
{
	if (packet->events & EVENT_RESET)
		return FLOW_RESET;
	if (packet->events & EVENT_FIN)
		return FLOW_REPLIED | FLOW_FIN_BOTH;
	return packet->events & EVENT_OPEN ? 0 : FLOW_REPLIED;
}

static __always_inline __u8 state_bits(const struct packet *packet, const struct flow *flow)
{
	bool is_forward = packet->flow.dir == FLOW_FORWARD;
	__u8 bits = is_forward ? 0 : FLOW_REPLIED;

	if (!has_twin(flow))
		return one_way_bits(packet);
	if (packet->events & EVENT_FIN)
		bits |= is_forward ? FLOW_FIN_FORWARD : FLOW_FIN_REPLY;
	if (packet->events & EVENT_RESET)
		bits |= FLOW_RESET;
	return bits;
}

/* Adds what a flow counted to the stats of its backend and service. */
static __always_inline void add_counts(const struct packet *packet, struct flow *flow)
{
	struct backend_stats *of_backend = map_lookup(backend_stats, &flow->backend);
	struct service_stats *of_service = map_lookup(service_stats, &flow->service);
	__u64 packets = flow->packets, bytes = flow->octets;

	flow->packets = 0;
	flow->octets = 0;
	if (!of_backend || !of_service)
		return;
	if (packet->flow.dir == FLOW_FORWARD) {
		atomic_add(&of_backend->packets, packets);
		atomic_add(&of_backend->octets, bytes);
		atomic_add(&of_service->packets, packets);
		atomic_add(&of_service->octets, bytes);
	} else {
		atomic_add(&of_backend->reply_packets, packets);
		atomic_add(&of_backend->reply_octets, bytes);
		atomic_add(&of_service->reply_packets, packets);
		atomic_add(&of_service->reply_octets, bytes);
	}
}

/* Counts a packet that is sent on. */
static __always_inline void count_packet(const struct packet *packet, struct flow *flow)
{
	flow->packets += packet->count;
	flow->octets += ip_size(packet);
}

/* Notes a packet of a known flow, in both entries. Whoever sends it on counts it. Two CPUs that see the two last FINs of a flow at the same
 * instant may count its end twice or never; the agent's recount mends that.
 */
static __always_inline void note_packet(struct scratch *room, struct flow *flow, bool is_new,
					__u64 now)
{
	const struct packet *packet = &room->packet;
	const struct flow_key *key = &packet->flow;
	__u8 before = flow->state, after = before | state_bits(packet, flow);
	struct flow *twin;

	if (after == before && since(flow->last_seen_ns, now) < (__s64)TOUCH_NS)
		return;
	flow->state = after;
	flow->last_seen_ns = now;
	add_counts(packet, flow);
	if (is_closed(after) && !is_closed(before))
		close_backend(flow->backend);
	if (flow->flags & FLOW_WATCHED && !(before & FLOW_REPLIED) && after & FLOW_REPLIED) {
		if (packet->events & EVENT_RESET)
			note_failure(flow->service, flow->backend, now);
		else
			note_success(flow->backend);
	}
	if (!has_twin(flow))
		return;
	make_twin_key(key, flow, &room->twin_key);
	twin = is_new ? map_lookup(new_flows, &room->twin_key)
		      : map_lookup(conntrack, &room->twin_key);
	if (!twin) {
		make_twin(key, flow, &room->twin);
		if (is_new)
			map_update(new_flows, &room->twin_key, &room->twin, BPF_NOEXIST);
		else
			map_update(conntrack, &room->twin_key, &room->twin, BPF_NOEXIST);
	} else if (is_twin(key, twin)) {
		twin->state |= after;
		twin->last_seen_ns = now;
	}
}

/* Moves both entries of a flow among the established ones. Returns where the packet's is now. */
static __always_inline struct flow *establish(struct scratch *room, struct flow *flow)
{
	const struct flow_key *key = &room->packet.flow;
	struct flow *twin, *moved;

	make_twin_key(key, flow, &room->twin_key);
	twin = map_lookup(new_flows, &room->twin_key);
	if (!twin || !is_twin(key, twin)) {
		make_twin(key, flow, &room->twin);
		twin = &room->twin;
	}
	if (has_twin(flow) && map_update(conntrack, &room->twin_key, twin, BPF_ANY))
		return flow;
	if (map_update(conntrack, key, flow, BPF_ANY)) {
		map_delete(conntrack, &room->twin_key);
		return flow;
	}
	moved = map_lookup(conntrack, key);
	if (!moved)
		return flow;
	map_delete(new_flows, &room->twin_key);
	map_delete(new_flows, key);
	return moved;
}

/* Whether a packet of a new flow shows that both ends are there: the client answers what the backend said. */
static __always_inline bool is_established(const struct packet *packet, const struct flow *flow)
{
	return packet->flow.dir == FLOW_FORWARD && flow->state & FLOW_REPLIED &&
	       !(packet->events & (EVENT_OPEN | EVENT_RESET));
}

/* Whether the packet begins a new flow although an entry is there. */
static __always_inline bool is_over(const struct packet *packet, const struct flow *flow, __u64 now)
{
	__u32 id = flow->backend;
	__s64 idle_ns = since(flow->last_seen_ns, now);
	struct backend *backend;

	if (packet->flow.proto == IPPROTO_UDP) {
		if (idle_ns >= (__s64)config.udp_idle_ns)
			return true;
	} else {
		if (!(packet->events & EVENT_OPEN))
			return false;
		if (flow->state & (FLOW_FIN_BOTH | FLOW_RESET) || idle_ns >= (__s64)SYN_RETRY_NS)
			return true;
	}
	backend = map_lookup(backends, &id);
	return !backend || !is_serving(backend) ||
	       !is_same_backend(backend, flow->service, &flow->dst, flow->dport);
}

/* A client sends its SYN again after a second or more (RFC 6298 2.1); what comes sooner is the network's copy. */
#define SYN_AGAIN_NS (NSEC_PER_SEC / 2)

/* Whether the packet opens again what the backend did not answer, and another backend may be asked. */
static __always_inline bool is_unanswered(const struct packet *packet, const struct flow *flow,
					  __u64 now)
{
	return flow->syn_tries && packet->events & EVENT_OPEN &&
	       !(flow->state & (FLOW_REPLIED | FLOW_RESET)) &&
	       since(flow->last_seen_ns, now) >= (__s64)SYN_AGAIN_NS;
}

/* The end of a flow that another one replaces. */
static __always_inline void end_flow(struct flow *flow)
{
	if (is_closed(flow->state))
		return;
	flow->state |= FLOW_RESET;
	close_backend(flow->backend);
}

/* Whether a backend's answer belongs to another connection than the entry: it accepts, and the flow through the
 * VIP is at its end. The client went past the VIP, with a port that once went through it.
 */
static __always_inline bool is_bypass(const struct packet *packet, const struct flow *flow)
{
	return packet->events & EVENT_ACCEPT && flow->state & (FLOW_FIN_BOTH | FLOW_RESET);
}

/* Removes a flow of which one entry was found. */
static __always_inline void remove_flow(struct scratch *room, struct flow *flow)
{
	end_flow(flow);
	if (has_twin(flow)) {
		make_twin_key(&room->packet.flow, flow, &room->twin_key);
		delete_flow(&room->twin_key);
	}
	delete_flow(&room->packet.flow);
}

#endif /* EBPFPROXY_CONNTRACK_H */

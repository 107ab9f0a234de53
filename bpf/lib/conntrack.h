/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * conntrack.h - the memory of translated flows: map conntrack, two entries a flow, one for each direction.
 *
 * The two are twins: each can be computed from the other, so what the LRU evicts from one side is made
 * again by the next packet of the other, at the once-a-second touch.
 */
#ifndef EBPFPROXY_CONNTRACK_H
#define EBPFPROXY_CONNTRACK_H

#include "parse.h"
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

/* Makes the other direction's key and value of an entry. */
static __always_inline void make_twin(const struct flow_key *key, const struct flow *flow,
				      struct flow_key *twin_key, struct flow *twin)
{
	bool is_forward = key->dir == FLOW_FORWARD;

	__builtin_memset(twin_key, 0, sizeof(*twin_key));
	*twin = *flow;
	twin_key->proto = key->proto;
	if (is_forward) {
		twin_key->dir = FLOW_REPLY;
		twin_key->src = flow->addr;
		twin_key->sport = flow->port;
		twin_key->dst = key->src;
		twin_key->dport = key->sport;
		twin->addr = key->dst;
		twin->port = key->dport;
	} else {
		twin_key->dir = FLOW_FORWARD;
		twin_key->src = key->dst;
		twin_key->sport = key->dport;
		twin_key->dst = flow->addr;
		twin_key->dport = flow->port;
		twin->addr = key->src;
		twin->port = key->sport;
	}
}

/* Remembers a new flow; `flow` is its forward value. A full map forgets the flow that was silent longest. */
static __always_inline enum verdict add_flow(const struct flow_key *key, const struct flow *flow)
{
	struct flow_key twin_key;
	struct flow twin;

	make_twin(key, flow, &twin_key, &twin);
	/* Where another VIP led the same client port to the same backend, the newer flow gets the replies. */
	if (map_update(conntrack, &twin_key, &twin, BPF_ANY))
		return VERDICT_MAP_FULL;
	if (map_update(conntrack, key, flow, BPF_ANY)) {
		map_delete(conntrack, &twin_key);
		return VERDICT_MAP_FULL;
	}
	return VERDICT_CONTINUE;
}

static __always_inline __u8 state_bits(const struct packet *packet)
{
	bool is_forward = packet->flow.dir == FLOW_FORWARD;
	__u8 bits = is_forward ? 0 : FLOW_REPLIED;

	if (packet->events & EVENT_FIN)
		bits |= is_forward ? FLOW_FIN_FORWARD : FLOW_FIN_REPLY;
	if (packet->events & EVENT_RESET)
		bits |= FLOW_RESET;
	return bits;
}

/* Notes a packet of a known flow, in both entries. Two CPUs that see the two last FINs of a flow at the same
 * instant may count its end twice or never; the agent's recount mends that.
 */
static __always_inline void note_packet(const struct packet *packet, struct flow *flow, __u64 now)
{
	struct flow_key twin_key;
	struct flow twin, *known;
	__u8 before = flow->state, after = before | state_bits(packet);

	if (after == before && now - flow->last_seen_ns < TOUCH_NS)
		return;
	flow->state = after;
	flow->last_seen_ns = now;
	make_twin(&packet->flow, flow, &twin_key, &twin);
	known = map_lookup(conntrack, &twin_key);
	if (!known) {
		map_update(conntrack, &twin_key, &twin, BPF_NOEXIST);
	} else if (known->port == twin.port && addr_equal(&known->addr, &twin.addr)) {
		known->state |= after;
		known->last_seen_ns = now;
	}
	if (is_closed(after) && !is_closed(before))
		close_backend(flow->backend);
}

/* Whether the packet begins a new flow although an entry is there. */
static __always_inline bool is_over(const struct packet *packet, const struct flow *flow, __u64 now)
{
	__u32 id = flow->backend;
	__u64 idle_ns = now - flow->last_seen_ns;
	struct backend *backend;

	if (packet->flow.proto == IPPROTO_UDP) {
		if (idle_ns >= config.udp_idle_ns)
			return true;
	} else {
		if (!(packet->events & EVENT_OPEN))
			return false;
		if (flow->state & (FLOW_FIN_BOTH | FLOW_RESET) || idle_ns >= SYN_RETRY_NS)
			return true;
	}
	backend = map_lookup(backends, &id);
	return !backend || !is_serving(backend) ||
	       !is_same_backend(backend, flow->service, &flow->addr, flow->port);
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
static __always_inline void remove_flow(const struct flow_key *key, struct flow *flow)
{
	struct flow_key twin_key;
	struct flow twin;

	make_twin(key, flow, &twin_key, &twin);
	end_flow(flow);
	map_delete(conntrack, &twin_key);
	map_delete(conntrack, key);
}

#endif /* EBPFPROXY_CONNTRACK_H */

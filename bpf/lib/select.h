/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * select.h - which backend of a service gets a new connection: session affinity, then the scheduler.
 * Reads maps slots, backends, backend_stats; writes affinity and the round-robin position.
 *
 * Most schedulers are a table that the agent made in the slots and an index that is picked here:
 *
 *	random			any index
 *	rr, wrr			the next index (two CPUs at the same instant may pick the same one)
 *	sh, dh, maglev		hash of client, of VIP, of the flow (hash.h), modulo the count
 *	lc, wlc, sed, nq	the lowest cost of all backends (least_cost)
 */
#ifndef EBPFPROXY_SELECT_H
#define EBPFPROXY_SELECT_H

#include "hash.h"
#include "health.h"
#include "service.h"

/* lc, wlc, sed and nq compare so many backends; of more, a window of this size at a random place.
 * The bound is the verifier's: 256 rounds cost a small part of its one million instructions.
 */
#define SCAN_MAX 256

/* Who wants a backend, and for what. flow.src is the client, flow.dst the VIP. */
struct request {
	struct flow_key flow;
	__u32 except; /* a backend that did not answer, 0 = none */
	__u8 client_kind; /* enum client_kind */
};

static __always_inline __u32 slot_backend(__u32 slot)
{
	__u32 *id = map_lookup(slots, &slot);

	return id ? *id : 0;
}

static __always_inline __u32 random_below(__u32 bound)
{
	return (__u64)bpf_get_prandom_u32() * bound >> 32;
}

static __always_inline __u32 next_position(__u32 service)
{
	struct service_stats *stats = map_lookup(service_stats, &service);
	__u32 position;

	if (!stats)
		return 0;
	position = stats->next;
	atomic_add(&stats->next, 1);
	return position;
}

/* Above every cost: open connections are counted one by one, so they stay below. Times a weight it fits 64 bits. */
#define COST_MAX (1ULL << 40)

/* 1 if a == b, else 0. */
static __always_inline __u32 equal_bit(__u32 a, __u32 b)
{
	__u32 difference = a ^ b;

	barrier_var(difference);
	return (difference - 1) >> 31;
}

/* Costs as IPVS has them (man 8 ipvsadm): lc open; wlc open / weight; sed (open + 1) / weight;
 * nq an idle backend first, else as sed. The first one of several equals wins.
 *
 * Without branches, also none of the compiler's making: the verifier walks every path of every round.
 */
SEPARATE __u32 least_cost(__u32 base, __u32 count, __u32 scheduler)
{
	__u32 best = 0, start, is_small = (__s32)(count - SCAN_MAX - 1) >> 31;
	__u64 best_cost = COST_MAX, best_weight = 1;
	__u64 weightless = equal_bit(scheduler, SCHED_LC);
	__u64 always = equal_bit(scheduler, SCHED_SED);
	__u64 if_busy = equal_bit(scheduler, SCHED_NQ);

	barrier_var(is_small);
	start = random_below(count) & ~is_small;
#pragma nounroll
	for (__u32 i = 0; i < SCAN_MAX; i++) {
		__u64 cost, weight, is_busy, is_better, is_negative;
		struct backend_stats *stats;
		struct backend *backend;
		__u32 id, slot = base + (start + i) % count, *of_slot;

		if (i >= count)
			break;
		of_slot = map_lookup(slots, &slot);
		if (!of_slot)
			break;
		id = *of_slot;
		stats = map_lookup(backend_stats, &id);
		backend = map_lookup(backends, &id);
		if (!stats || !backend)
			break;
		cost = stats->open;
		is_negative = (__s64)cost >> 63;
		barrier_var(is_negative);
		cost &= ~is_negative;
		is_busy = cost | -cost;
		barrier_var(is_busy);
		cost += always | (if_busy & is_busy >> 63);
		/* lc: every weight is 1. A free id has weight 0: of infinite cost. */
		weight = (backend->weight & (weightless - 1)) | weightless;
		is_better = (__s64)(cost * best_weight - best_cost * weight) >> 63;
		barrier_var(is_better);
		best = (id & is_better) | (best & ~is_better);
		best_cost = (cost & is_better) | (best_cost & ~is_better);
		best_weight = (weight & is_better) | (best_weight & ~is_better);
	}
	return best;
}

static __always_inline __u32 schedule(const struct service *service, const struct request *request)
{
	__u32 index;

	switch (service->scheduler) {
	case SCHED_RR:
	case SCHED_WRR:
		index = next_position(service->id);
		break;
	case SCHED_SH:
		index = hash_addr(&request->flow.src);
		break;
	case SCHED_DH:
		index = hash_addr(&request->flow.dst);
		break;
	case SCHED_MAGLEV:
		index = hash_flow(&request->flow);
		break;
	case SCHED_LC:
	case SCHED_WLC:
	case SCHED_SED:
	case SCHED_NQ:
		return least_cost(service->slot_base, service->slot_count, service->scheduler);
	default:
		index = random_below(service->slot_count);
	}
	return slot_backend(service->slot_base + index % service->slot_count);
}

/* Whether an established UDP flow may stay: kube-proxy too moves it once its endpoint stops serving. */
static __always_inline bool is_serving(const struct backend *backend)
{
	return backend->state == BACKEND_READY || backend->state == BACKEND_TERMINATING;
}

/* Whether the id still means the backend that a flow was sent to. */
static __always_inline bool is_same_backend(const struct backend *backend, __u32 service,
					    const struct addr *addr, __be16 port)
{
	return backend->service == service && backend->port == port &&
	       addr_equal(&backend->address, addr);
}

/* Whether the backend is in the service's present pool, without a search in the slots. A pool is all
 * ready or all terminating; policy Local has this node's, policy Cluster leaves out what a hint keeps away.
 */
static __always_inline bool is_in_pool(const struct service *service, const struct backend *backend)
{
	struct backend *first;
	__u32 id;

	if (backend->service != service->id || !backend->weight)
		return false;
	if (service->flags & SERVICE_LOCAL ? !(backend->flags & BACKEND_LOCAL)
					   : backend->flags & BACKEND_HINT_ELSEWHERE)
		return false;
	id = slot_backend(service->slot_base);
	first = map_lookup(backends, &id);
	return first && is_serving(backend) && backend->state == first->state;
}

/* So many slots are looked at for a backend that is not passed over; then the last one has to do. With half of all
 * passed over, one in 256 openings goes to such a one.
 */
#define OTHER_TRIES 8

/* Returns `id`, or another backend where that one is passed over or did not answer. */
static __always_inline __u32 avoid(const struct service *service, const struct request *request,
				   __u32 id, __u64 now)
{
	bool ejects = service->flags & SERVICE_EJECTS;

	if (!ejects && !request->except)
		return id;
	for (int i = 0; i < OTHER_TRIES; i++) {
		if (id != request->except && !(ejects && is_ejected(service->id, id, now)))
			break;
		id = slot_backend(service->slot_base + random_below(service->slot_count));
	}
	return id;
}

static __always_inline __u32 affine_backend(const struct service *service,
					    const struct affinity_key *key, __u64 now)
{
	struct affinity *entry = map_lookup(affinity, key);
	struct backend *backend;
	__u32 id;

	if (!entry ||
	    since(entry->last_used_ns, now) >= (__s64)(service->affinity_s * NSEC_PER_SEC))
		return 0;
	id = entry->backend;
	backend = map_lookup(backends, &id);
	if (!backend || !is_in_pool(service, backend))
		return 0;
	return service->flags & SERVICE_EJECTS && is_ejected(service->id, id, now) ? 0 : id;
}

/* Returns a backend id, 0 if there is none. The service's pool is not empty. */
static __always_inline __u32 select_backend(const struct service *service,
					    const struct request *request, __u64 now)
{
	struct affinity_key key = {
		.client = request->flow.src,
		.service = service->id,
		.kind = request->client_kind,
	};
	struct affinity entry = {.last_used_ns = now};

	if (!service->slot_count)
		return 0;
	if (service->affinity_s && !request->except)
		entry.backend = affine_backend(service, &key, now);
	if (!entry.backend)
		entry.backend = avoid(service, request, schedule(service, request), now);
	/* A full map forgets the oldest client; a failure costs the client its affinity, not its connection. */
	if (service->affinity_s && entry.backend)
		map_update(affinity, &key, &entry, BPF_ANY);
	return entry.backend;
}

#endif /* EBPFPROXY_SELECT_H */

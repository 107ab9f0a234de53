/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * health.h - what openings tell of a backend, and whether it is passed over for it (outlier ejection).
 *
 * Only of services in map outliers. Counters are not exact between CPUs: one failure more or less is no matter,
 * and the agent recounts how many backends are passed over.
 */
#ifndef EBPFPROXY_HEALTH_H
#define EBPFPROXY_HEALTH_H

#include "maps.h"

static __always_inline void note_success(__u32 backend)
{
	struct backend_health *health = map_lookup(backend_health, &backend);

	if (health && health->failures)
		health->failures = 0;
}

/* An opening was refused, or nobody answered. */
static __always_inline void note_failure(__u32 service, __u32 backend, __u64 now)
{
	struct outlier *outlier = map_lookup(outliers, &service);
	struct backend_health *health = map_lookup(backend_health, &backend);
	struct service_stats *stats = map_lookup(service_stats, &service);

	if (!outlier || !health || !stats)
		return;
	atomic_add(&health->failures, 1);
	if (health->failures < outlier->failures || health->ejected_until_ns)
		return;
	if (stats->ejected >= (__s64)outlier->most)
		return;
	health->ejected_until_ns = now + outlier->seconds * NSEC_PER_SEC;
	health->failures = 0;
	health->ejections += 1;
	atomic_add(&stats->ejected, 1);
}

/* Whether a backend is passed over. Its time ends when somebody asks after it. */
static __always_inline bool is_ejected(__u32 service, __u32 backend, __u64 now)
{
	struct backend_health *health = map_lookup(backend_health, &backend);
	struct service_stats *stats;

	if (!health || !health->ejected_until_ns)
		return false;
	if ((__s64)(health->ejected_until_ns - now) > 0)
		return true;
	health->ejected_until_ns = 0;
	stats = map_lookup(service_stats, &service);
	if (stats)
		atomic_add(&stats->ejected, -1);
	return false;
}

#endif /* EBPFPROXY_HEALTH_H */

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * platform.h - lets one source be loaded by libbpf (compiled here) and by BCC (compiled on the node).
 *
 * BCC rewrites C: it must see `map.lookup(...)` in plain text, never inside a macro. So for BCC the
 * sources are flattened first: pcpp expands every macro of ours with LOADER_BCC defined and leaves the
 * system includes alone. For the programs both worlds look the same:
 *
 *	LICENSE("Dual BSD/GPL");
 *	MAP(slots, ARRAY, __u32, __u32, 1024, BPF_F_MMAPABLE);	types: enum bpf_map_type without prefix
 *	SEC("cgroup/connect4") int sock_connect4(struct bpf_sock_addr *ctx) { ... }
 *	map_lookup(slots, &i), map_update(m, &k, &v, BPF_ANY | BPF_NOEXIST), map_delete(m, &k)
 *	config.node_port_min, atomic_add(&stats->connections, 1)
 *
 * A static function becomes part of its caller (BCC has no calls between BPF functions): write
 * `static __always_inline`. All kernel and helper includes stand here and nowhere else. The name of a map or
 * program has at most 15 characters.
 *
 * Where many paths lead to a long function, write `SEPARATE`: with libbpf it is a function of its own, which the
 * verifier walks once, and not once for each path. It takes numbers alone (Linux 5.10 allows no pointers there) and
 * finds the packet in the scratch; of what it returns the verifier knows nothing.
 */
#ifndef EBPFPROXY_PLATFORM_H
#define EBPFPROXY_PLATFORM_H

#ifdef LOADER_BCC

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>
#include <uapi/linux/pkt_cls.h>

#else

#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#endif

#include "abi.h"

/* sys/socket.h is user space's; the numbers are the kernel's ABI on every architecture but MIPS. */
#define AF_UNSPEC   0
#define AF_INET	    2
#define AF_INET6    10
#define SOCK_STREAM 1
#define SOCK_DGRAM  2

/* errno values that programs return (asm-generic/errno-base.h, errno.h). */
#define EPERM	     1
#define EADDRINUSE   98
#define ECONNREFUSED 111

#define NSEC_PER_SEC 1000000000ULL

/* Nanoseconds since `then`: signed, as another CPU may have written it after this one read the clock. What is younger
 * than now is not idle.
 */
#define since(then, now) ((__s64)((now) - (then)))

/* An atomic `*p += n`. The old value can't be had: that takes kernel 5.12. */
#define atomic_add(p, n) ((void)__sync_fetch_and_add((p), (n)))

#ifdef LOADER_BCC

#define SEC(name)
#define SEPARATE	 static __always_inline
#define LICENSE(text)	 struct license_is_bcc_default
#define barrier()	 asm volatile("" ::: "memory")
#define barrier_var(var) asm volatile("" : "+r"(var))

/* BCC's "type:path" opens a pinned map; the agent has made and pinned it before. PIN_DIR is a -D. */
#define BCC_HASH	 "hash"
#define BCC_ARRAY	 "array"
#define BCC_LRU_HASH	 "lru_hash"
#define BCC_LPM_TRIE	 "lpm_trie"
#define BCC_PERCPU_ARRAY "percpu_array"
#define MAP(name, type, key, value, max, flags) \
	BPF_F_TABLE(BCC_##type ":" PIN_DIR "/" #name, key, value, name, max, flags)

#define map_lookup(map, key) map.lookup(key)
#define map_update(map, key, value, flags) \
	((flags) == BPF_NOEXIST ? map.insert((key), (value)) : map.update((key), (value)))
#define map_delete(map, key) map.delete(key)

/* CONFIG_INIT is a -D: the initialiser of struct config, filled in by the loader. */
static const struct config config = CONFIG_INIT;

/* BCC declares some helpers with too narrow types (its bpf_get_socket_cookie returns 32 of 64 bits)
 * and, by its version, not all of them: these are declared as the kernel has them.
 */
static __u64 (*helper_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;
static __u64 (*helper_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static __s64 (*helper_csum_diff)(__be32 *from, __u32 from_size, __be32 *to, __u32 to_size,
				 __wsum seed) = (void *)BPF_FUNC_csum_diff;
/* BPF_FUNC_set_retval: newer than many headers */
static long (*helper_set_retval)(int retval) = (void *)187;
static __u64 (*helper_ktime_coarse)(void) = (void *)160; /* BPF_FUNC_ktime_get_coarse_ns */
static long (*helper_redirect_neigh)(__u32 device, void *params, int size,
				     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;
#define bpf_redirect_neigh	helper_redirect_neigh
#define bpf_ktime_get_coarse_ns helper_ktime_coarse
#define bpf_get_socket_cookie	helper_socket_cookie
#define bpf_get_netns_cookie	helper_netns_cookie
#define bpf_csum_diff		helper_csum_diff
#define bpf_set_retval		helper_set_retval

/* BCC's own are functions, which initialisers of static data can't use. Little endian, as BCC's. */
#define bpf_htons(x) ((__be16)__builtin_bswap16((__u16)(x)))
#define bpf_ntohs(x) ((__u16)__builtin_bswap16((__u16)(x)))
#define bpf_htonl(x) ((__be32)__builtin_bswap32((__u32)(x)))
#define bpf_ntohl(x) ((__u32)__builtin_bswap32((__u32)(x)))

#else

#define SEPARATE __attribute__((noinline))

/* clang-format off */
#define LICENSE(text) char _license[] SEC("license") = text
/* clang-format on */

#define MAP(name, map_type, key_type, value_type, max, flags) \
	struct {                                              \
		__uint(type, BPF_MAP_TYPE_##map_type);        \
		__type(key, key_type);                        \
		__type(value, value_type);                    \
		__uint(max_entries, max);                     \
		__uint(map_flags, flags);                     \
	} name SEC(".maps")

#define map_lookup(map, key)		   bpf_map_lookup_elem(&map, key)
#define map_update(map, key, value, flags) bpf_map_update_elem(&map, key, value, flags)
#define map_delete(map, key)		   bpf_map_delete_elem(&map, key)

#ifndef STAMP
#define STAMP "unstamped"
#endif
/* The loader writes the other fields before it loads; the verifier then drops dead branches. */
const volatile struct config config = {.abi = ABI_VERSION, .stamp = STAMP};

#endif

/* CLOCK_MONOTONIC. Nothing here is as short as a tick of the kernel, and the exact time takes a quarter of what a
 * packet of an established flow does.
 */
static __always_inline __u64 now_ns(void)
{
	return config.features & FEATURE_COARSE_CLOCK ? bpf_ktime_get_coarse_ns()
						      : bpf_ktime_get_ns();
}

#endif /* EBPFPROXY_PLATFORM_H */

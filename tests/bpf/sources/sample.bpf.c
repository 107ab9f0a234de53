/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sample.bpf.c - every kind of map and program that the loaders must manage, as small as can be. */
#include "platform.h"

MAP(names, HASH, __u32, __u64, 64, BPF_F_NO_PREALLOC);
MAP(places, ARRAY, __u32, __u32, 64, BPF_F_MMAPABLE);
MAP(plain, ARRAY, __u32, __u32, 64, 0);
MAP(flows, LRU_HASH, struct addr, __u64, 1024, 0);
MAP(prefixes, LPM_TRIE, struct local_source_key, __u32, 64, BPF_F_NO_PREALLOC);
MAP(counts, PERCPU_ARRAY, __u32, __u64, VERDICT_MAX, 0);

static __always_inline void count(__u32 verdict)
{
	__u64 *n = map_lookup(counts, &verdict);

	if (n)
		*n += 1;
}

/* connect() to port config.node_port_min is refused, every other counted. */
SEC("cgroup/connect4")
int sock_sample(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u32 port = bpf_ntohs(ctx->user_port);

	if (port == config.node_port_min) {
		count(VERDICT_REJECT_UNUSED);
		return 0;
	}
	map_update(names, &port, &cookie, BPF_ANY);
	count(VERDICT_NEW);
	return 1;
}

/*
 * IPv4 packets from an address in prefixes are sent on to 10.0.0.1, checksum and all; the first packet
 * of each source is noted in flows. places[0] counts the bytes.
 */
SEC("tc")
int tc_sample(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct local_source_key key = {.prefixlen = 128};
	__be32 old, new = bpf_htonl(0x0a000001);
	__u64 now = bpf_ktime_get_ns();
	__u32 zero = 0, *bytes;

	if ((void *)(ip + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP))
		return TC_ACT_OK;
	key.source.w[2] = bpf_htonl(0xffff);
	key.source.w[3] = ip->saddr;
	if (!map_lookup(prefixes, &key)) {
		count(VERDICT_NOT_OURS);
		return TC_ACT_OK;
	}
	if (map_update(flows, &key.source, &now, BPF_NOEXIST))
		count(VERDICT_ESTABLISHED);
	else
		count(VERDICT_NEW);
	bytes = map_lookup(places, &zero);
	if (bytes)
		atomic_add(bytes, skb->len);
	old = ip->daddr;
	ip->daddr = new;
	bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), 0,
			    bpf_csum_diff(&old, sizeof(old), &new, sizeof(new), 0), 0);
	return config.node_port_max;
}

/* Nothing reads it here; the map is there to be taken over. */
SEC("tc")
int tc_plain(struct __sk_buff *skb)
{
	__u32 zero = 0, *mark = map_lookup(plain, &zero);

	if (mark)
		*mark = skb->mark;
	return TC_ACT_OK;
}

LICENSE("Dual BSD/GPL");

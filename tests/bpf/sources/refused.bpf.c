/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* refused.bpf.c - a program that no verifier accepts: it reads the packet without looking at its end. */
#include "platform.h"

MAP(names, HASH, __u32, __u64, 64, BPF_F_NO_PREALLOC);

SEC("tc")
int tc_refused(struct __sk_buff *skb)
{
	struct ethhdr *eth = (void *)(long)skb->data;
	__u32 zero = 0;

	return map_lookup(names, &zero) && eth->h_proto == bpf_htons(ETH_P_IP) &&
	       config.node_port_min;
}

LICENSE("Dual BSD/GPL");

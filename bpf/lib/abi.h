/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * abi.h - the contract between the BPF programs and the agent: every key, value, enum and flag.
 *
 * clang compiles it into the programs and cffi parses it into the agent, so no layout is typed twice.
 * Rules that keep both readers happy: fixed-width types only, byte order in the type, every padding
 * byte named and always zero, no bit-fields, no #define values, no attributes. Include guards are the
 * only preprocessor lines. Enums are append-only: the numbers are stored in pinned maps.
 */
/* The columns of meanings are set by hand. */
/* clang-format off */
#ifndef EBPFPROXY_ABI_H
#define EBPFPROXY_ABI_H

/* Raised when a layout below changes; a program and an agent of different numbers refuse each other. */
enum abi {
	ABI_VERSION = 2,
};

enum limits {
	/* A DNS label is at most 63 bytes (RFC 1035 2.3.4): namespace/name:port and a NUL. */
	SERVICE_NAME_MAX = 192,
	/* Length of the version stamp in struct config, NUL included. */
	STAMP_MAX = 40,
	/* The longest answer (RFC 4443 2.4 (c): 1280 bytes), rounded up to what is summed in parts of 512. */
	REJECT_PACKET_MAX = 1576,
};

/* An IP address in network byte order; IPv4 as ::ffff:a.b.c.d (RFC 4291 2.5.5.2). */
struct addr {
	__be32 w[4];
};

/* What this kernel has beyond 5.10; bits of struct config.features. An absent bit drops the code that needs it. */
enum feature {
	FEATURE_SET_RETVAL = 1,		/* bpf_set_retval in cgroup programs, 5.18: errno of our choice, else EPERM */
	FEATURE_COARSE_CLOCK = 2,	/* bpf_ktime_get_coarse_ns, 5.11: the time of the last tick, else the exact one */
};

/* Load-time constants. Lives in .rodata (libbpf) or in the source text (bcc). */
struct config {
	__u32 abi;			/* ABI_VERSION at compile time */
	__u16 node_port_min;		/* host byte order, inclusive */
	__u16 node_port_max;		/* host byte order, inclusive; 0 = no NodePorts */
	__u64 host_netns;		/* cookie of the node's own network namespace */
	__u64 udp_idle_ns;		/* a UDP flow keeps its backend this long without traffic */
	__u32 features;			/* bits of enum feature */
	__u16 snat_port_min;		/* host byte order, inclusive: ports of translated sources */
	__u16 snat_port_max;		/* host byte order, inclusive; 0 = sources can't be translated */
	__u8 stamp[STAMP_MAX];		/* package version + abi checksum, NUL terminated */
};

/* Which traffic policy applies: where did the packet or call come from? */
enum scope {
	SCOPE_INTERNAL = 0,		/* this node or its pods */
	SCOPE_EXTERNAL = 1,		/* anywhere else */
};

/* What an address is to us; bits of struct vip.kinds. */
enum vip_kind {
	VIP_CLUSTER_IP = 1,
	VIP_EXTERNAL_IP = 2,
	VIP_LOAD_BALANCER = 4,
	VIP_NODE = 8,			/* an address of this node that serves NodePorts */
	VIP_LOCAL = 16,			/* an address of this node: never reject its unused ports */
	VIP_SNAT = 32,			/* an address of this node that translated sources get: replies come to it */
	VIP_PINGABLE = 64,		/* a frontend here has backends: echo requests are answered */
};

/* Value of map vips. Key: struct addr. 127.0.0.0/8 is looked up as 127.0.0.1. No bit at all: an address
 * that served once; its established flows go on, everything else is left alone.
 */
struct vip {
	__u32 kinds;			/* bits of enum vip_kind */
};

/* Key of map services: one frontend. */
struct service_key {
	struct addr vip;		/* all zero (v6) or ::ffff:0.0.0.0 (v4) = any VIP_NODE address: a NodePort */
	__be16 port;
	__u8 proto;			/* IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP */
	__u8 scope;			/* enum scope */
};

enum scheduler {
	SCHED_RANDOM = 0,
	SCHED_RR = 1,
	SCHED_WRR = 2,
	SCHED_SH = 3,			/* source address hash */
	SCHED_DH = 4,			/* destination address hash */
	SCHED_MAGLEV = 5,		/* flow hash into a Maglev table */
	SCHED_LC = 6,
	SCHED_WLC = 7,
	SCHED_SED = 8,
	SCHED_NQ = 9,
};

enum service_flag {
	SERVICE_DROP_EMPTY = 1,		/* slot_count 0: drop instead of reject (policy Local, none local) */
	SERVICE_LOCAL = 2,		/* traffic policy Local made this set */
	SERVICE_SOURCE_RANGES = 4,	/* only sources in map source_ranges may enter here */
	SERVICE_SNAT = 8,		/* to a backend on another node: a source that may be elsewhere becomes this node's */
	SERVICE_SNAT_ALL = 16,		/* to every backend */
	SERVICE_DSR = 32,		/* to a backend on another node: as it is, in an IP packet of this node */
	SERVICE_EJECTS = 128,		/* backends that fail are passed over: map outliers */
};

/* Value of map services. One update of it switches a frontend to another set of backends. */
struct service {
	__u32 id;			/* index of service_names and service_stats; 0 = none */
	__u32 slot_base;
	__u32 slot_count;		/* 0 = no usable backend */
	__u32 affinity_s;		/* ClientIP timeout in seconds, 0 = no affinity */
	__u8 scheduler;			/* enum scheduler */
	__u8 flags;			/* bits of enum service_flag */
	__u8 kind;			/* the one enum vip_kind bit of this frontend (VIP_NODE = NodePort) */
	__u8 syn_tries;			/* so many more backends get a SYN that was not answered */
};

enum backend_state {
	BACKEND_FREE = 0,		/* the id is not in use */
	BACKEND_READY = 1,
	BACKEND_TERMINATING = 2,	/* terminating and still serving: used when none is ready */
	BACKEND_NOT_READY = 3,		/* neither: TCP and SCTP connections go on, UDP moves, nothing new */
	BACKEND_GONE = 4,		/* removed; the id is kept until nothing refers to it */
};

enum backend_flag {
	BACKEND_LOCAL = 1,		/* on this node */
	BACKEND_HINT_ELSEWHERE = 2,	/* left out of policy Cluster by its topology hint */
};

/* Value of array backends; the index is the backend id, 0 is never used. */
struct backend {
	struct addr address;
	__be16 port;
	__u8 proto;			/* IPPROTO_* */
	__u8 state;			/* enum backend_state */
	__u32 service;			/* id of the service it belongs to */
	__u16 weight;			/* 0 drains */
	__u8 flags;			/* bits of enum backend_flag */
	__u8 pad[5];
};

/* Value of array backend_stats, same index as backends. Written by the programs.
 * open counts the entries that point here: sockets of kind CONNECTED and TO_VIP, conntrack FORWARD that is
 * not closed (RESET, or FIN of both sides). The programs can't see an LRU eviction or a UDP flow that
 * fell silent: the agent recounts now and then. Packets and bytes (of whole IP packets) are those that are
 * translated one by one; each flow adds its own about once a second.
 */
struct backend_stats {
	__u64 connections;		/* new connections ever sent here */
	__s64 open;			/* open now; what lc, wlc, sed and nq compare */
	__u64 packets;			/* to the backend */
	__u64 octets;
	__u64 reply_packets;		/* from the backend */
	__u64 reply_octets;
};

/* Value of array service_stats, index = service id. Written by the programs. */
struct service_stats {
	__u64 connections;		/* new connections accepted */
	__u64 refused;			/* new connections rejected or dropped */
	__u64 next;			/* round-robin position */
	__u64 retried;			/* openings that were not answered and went to another backend */
	__s64 ejected;			/* backends that are passed over now; the agent recounts */
	__u64 packets;			/* as in struct backend_stats, of all backends there ever were */
	__u64 octets;
	__u64 reply_packets;
	__u64 reply_octets;
};

/* Value of hash service_names, key = service id (__u32): ids survive restarts by it. */
struct service_name {
	char text[SERVICE_NAME_MAX];	/* namespace/name:port, or namespace/name for an unnamed port */
	__u8 proto;			/* IPPROTO_* */
	__u8 family;			/* 4 | 6 */
	__u8 pad[2];
};

enum socket_kind {
	SOCKET_CONNECTED = 0,		/* addr, port zero: the one peer of a connected socket */
	SOCKET_TO_VIP = 1,		/* addr = VIP: the backend an unconnected socket was given */
	SOCKET_FROM_BACKEND = 2,	/* addr = backend: the VIP that recvmsg must show */
};

/* Key of LRU map sockets: what a local socket was told, by socket cookie. */
struct socket_key {
	__u64 cookie;
	struct addr addr;
	__be16 port;
	__u8 proto;			/* IPPROTO_* */
	__u8 kind;			/* enum socket_kind */
	__u8 pad[4];
};

/* Value of LRU map sockets. */
struct socket_flow {
	struct addr vip;
	struct addr backend_addr;
	__be16 vip_port;
	__be16 backend_port;
	__u32 service;
	__u32 backend;
	__u8 pad[4];
	__u64 last_used_ns;		/* CLOCK_MONOTONIC; written at most once a second */
};

/* Key of hash outliers: service id (__u32). Value: when a backend is passed over for failing. */
struct outlier {
	__u32 failures;			/* in a row */
	__u32 seconds;			/* for so long */
	__u32 most;			/* so many backends at the same time, at most */
};

/* Value of array backend_health, same index as backends. Written by the programs, for services in map outliers. */
struct backend_health {
	__u64 ejected_until_ns;		/* CLOCK_MONOTONIC; 0: it is not passed over */
	__u32 failures;			/* openings in a row that were refused or not answered */
	__u32 ejections;		/* how often it was passed over */
};

enum hop_kind {
	HOP_UNKNOWN = 0,		/* not looked up yet */
	HOP_FORWARD = 1,		/* device and MAC addresses are known */
	HOP_NEIGHBOUR = 2,		/* device known, the kernel has to find the neighbour */
	HOP_HERE = 3,			/* this node, or for the kernel's routing to decide: up the stack */
};

/* Where a packet leaves this node. */
struct next_hop {
	__u32 device;			/* ifindex */
	__u32 epoch;			/* of struct epoch when it was looked up; another one: look it up again */
	__u32 until;			/* CLOCK_MONOTONIC in units of 2^30 ns; later: let the kernel look, too */
	__u16 mtu;			/* of the route, 0 = not known (before Linux 5.12) */
	__u8 kind;			/* enum hop_kind */
	__u8 is_xdp;			/* 1: XDP may send to the device */
	__u8 to_mac[6];
	__u8 from_mac[6];
};

/* Value of array backend_hops, same index as backends: the way to a backend. Written by the programs. */
struct backend_hop {
	struct addr source;		/* the address of this node that a translated source gets; zero: none */
	struct next_hop hop;
	__u8 pad[4];
};

/* Key of hash dsr_backends: where an encapsulated packet for a service was sent to. Value: __u32 backend id. */
struct dsr_backend_key {
	struct addr address;		/* of a backend on this node */
	__u32 service;
};

/* Key of hash node_sources: which address of this node packets out of a device get. Value: struct addr. */
struct node_source_key {
	__u32 device;			/* ifindex; 0: any device without an address of its own */
	__u32 family;			/* 4 | 6 */
};

/* The one value of array epochs. Written by the agent. */
struct epoch {
	__u32 hops;			/* raised when a route or neighbour changed: every next_hop is void */
	__u8 pad[4];
};

enum flow_dir {
	FLOW_FORWARD = 0,		/* client -> VIP */
	FLOW_REPLY = 1,			/* backend -> client, or -> this node where the source was translated */
};

/* Key of maps conntrack and new_flows: one direction of a flow as the packet shows it before translation. */
struct flow_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;			/* IPPROTO_* */
	__u8 dir;			/* enum flow_dir */
	__u8 pad[2];
};

/* Bits of struct flow.state, TCP and SCTP. */
enum flow_state {
	FLOW_REPLIED = 1,		/* a packet of the other direction was seen */
	FLOW_FIN_FORWARD = 2,		/* client closed (FIN, SHUTDOWN) */
	FLOW_FIN_REPLY = 4,		/* backend closed */
	FLOW_RESET = 8,			/* RST, ABORT */
};

/* Bits of struct flow.flags: how it is translated. */
enum flow_flag {
	FLOW_SNAT = 1,			/* the source, too: both directions leave by a next hop */
	FLOW_LOCAL = 2,			/* the backend is on this node */
	FLOW_DSR = 4,			/* not at all: encapsulated, from src to dst; there is no other direction */
	FLOW_DSR_IN = 8,		/* came encapsulated from another node */
	FLOW_WATCHED = 128,		/* failures of the backend are counted */
};

/* Value of maps conntrack and new_flows. */
struct flow {
	struct addr src;		/* the packet's source after translation */
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 state;			/* bits of enum flow_state */
	__u8 flags;			/* bits of enum flow_flag */
	__u8 syn_tries;			/* as in struct service, what is left */
	__u8 pad;
	__u32 service;
	__u32 backend;
	__u64 last_seen_ns;		/* CLOCK_MONOTONIC; written at most once a second */
	__u64 octets;			/* of this direction, not yet added to the stats */
	__u32 packets;			/* same */
	struct next_hop hop;		/* of this direction, FLOW_SNAT only */
};

/* What a packet says about its connection; bits of struct packet.events. UDP says nothing. */
enum packet_event {
	EVENT_OPEN = 1,			/* SYN without ACK; INIT */
	EVENT_FIN = 2,			/* FIN; SHUTDOWN */
	EVENT_RESET = 4,		/* RST; ABORT, SHUTDOWN COMPLETE */
	EVENT_ACCEPT = 8,		/* SYN with ACK; INIT ACK */
};

enum fragment_kind {
	FRAGMENT_NONE = 0,		/* a whole packet */
	FRAGMENT_FIRST = 1,		/* has the ports */
	FRAGMENT_LATER = 2,		/* has none */
};

/* Key of LRU map fragments: what tells the fragments of one packet from those of others (RFC 791 3.2, RFC 8200 4.5). */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__be32 id;
	__u8 proto;			/* IPv6: 0, each fragment may show another next header */
	__u8 pad[3];
};

/* Value of LRU map fragments: what the first fragment showed. */
struct fragment {
	__be16 sport;
	__be16 dport;
	__u8 proto;			/* IPPROTO_* */
	__u8 pad[3];
	__u64 seen_ns;			/* CLOCK_MONOTONIC */
};

/* The packet that an ICMP error quotes. */
struct quote {
	struct addr reporter;		/* who sent the error */
	__u32 l4;			/* from the ICMP header to what is quoted behind the IP header */
	__u32 l4_size;			/* bytes from there to the end */
};

/* What the programs know of the packet at hand. */
struct packet {
	struct flow_key flow;		/* as the packet shows it */
	__u32 l3;			/* offset of the IP header */
	__u32 l4;			/* offset of the header behind it (and behind extension headers) */
	__u32 l4_size;			/* bytes from there to the end of the IP packet */
	__u32 count;			/* packets on the wire that it stands for (GSO, GRO) */
	__u8 version;			/* 4 | 6 */
	__u8 fragment;			/* enum fragment_kind */
	__u8 next;			/* protocol of what is at l4 */
	__u8 events;			/* bits of enum packet_event */
	__u8 hops;			/* TTL, hop limit */
	__u8 pad[3];
	__be32 fragment_id;
};

/* The one value of per-CPU array scratch: room that the stack does not have. The packet is here because the
 * verifier does not follow what is in a map: every path that fills it differently ends as the same state.
 */
struct scratch {
	struct packet packet;
	struct quote quote;
	__u32 verdict;
	__s32 action;			/* TC_ACT_* */
	__u32 mtu;			/* that a packet is too big for */
	__u32 sctp_change;		/* old ports XOR new ones, still to be added to the checksum */
	struct addr outer_src;		/* of a packet that came encapsulated */
	struct addr outer_dst;
	__u32 pad;
	struct flow flow;
	struct flow_key twin_key;
	struct flow twin;
	struct flow_key spare_key;
};

enum client_kind {
	CLIENT_ADDR = 0,		/* struct addr is an IP address */
	CLIENT_NETNS = 1,		/* w[2], w[3] hold a network namespace cookie: a local socket not yet bound */
};

/* Key of LRU map affinity. */
struct affinity_key {
	struct addr client;
	__u32 service;
	__u8 kind;			/* enum client_kind */
	__u8 pad[3];
};

/* Value of LRU map affinity. */
struct affinity {
	__u32 backend;
	__u8 pad[4];
	__u64 last_used_ns;		/* CLOCK_MONOTONIC of the last new connection */
};

/* Key of LPM trie source_ranges: sources that may use a service's load-balancer VIPs. Value: __u32 1. */
struct source_range_key {
	__u32 prefixlen;		/* 32 + bits of the prefix in struct addr (an IPv4 /24 has 96 + 24) */
	__u32 service;
	struct addr source;
};

enum source_kind {
	SOURCE_LOCAL = 1,		/* counts as this node's pods: scope internal */
	SOURCE_OWN = 2,			/* is a pod of this node for sure: answers to it come here */
};

/* Key of LPM trie local_sources. Value: __u32, bits of enum source_kind. */
struct local_source_key {
	__u32 prefixlen;		/* bits of the prefix in struct addr */
	struct addr source;
};

/* The one value of per-CPU array rejects: what tc_lb needs to answer a refused packet. */
struct reject {
	__u64 paid_ns;			/* CLOCK_MONOTONIC up to which answers were sent; how far it lags is the budget */
	__u8 packet[REJECT_PACKET_MAX];	/* the answer while it is made */
};

/* Value of per-CPU array verdicts, index = enum verdict. */
struct verdict_count {
	__u64 packets;			/* or calls */
	__u64 octets;			/* of whole frames; 0 for calls */
};

/* Why the dataplane did what it did. */
enum verdict {
	VERDICT_CONTINUE = 0,		/* helper result "go on"; never counted */
	VERDICT_NOT_OURS = 1,		/* not for a Service: left alone */
	VERDICT_NEW = 2,		/* new connection sent to a backend */
	VERDICT_ESTABLISHED = 3,	/* packet of a known flow translated */
	VERDICT_REPLY = 4,		/* reply translated back */
	VERDICT_REJECT_EMPTY = 5,	/* no usable backend anywhere */
	VERDICT_DROP_EMPTY = 6,		/* policy Local, no local backend */
	VERDICT_REJECT_UNUSED = 7,	/* a VIP's port that no Service uses */
	VERDICT_DROP_SOURCE = 8,	/* outside loadBalancerSourceRanges */
	VERDICT_FRAGMENT = 9,		/* a later fragment of what is not translated: left alone */
	VERDICT_TRUNCATED = 10,		/* headers run past the packet's end: left alone */
	VERDICT_UNKNOWN_L4 = 11,	/* no TCP, UDP or SCTP header found: left alone */
	VERDICT_MAP_FULL = 12,		/* an insert failed: the connection was refused */
	VERDICT_BIND_DENIED = 13,	/* bind() to a NodePort refused */
	VERDICT_REWRITE_FAILED = 14,	/* the kernel refused a header write: dropped */
	VERDICT_CLOSED = 15,		/* a translated socket was closed */
	VERDICT_REJECT_LIMITED = 16,	/* a rejection over the rate limit: dropped without an answer */
	VERDICT_SNAT_FULL = 17,		/* no port or no address left to translate a source to: refused */
	VERDICT_NO_ROUTE = 18,		/* the kernel knows no way to the next hop: dropped */
	VERDICT_HOPS = 19,		/* TTL or hop limit used up */
	VERDICT_TOO_BIG = 20,		/* larger than the next hop's MTU */
	VERDICT_RELATED = 21,		/* ICMP error about a known flow translated */
	VERDICT_ECHO = 22,		/* echo request to a VIP answered */
	VERDICT_FRAGMENT_EARLY = 23,	/* a fragment to a VIP whose first fragment was not seen */
	VERDICT_MAX = 24,		/* number of verdicts, not one */
};

#endif /* EBPFPROXY_ABI_H */

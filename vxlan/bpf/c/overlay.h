/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Keys and values of the pinned maps: the interface between the programs, the
 * engine (abi.go) and the balancer of package ingress/bpf. A change of any of
 * them needs a new number in abi.go, but for values that were not used before.
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d; fields named so are in network
 * order, others in the host's.
 */
#pragma once
#include "kernel.h"

#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name

/* MAX_ENDPOINTS bounds the entries of all networks of a node together. */
#define MAX_ENDPOINTS 131072
#define MAX_PORTS 16384
#define MAX_NETS 16384
#define MAX_SUBNETS 8

struct addr {
	u32 w[4];
};

struct mac_key {
	u32 vni;
	struct mac mac;
	u16 zero;
};

struct ep_key {
	u32 vni;
	struct addr addr;
};

struct ep {
	struct mac mac;
	u16 zero;
};

/* Where a hardware address lives. */
enum kind {
	DEST_TASK = 1,	 /* a local task: ifindex is the host's end of its veth */
	DEST_LEG = 2,	 /* the host's own port, likewise */
	DEST_DIRECT = 3, /* another node: ifindex is the underlay device */
	DEST_TUNNEL = 4, /* another node by way of the VXLAN device, ifindex */
	DEST_VIP = 5,	 /* a service: for the balancer */
	/*
	 * The same as DEST_TASK and DEST_LEG on an encrypted network: nothing
	 * that comes from the underlay is for them. Who is elsewhere is behind
	 * the uplink, which is one of these tasks.
	 */
	DEST_SEALED_TASK = 6,
	DEST_SEALED_LEG = 7,
};

enum flags {
	WAY_NATIVE = 1,	 /* proven: packets may go as they are (native.h) */
	WAY_ON_LINK = 2, /* the next hop is the other node itself */
};

struct dest {
	u8 kind;
	u8 nh_family; /* AF_INET or AF_INET6 */
	u16 mtu;      /* largest inner packet in bytes, of a way to another node */
	u32 ifindex;
	u16 udp; /* network order: destination port there, or our own */
	u16 flags; /* of other nodes: enum flags */
	struct addr vtep; /* the other node's, or our own for what is local */
	u32 nh[4];	  /* the next hop on ifindex, as struct bpf_redir_neigh */
};

/* What the program knows of the veth that a packet comes from. */
struct port {
	u32 vni;
	u16 udp; /* network order; 0: nothing may leave in the clear */
	struct mac mac;
	u32 tunnel; /* ifindex of the VXLAN device */
	struct addr vtep;
};

struct prefix {
	struct addr addr;
	u32 bits;
};

/* A network as the engine reads it back; the programs use udp and vtep. */
struct net {
	u8 id[64]; /* ends with a zero */
	u16 mtu;
	u16 udp; /* network order */
	u16 subnets;
	u16 flags; /* 1: encrypted, 2: its tasks' addresses are in natives */
	struct addr vtep;
	struct prefix subnet[MAX_SUBNETS];
};

/* Why a packet was dropped, and what was answered. Go: reasons in abi.go. */
enum count {
	MALFORMED,	/* shorter than its headers say */
	SPOOFED,	/* from a hardware address that the port has not */
	MULTICAST,	/* broadcast or multicast: not carried */
	OTHER_PROTO,	/* neither ARP, IPv4 nor IPv6 */
	UNKNOWN_MAC,	/* sent to a hardware address that nobody has */
	UNKNOWN_ADDR,	/* asked for an address that nobody has */
	NO_BALANCER,	/* to a service, and no balancer is loaded */
	REFUSED,	/* the kernel could not encapsulate or change it */
	TOO_BIG,	/* larger than the path: answered with ICMP */
	RX_UNKNOWN_MAC, /* from the underlay, to nobody here */
	RX_SOURCE,	/* from the underlay, from whom we do not know there */
	RX_PROTO,	/* from the underlay, neither IPv4 nor IPv6 */
	UNENCRYPTED,	/* of an encrypted network, in the clear: from the underlay, or on the way there */
	COUNTS
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mac_key);
	__type(value, struct dest);
} macs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ep_key);
	__type(value, struct ep);
} eps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, struct port);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, struct net);
} nets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTS);
	__type(key, u32);
	__type(value, u64);
} counts SEC(".maps");

/*
 * Programs by slot, for tail calls. A balancer puts itself into HOOK_BALANCE:
 * it gets packets whose destination MAC is a service's, writes a backend's
 * MAC into it and calls HOOK_FORWARD, which never comes back to it.
 */
enum { HOOK_BALANCE, HOOK_FORWARD, HOOKS };

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, HOOKS);
	__type(key, u32);
	__type(value, u32);
} hooks SEC(".maps");

static inline_always int drop(u32 why)
{
	u64 *n = bpf_map_lookup_elem(&counts, &why);

	if (n)
		*n += 1;
	return ACT_DROP;
}

static inline_always void *bytes(struct __sk_buff *skb)
{
	return (void *)(unsigned long)skb->data;
}

static inline_always void *end(struct __sk_buff *skb)
{
	return (void *)(unsigned long)skb->data_end;
}

/* linear makes the first n bytes readable, or all if the packet is shorter. */
static inline_always int linear(struct __sk_buff *skb, u64 n)
{
	if (likely(bytes(skb) + n <= end(skb)))
		return 0;
	if (skb->len < n)
		n = skb->len;
	if (n == (u64)(end(skb) - bytes(skb)))
		return 0; /* short, and all there */
	return bpf_skb_pull_data(skb, n);
}

static inline_always int same_addr(const struct addr *a, const struct addr *b)
{
	return !((a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]) | (a->w[3] ^ b->w[3]));
}

/*
 * Loads of n bits at once from packets and map values, wherever they begin:
 * clang takes structs apart into bytes where it knows no alignment, and hands
 * small ones over as numbers that it puts together from bytes again.
 */
#define at16(p) (*(u16 *)(p))
#define at32(p) (*(u32 *)(p))
#define at64(p) (*(u64 *)(p))

#define same_mac(a, b) (!((at32(&(a)) ^ at32(&(b))) | (at16((void *)&(a) + 4) ^ at16((void *)&(b) + 4))))

static inline_always struct addr mapped(u32 ip)
{
	return (struct addr){{0, 0, htonl(0xffff), ip}};
}

static inline_always int is_mapped(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == htonl(0xffff);
}

static inline_always u16 fold(s64 sum)
{
	u64 s = (u64)sum;

	s = (s & 0xffff) + (s >> 16 & 0xffff) + (s >> 32);
	s = (s & 0xffff) + (s >> 16);
	s = (s & 0xffff) + (s >> 16);
	return (u16)~s;
}

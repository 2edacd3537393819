/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flows of published ports that the nft engine's table has let in and led to a
 * backend on the ingress network, and what their packets need of the node.
 */
#pragma once
#include "../../../vxlan/bpf/c/answer.h"

#define MAX_MESH_FLOWS (1 << 16)
#define MAX_MESH_PASSING (1 << 15)
#define PUBLISHED_WORDS (2 * 65536 / 64)

/* A function that is checked once, whoever calls it. */
#define global __attribute__((noinline))
#define apart static __attribute__((noinline))

#define IPPROTO_FRAGMENT 44 /* RFC 8200 section 4.5 */
#define IPPROTO_SCTP 132 /* RFC 9260 */

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* linux/bpf.h */
static long (*const bpf_skb_store_bytes)(struct __sk_buff *skb, u32 at, const void *from, u32 len, u64 flags) = (void *)9;
static long (*const bpf_l3_csum_replace)(struct __sk_buff *skb, u32 at, u64 from, u64 to, u64 size) = (void *)10;
static long (*const bpf_l4_csum_replace)(struct __sk_buff *skb, u32 at, u64 from, u64 to, u64 flags) = (void *)11;
static long (*const bpf_skb_load_bytes)(const struct __sk_buff *skb, u32 at, void *to, u32 len) = (void *)26;
static long (*const bpf_map_push_elem)(void *map, const void *value, u64 flags) = (void *)87;
static long (*const bpf_map_pop_elem)(void *map, void *value) = (void *)88;
static u64 (*const bpf_jiffies64)(void) = (void *)118;

enum {
	F_PSEUDO_HDR = 1 << 4,
	F_MARK_MANGLED_0 = 1 << 5,
	NOEXIST = 1,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_QUEUE = 22,
};

/* Both ends of a flow, as its packets have them on one side of this node. */
struct ends {
	struct addr client, host;
	u16 cport, hport;
	u32 proto;
};

/* The way to a client by a link. */
struct hop {
	u32 mtu; /* largest packet in bytes */
	u32 family; /* of the next hop; 0: the routes of the host are asked for each packet */
	u32 nh[4]; /* all zero: the client itself */
};

/* What they are on the other side. mac is the backend's in either direction. */
struct turn {
	struct addr host;
	struct mac mac;
	u16 hport, cport;
	u16 zero;
	u32 link; /* by which the client comes */
	u32 seen; /* of requests: when both tables were last known to be right (now) */
	u32 state; /* of requests of TCP: enum state */
	u32 since; /* of requests of TCP: when it was last put among those that pass (now) */
	struct hop hop;
	struct addr vtep; /* of answers: the backend's node, as it was at first; all zero: it is here */
};

/* What a connection has come to, as the sum of what was seen of it. */
enum state {
	IS_OPEN = 1, /* the client has said more than its request */
	CLIENT_ENDS = 2,
	BACKEND_ENDS = 4,
	IS_RESET = 8,
};

/* A connection that may not last, by its request. */
struct passing {
	struct ends request;
	u32 since;
};

#define FAMILY6 (1U << 31)

/* Routes: clients of this prefix may be answered by this link. */
struct reach {
	u32 bits; /* of what follows */
	u32 link; /* with FAMILY6 if the client has IPv6: a route to all of IPv6 is none to IPv4 */
	struct addr client;
};

/* The node's leg on the ingress network, and the way from there. */
struct entry {
	u32 leg; /* ifindex; 0: nothing is done */
	u32 vni;
	u32 tunnel; /* ifindex of the VXLAN device */
	u16 udp;    /* network order */
	struct mac mac;
	struct addr vtep;
	u16 mtu; /* of the network's ports */
	u16 zero;
};

/* The flow that a packet may begin, which this CPU is taking through the host. */
struct fresh {
	struct ends ends;
	u32 hash; /* of the packet; 0: none */
	u32 link;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct entry);
} entry SEC(".maps");

/* One bit for each port, TCP's first. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PUBLISHED_WORDS);
	__type(key, u32);
	__type(value, u64);
} published SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct reach);
	__type(value, struct hop);
} reaches SEC(".maps");

/*
 * From whom a client asks to the backend, and from the backend to whom it asked:
 * connections. Those that last have room for MAX_MESH_FLOWS whatever passes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_MESH_FLOWS + MAX_MESH_PASSING);
	__type(key, struct ends);
	__type(value, struct turn);
} requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_MESH_FLOWS + MAX_MESH_PASSING);
	__type(key, struct ends);
	__type(value, struct turn);
} answers SEC(".maps");

/*
 * Connections that the client has only asked for, and those that have ended, in the
 * order in which they came to that. Where there is no more room the oldest is taken
 * out of the tables, unless it has become open.
 */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, MAX_MESH_PASSING);
	__type(value, struct passing);
} passings SEC(".maps");

/* The same for what is no TCP: that has no end to be seen, and crowds out itself alone. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_MESH_PASSING);
	__type(key, struct ends);
	__type(value, struct turn);
} requests_udp SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_MESH_PASSING);
	__type(key, struct ends);
	__type(value, struct turn);
} answers_udp SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct fresh);
} fresh SEC(".maps");

/*
 * Packets of flows that went through the host's stack: those to tasks, and those
 * from them. Past it nothing is counted.
 */
enum { SLOW_REQUESTS, SLOW_ANSWERS, SLOW_WAYS };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SLOW_WAYS);
	__type(key, u32);
	__type(value, u64);
} slow SEC(".maps");

/* A datagram in pieces: those without ports go where the first has gone. */
struct piece {
	struct addr src, dst;
	u32 id; /* as it is in the header */
	u32 proto;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct piece);
	__type(value, struct turn);
} fragments SEC(".maps");

/* now is the time in units of a quarter to two and a half seconds, as the kernel's clock ticks. */
static inline_always u32 now(void) { return bpf_jiffies64() >> 8; }

static inline_always struct entry *this_entry(void)
{
	u32 zero = 0;
	struct entry *e = bpf_map_lookup_elem(&entry, &zero);

	return e && e->leg ? e : 0;
}

static inline_always int is_published(u32 proto, u16 port)
{
	u32 n = ntohs(port) | (proto == IPPROTO_UDP) << 16, word = n / 64;
	u64 *bits = bpf_map_lookup_elem(&published, &word);

	return bits && *bits >> (n % 64) & 1;
}

/* count_slow counts a packet of these families. What has no ports is of no flow: errors, and who looks for neighbours or groups. */
static inline_always void count_slow(struct __sk_buff *skb, u32 way)
{
	int v4 = skb->protocol == htons(ETH_P_IP);
	u64 *n = bpf_map_lookup_elem(&slow, &way);
	u8 proto = 0;

	bpf_skb_load_bytes(skb, sizeof(struct eth) + (v4 ? 9 : 6), &proto, 1); /* RFC 791: protocol, RFC 8200: next header */
	if (n && (proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP || proto == IPPROTO_FRAGMENT))
		*n += 1;
}

/* reached is the way to a client by a link. 0: no route leads there. */
static inline_always struct hop *reached(u32 link, const struct addr *client)
{
	struct reach r = {.bits = 8 * (sizeof(r) - sizeof(r.bits)), .link = is_mapped(client) ? link : link | FAMILY6, .client = *client};

	return bpf_map_lookup_elem(&reaches, &r);
}

/* is_new tells the request for a connection from all else. */
static inline_always int is_new(u8 flags)
{
	return (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static inline_always struct turn *known_request(const struct ends *k)
{
	return k->proto == IPPROTO_TCP ? bpf_map_lookup_elem(&requests, k) : bpf_map_lookup_elem(&requests_udp, k);
}

static inline_always struct turn *known_answer(const struct ends *k)
{
	return k->proto == IPPROTO_TCP ? bpf_map_lookup_elem(&answers, k) : bpf_map_lookup_elem(&answers_udp, k);
}

static inline_always long file_request(const struct ends *k, const struct turn *t)
{
	return k->proto == IPPROTO_TCP ? bpf_map_update_elem(&requests, k, t, 0) : bpf_map_update_elem(&requests_udp, k, t, 0);
}

static inline_always long file_answer(const struct ends *k, const struct turn *t, u64 flags)
{
	return k->proto == IPPROTO_TCP ? bpf_map_update_elem(&answers, k, t, flags) : bpf_map_update_elem(&answers_udp, k, t, flags);
}

/* is_of reports whether an answer's flow is that of these ends of a request. */
static inline_always int is_of(const struct turn *answer, const struct ends *request)
{
	return same_addr(&answer->host, &request->host) && answer->hport == request->hport && answer->cport == request->cport;
}

/* lasts reports whether a connection is open, be it that one of them has closed its half. */
static inline_always int lasts(u32 state)
{
	return state & IS_OPEN && !(state & IS_RESET) && (state & (CLIENT_ENDS | BACKEND_ENDS)) != (CLIENT_ENDS | BACKEND_ENDS);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the lookups of recent packets have found, by CPU. An entry counts while
 * its epoch is the map's: the engine ends the epoch before it changes anything
 * that a lookup reads, and begins another one after it. Without an epoch (0)
 * every packet is looked up.
 */
#pragma once
#include "overlay.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} epoch SEC(".maps");

#define RECENT_BITS 9

/* An Ethernet header, in words. */
struct frame {
	u64 low;
	u32 high;
	u16 proto, zero;
};

enum { SENT_VXLAN, SENT_PLAIN, SENT_LOCAL };

/*
 * Where a port's frames to one hardware address go: to another node with VXLAN
 * over IPv4, or as they are if they are between these addresses of IPv4, or to a
 * local task.
 */
struct sent {
	u64 epoch;
	u64 low; /* of the frame, as the next */
	u32 high;
	u32 port;    /* where it came from */
	u32 ifindex; /* where it leaves; of a local task, the host's end of its veth */
	u16 kind;
	u16 mtu;
	u32 src, dst; /* of the outer header, or of the inner one that goes as it is */
	u64 vxlan;    /* as it is on the wire */
	u32 sum;      /* of the words of the outer header that are alike in all */
	u16 udp;
	struct mac mac; /* of a local task, or of the router */
	struct bpf_redir_neigh nh;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << RECENT_BITS);
	__type(key, u32);
	__type(value, struct sent);
} sents SEC(".maps");

/* The local task that a frame from another node over IPv4 is for, and may be. */
struct got {
	u64 epoch;
	struct frame frame; /* the inner one's header; its protocol is not compared */
	u64 vxlan;	    /* as it is on the wire, as the next */
	u64 addrs;
	u32 ifindex;
	u16 udp, zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << RECENT_BITS);
	__type(key, u32);
	__type(value, struct got);
} gots SEC(".maps");

/* The local task for packets without encapsulation from one address to another one. */
struct plain {
	u64 epoch;
	struct frame frame; /* that they get */
	u32 src, dst;
	u32 ifindex;
	u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << RECENT_BITS);
	__type(key, u32);
	__type(value, struct plain);
} plains SEC(".maps");

static inline_always u64 this_epoch(void)
{
	u32 zero = 0;
	u64 *e = bpf_map_lookup_elem(&epoch, &zero);

	return e ? *(volatile u64 *)e : 0;
}

/* settle keeps the lookups that follow behind the look at the epoch, for every processor. */
static inline_always void settle(void)
{
	u64 word = 0;

	asm volatile("" : : "r"(__sync_fetch_and_add(&word, 1)) : "memory");
}

static inline_always struct frame keep(const struct eth *eth)
{
	return (struct frame){.low = at64(eth), .high = at32((void *)eth + 8), .proto = eth->proto};
}

static inline_always void put(struct eth *eth, const struct frame *f)
{
	at64(eth) = f->low;
	at32((void *)eth + 8) = f->high;
	eth->proto = f->proto;
}

/* recent is where an entry of these values would be. */
static inline_always u32 recent(u64 a, u32 b, u32 c)
{
	return ((a ^ ((u64)b << 32 | c)) * 0x9e3779b97f4a7c15) >> (64 - RECENT_BITS);
}

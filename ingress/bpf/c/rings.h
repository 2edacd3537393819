/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The services of this node's networks and the rings of their backends, which
 * both programs read: balance at a task's veth and those of sockets.
 */
#pragma once
#include "../../../vxlan/bpf/c/overlay.h"

#define MAX_SERVICES 16384
#define MAX_CHUNKS (1 << 18)
#define CHUNK 64

/* A ring is named after its contents; size is a power of two from CHUNK on, 0 = nobody. */
struct service {
	u64 ring;
	u32 size;
	u32 zero;
};

/* Its slots lie in chunks: one entry for each slot would be eight times the memory. */
struct slot {
	u64 ring;
	u32 chunk;
	u32 zero;
};

struct chunk {
	struct ep slot[CHUNK];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SERVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ep_key);
	__type(value, struct service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CHUNKS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct slot);
	__type(value, struct chunk);
} slots SEC(".maps");

/*
 * pick takes the backend of a number from a service's ring. The ring may be
 * replaced between the two lookups: then the second try sees the new one.
 */
static inline_always struct ep *pick(const struct ep_key *key, u32 number)
{
	struct slot at = {};
	struct service *s;
	struct chunk *c;

#pragma unroll
	for (int try = 0; try < 2; try++) {
		s = bpf_map_lookup_elem(&services, key);
		if (!s || !s->size)
			return 0;
		at.ring = s->ring;
		number &= s->size - 1;
		at.chunk = number / CHUNK;
		c = bpf_map_lookup_elem(&slots, &at);
		if (c)
			return &c->slot[number % CHUNK];
	}
	return 0;
}

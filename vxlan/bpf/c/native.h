/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packets between nodes of one segment without VXLAN: the inner IP packet is
 * what is on the wire, between the hardware addresses of the nodes. The
 * addresses alone must tell the receiver what VXLAN's headers would: is_plain.
 */
#pragma once
#include "recent.h"

#define MAX_ECHOES 65536

/* A local task that may be sent packets as they are, by its address. */
struct native {
	u32 vni;
	u32 ifindex; /* the host's end of its veth */
	struct mac mac;
	u16 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct native);
} natives SEC(".maps");

/*
 * A probe shows that the segment carries the addresses of a network. The
 * program of the other node sends it back by the way of its own packets, so
 * that one echo proves both directions. It is of a protocol of its own (RFC
 * 3692): a firewall on the way that knows ports of nodes alone lets neither it
 * nor the tasks' packets through, and tasks' own packets of this protocol are
 * always encapsulated, so that none of them can make or spoil a proof.
 */
#define PROTO_PROBE 253
#define PROBE_MAGIC 0x77656674 /* "weft" */

struct probe { /* Go: marshalProbe */
	u32 magic;
	u8 kind, zero[3];
	u64 id;
};

enum { PROBE_ASK = 1, PROBE_ECHO = 2 };

struct echo_key {
	u32 vni;
	u32 family; /* AF_INET or AF_INET6, of the probe */
	struct addr vtep;
};

/* The last echo of each way. Whoever sent the probe reads it and takes it out. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ECHOES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct echo_key);
	__type(value, u64);
} echoes SEC(".maps");

/*
 * is_plain reports whether a packet is from its port's own address to the own
 * address of the task whose hardware address it has. Others go by VXLAN: what a
 * balancer has sent to a backend is still addressed to the service. The kernel
 * cannot send IPv6 to a neighbour of IPv4 (__bpf_redirect_neigh_v6).
 */
static inline_always int is_plain(struct __sk_buff *skb, const struct port *p, const struct dest *d, u16 proto)
{
	struct ep_key key = {.vni = p->vni};
	struct addr dst;
	struct eth *eth;
	struct ep *ep;

	/* clang would carry skb->data here as 32 bits, which is no pointer to the verifier. */
	asm volatile("" ::: "memory");
	eth = bytes(skb);
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb) || ip->proto == PROTO_PROBE)
			return 0;
		key.addr = mapped(ip->src);
		dst = mapped(ip->dst);
	} else {
		struct ipv6 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb) || ip->next == PROTO_PROBE || d->nh_family != AF_INET6)
			return 0;
		memcpy(key.addr.w, ip->src, 16);
		memcpy(dst.w, ip->dst, 16);
	}
	ep = bpf_map_lookup_elem(&eps, &key);
	if (!ep || !same_mac(ep->mac, p->mac))
		return 0;
	key.addr = dst;
	ep = bpf_map_lookup_elem(&eps, &key);
	return ep && same_mac(ep->mac, eth->dst);
}

static inline_always int as_it_is(const struct dest *d)
{
	struct bpf_redir_neigh nh = {.nh_family = d->nh_family, .nh = {d->nh[0], d->nh[1], d->nh[2], d->nh[3]}};

	return bpf_redirect_neigh(d->ifindex, &nh, sizeof(nh), 0);
}

/* probed takes a probe from a task's address at d: an echo is noted, another one sent back. */
static inline_always int probed(struct __sk_buff *skb, u32 vni, const struct dest *d, u32 proto)
{
	struct echo_key key = {.vni = vni, .family = proto == htons(ETH_P_IP) ? AF_INET : AF_INET6, .vtep = d->vtep};
	struct probe *probe;
	u64 id;

	if (linear(skb, sizeof(struct eth) + sizeof(struct ipv6) + sizeof(*probe)))
		return drop(MALFORMED);
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = bytes(skb) + sizeof(struct eth);
		u32 src;

		probe = (void *)(ip + 1);
		if ((void *)(probe + 1) > end(skb) || ip->vihl != 0x45 || probe->magic != htonl(PROBE_MAGIC))
			return drop(RX_PROTO);
		if (probe->kind == PROBE_ASK) {
			src = ip->src; /* changing places leaves the checksum as it is */
			ip->src = ip->dst;
			ip->dst = src;
		}
	} else {
		struct ipv6 *ip = bytes(skb) + sizeof(struct eth);
		u32 src[4];

		probe = (void *)(ip + 1);
		if ((void *)(probe + 1) > end(skb) || probe->magic != htonl(PROBE_MAGIC))
			return drop(RX_PROTO);
		if (probe->kind == PROBE_ASK) {
			memcpy(src, ip->src, 16);
			memcpy(ip->src, ip->dst, 16);
			memcpy(ip->dst, src, 16);
		}
	}
	if (probe->kind == PROBE_ECHO) {
		id = probe->id;
		bpf_map_update_elem(&echoes, &key, &id, 0);
		return ACT_DROP;
	}
	/* The way back must be one that packets of tasks can take. */
	if (probe->kind != PROBE_ASK || d->kind != DEST_DIRECT || !(d->flags & WAY_ON_LINK))
		return drop(RX_PROTO);
	if (proto != htons(ETH_P_IP) && d->nh_family != AF_INET6)
		return drop(RX_PROTO);
	probe->kind = PROBE_ECHO;
	return as_it_is(d);
}

/*
 * received_native gives a packet to the local task that has its destination
 * address, if the source is a task's of the same network on another node. What
 * is for nobody here is the host's.
 */
static inline_always int received_native(struct __sk_buff *skb)
{
	u32 proto = skb->protocol, slot = 0;
	u64 now = this_epoch();
	struct mac_key from = {};
	struct ep_key key = {};
	struct plain *r;
	struct native *n;
	struct addr dst;
	struct eth *eth;
	struct dest *d;
	struct ep *ep;
	u8 next;

	if (skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return ACT_NEXT;
	if (proto != htons(ETH_P_IP) && proto != htons(ETH_P_IPV6))
		return ACT_NEXT;
	if (linear(skb, sizeof(*eth) + sizeof(struct ipv6)))
		return ACT_NEXT;
	eth = bytes(skb);
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb))
			return ACT_NEXT;
		next = ip->proto;
		slot = recent(ip->src, ip->dst, 0);
		r = bpf_map_lookup_elem(&plains, &slot);
		if (r && now && r->epoch == now && r->src == ip->src && r->dst == ip->dst && next != PROTO_PROBE) {
			put(eth, &r->frame);
			return bpf_redirect_peer(r->ifindex, 0);
		}
		dst = mapped(ip->dst);
		key.addr = mapped(ip->src);
	} else {
		struct ipv6 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb))
			return ACT_NEXT;
		memcpy(dst.w, ip->dst, 16);
		memcpy(key.addr.w, ip->src, 16);
		next = ip->next;
	}
	settle();
	n = bpf_map_lookup_elem(&natives, &dst);
	if (likely(!n))
		return ACT_NEXT;
	key.vni = n->vni;
	ep = bpf_map_lookup_elem(&eps, &key);
	if (unlikely(!ep))
		return drop(RX_SOURCE);
	from.vni = n->vni;
	from.mac = ep->mac;
	d = bpf_map_lookup_elem(&macs, &from);
	if (unlikely(!d || (d->kind != DEST_DIRECT && d->kind != DEST_TUNNEL)))
		return drop(RX_SOURCE);
	if (unlikely(next == PROTO_PROBE))
		return probed(skb, n->vni, d, proto);
	eth->dst = n->mac;
	eth->src = ep->mac;
	if (proto == htons(ETH_P_IP)) {
		r = bpf_map_lookup_elem(&plains, &slot);
		if (r)
			*r = (struct plain){.epoch = now, .frame = keep(eth), .src = key.addr.w[3], .dst = dst.w[3], .ifindex = n->ifindex};
	}
	return bpf_redirect_peer(n->ifindex, 0);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What becomes of a packet whose flow is known. */
#pragma once
#include "mesh.h"

#define OUTER4 (sizeof(struct ipv4) + sizeof(struct udp) + sizeof(struct vxlan) + sizeof(struct eth))
#define OUTER6 (sizeof(struct ipv6) + sizeof(struct udp) + sizeof(struct vxlan) + sizeof(struct eth))
#define VXLAN_VALID 0x08000000 /* RFC 7348 section 5: the I flag */
#define IP_DF 0x4000
#define IP_FRAGMENT 0x3fff /* more fragments, and the offset */
#define ECN_CE 3	   /* RFC 3168 */
#define MIN_MTU6 1280
#define MSS_HEADERS4 (sizeof(struct ipv4) + sizeof(struct tcp))
#define MSS_HEADERS6 (sizeof(struct ipv6) + sizeof(struct tcp))
#define TCP_OPTION_MSS 2 /* RFC 9293 section 3.2 */
#define TCP_OPTIONS 16	 /* that are looked at: the largest segment is most often the first */

/*
 * rewrite gives a packet the ends that it has on the other side. to_host: it is
 * the client's, whose destination is the host. Sums that are left to hardware
 * stay left to it.
 */
static inline_always int rewrite(struct __sk_buff *skb, int v4, int to_host, const struct ends *k, const struct turn *t)
{
	const u32 l4 = sizeof(struct eth) + (v4 ? sizeof(struct ipv4) : sizeof(struct ipv6));
	u32 sum = l4 + (k->proto == IPPROTO_TCP ? 16 : 6); /* RFC 9293, RFC 768 */
	u64 udp = k->proto == IPPROTO_UDP ? F_MARK_MANGLED_0 : 0;
	u32 was, is, *ports;

	if (to_host) {
		was = k->cport | (u32)k->hport << 16;
		is = t->cport | (u32)t->hport << 16;
	} else {
		was = k->hport | (u32)k->cport << 16;
		is = t->hport | (u32)t->cport << 16;
	}
	if (was != is && bpf_l4_csum_replace(skb, sum, was, is, 4 | udp))
		return -1;
	if (v4) {
		u32 from = k->host.w[3], to = t->host.w[3];
		struct ipv4 *ip;

		if (bpf_l4_csum_replace(skb, sum, from, to, 4 | F_PSEUDO_HDR | udp))
			return -1;
		ip = bytes(skb) + sizeof(struct eth);
		ports = (void *)(ip + 1);
		if ((void *)(ports + 1) > end(skb))
			return -1;
		/* RFC 1624, equation 3 */
		ip->csum = fold((u64)(u16)~ip->csum + (u16)~from + (u16)~(from >> 16) + (u16)to + (u16)(to >> 16));
		if (to_host)
			ip->dst = to;
		else
			ip->src = to;
	} else {
		struct ipv6 *ip;
		s64 diff = bpf_csum_diff((void *)&k->host, 16, (void *)&t->host, 16, 0);

		if (bpf_l4_csum_replace(skb, sum, 0, diff, F_PSEUDO_HDR | udp))
			return -1;
		ip = bytes(skb) + sizeof(struct eth);
		ports = (void *)(ip + 1);
		if ((void *)(ports + 1) > end(skb))
			return -1;
		memcpy(to_host ? ip->dst : ip->src, t->host.w, 16);
	}
	*ports = is;
	return 0;
}

/* outer_ecn: RFC 6040 section 4.1, normal mode: CE starts anew as ECT(0). */
static inline_always u8 outer_ecn(u8 inner)
{
	inner &= ECN_CE;
	return inner == ECN_CE ? 2 : inner;
}

/* by_tunnel lets the kernel's VXLAN device carry the packet, fragments and all. */
static inline_always int by_tunnel(struct __sk_buff *skb, const struct entry *e, const struct dest *d)
{
	struct bpf_tunnel_key key = {.tunnel_id = e->vni, .ttl = 64};
	u64 flags;

	if (is_mapped(&d->vtep)) {
		key.remote[0] = ntohl(d->vtep.w[3]);
		key.local[0] = ntohl(e->vtep.w[3]);
		flags = ZERO_CSUM_TX;
	} else {
		memcpy(key.remote, d->vtep.w, 16);
		memcpy(key.local, e->vtep.w, 16);
		flags = TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags))
		return drop(REFUSED);
	return bpf_redirect(e->tunnel, 0);
}

/*
 * wrap sends the frame to the node d in VXLAN, as the overlay's program does. If it
 * is routed already, it must be anew: what waits for a neighbour is sent by its route.
 */
static inline_always int wrap(struct __sk_buff *skb, const struct entry *e, const struct dest *d, u8 ecn, int is_routed)
{
	struct bpf_redir_neigh nh = {.nh_family = d->nh_family, .nh = {d->nh[0], d->nh[1], d->nh[2], d->nh[3]}};
	u32 hash = bpf_get_hash_recalc(skb), ifindex = d->ifindex, len = skb->len;
	struct udp udp = {.src = htons(0xc000 | (hash & 0x3fff)), .dst = d->udp};
	const struct vxlan vx = {.flags = htonl(VXLAN_VALID), .vni = htonl(e->vni << 8)};
	const u64 flags = ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET | ADJ_ENCAP_L4_UDP | ADJ_ENCAP_L2_ETH | ADJ_ENCAP_L2(sizeof(struct eth));
	struct addr remote = d->vtep;
	struct eth *eth = bytes(skb);
	struct {
		u64 low;
		u32 high;
		u16 proto;
	} in;
	void *at;

	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	in.low = at64(eth);
	in.high = at32((void *)eth + 8);
	in.proto = eth->proto;
	if (is_mapped(&remote)) {
		struct ipv4 ip = {.vihl = 0x45, .tos = ecn, .id = (u16)(hash >> 16 ^ len), .ttl = 64, .proto = IPPROTO_UDP, .src = e->vtep.w[3], .dst = remote.w[3]};

		if (bpf_skb_adjust_room(skb, OUTER4, ADJ_ROOM_MAC, flags | ADJ_ENCAP_L3_IPV4))
			return drop(REFUSED);
		eth = bytes(skb);
		if ((void *)eth + OUTER4 + sizeof(*eth) > end(skb))
			return drop(REFUSED);
		ip.len = htons(len + OUTER4 - sizeof(*eth));
		ip.csum = fold((u64)(htons(0x4500 | ecn)) + ip.len + ip.id + htons(64 << 8 | IPPROTO_UDP) + (ip.src & 0xffff) + (ip.src >> 16) + (ip.dst & 0xffff) + (ip.dst >> 16));
		eth->proto = htons(ETH_P_IP);
		*(struct ipv4 *)(eth + 1) = ip;
		at = (void *)(eth + 1) + sizeof(ip);
	} else {
		struct ipv6 *ip;

		if (bpf_skb_adjust_room(skb, OUTER6, ADJ_ROOM_MAC, flags | ADJ_ENCAP_L3_IPV6))
			return drop(REFUSED);
		eth = bytes(skb);
		if ((void *)eth + OUTER6 + sizeof(*eth) > end(skb))
			return drop(REFUSED);
		eth->proto = htons(ETH_P_IPV6);
		ip = (void *)(eth + 1);
		ip->flow = htonl(0x60000000 | (u32)ecn << 20);
		ip->len = htons(len + sizeof(udp) + sizeof(vx));
		ip->next = IPPROTO_UDP;
		ip->hops = 64;
		memcpy(ip->src, e->vtep.w, 16);
		memcpy(ip->dst, remote.w, 16);
		at = (void *)(ip + 1);
	}
	udp.len = htons(len + sizeof(udp) + sizeof(vx));
	*(struct udp *)at = udp; /* the sum is zero: RFC 6935 */
	*(struct vxlan *)(at + sizeof(udp)) = vx;
	at += sizeof(udp) + sizeof(vx);
	at64(at) = in.low;
	at32(at + 8) = in.high;
	at16(at + 12) = in.proto;
	if (is_routed)
		return bpf_redirect_neigh(ifindex, 0, 0, 0);
	return bpf_redirect_neigh(ifindex, &nh, sizeof(nh), 0);
}

/* send takes a packet that is addressed to the backend there. */
static inline_always int send(struct __sk_buff *skb, const struct entry *e, const struct dest *d, const struct mac *mac, int tunnel, u8 tos)
{
	struct eth *eth = bytes(skb);

	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	eth->dst = *mac;
	eth->src = e->mac;
	if (d->kind == DEST_TASK)
		return bpf_redirect(d->ifindex, 0);
	return tunnel ? by_tunnel(skb, e, d) : wrap(skb, e, d, outer_ecn(tos), 0);
}

/* too_big tells the sender of a packet how large one may be. */
static inline_always int too_big(struct __sk_buff *skb, int v4, u32 mtu)
{
	drop(TOO_BIG);
	if (v4)
		return icmp4(skb, ICMP_UNREACH, ICMP_UNREACH_NEEDFRAG, htonl(mtu)); /* RFC 1191 */
	return icmp6(skb, ICMPV6_TOO_BIG, 0, htonl(mtu < MIN_MTU6 ? MIN_MTU6 : mtu));
}

/*
 * way_to finds how the backend gets a packet of that size: its entry, or 0 with
 * what else becomes of the packet.
 */
static inline_always struct dest *way_to(struct __sk_buff *skb, const struct entry *e, int v4, const struct mac *mac, u32 size, int df, int *tunnel, int *verdict)
{
	struct mac_key to = {.vni = e->vni, .mac = *mac};
	struct dest *d = bpf_map_lookup_elem(&macs, &to);
	u32 mtu;

	*verdict = ACT_NEXT;
	if (!d || (d->kind != DEST_DIRECT && d->kind != DEST_TUNNEL && d->kind != DEST_TASK))
		return 0;
	mtu = d->kind == DEST_TASK ? e->mtu : d->mtu;
	*tunnel = d->kind == DEST_TUNNEL;
	if (unlikely(size > mtu)) {
		/* As the overlay's program does: the outer packet is cut where the inner one may be. */
		if (d->kind == DEST_TASK || (v4 ? df : size > MIN_MTU6)) {
			*verdict = too_big(skb, v4, mtu);
			return 0;
		}
		*tunnel = 1;
	}
	return d;
}

static inline_always int to_backend(struct __sk_buff *skb, const struct entry *e, int v4, const struct ends *k, const struct turn *t, u32 size, u8 tos, int df)
{
	int tunnel, verdict;
	struct dest *d = way_to(skb, e, v4, &t->mac, size, df, &tunnel, &verdict);

	if (!d)
		return verdict;
	if (rewrite(skb, v4, 1, k, t))
		return drop(REFUSED);
	return send(skb, e, d, &t->mac, tunnel, tos);
}

/* to_client sends a packet that is addressed to the client by the flow's link. */
static inline_always int to_client(const struct ends *k, const struct turn *t)
{
	struct bpf_redir_neigh nh = {.nh_family = t->hop.family, .nh = {t->hop.nh[0], t->hop.nh[1], t->hop.nh[2], t->hop.nh[3]}};

	if (!t->hop.family)
		return bpf_redirect_neigh(t->link, 0, 0, 0);
	if (!(nh.nh[0] | nh.nh[1] | nh.nh[2] | nh.nh[3])) {
		if (nh.nh_family == AF_INET)
			nh.nh[0] = k->client.w[3];
		else
			memcpy(nh.nh, k->client.w, 16);
	}
	return bpf_redirect_neigh(t->link, &nh, sizeof(nh), 0);
}

/* unwrap takes outer bytes off. */
static inline_always int unwrap(struct __sk_buff *skb, u32 outer, int v4)
{
	struct eth *eth;

	if (bpf_skb_adjust_room(skb, -(s32)outer, ADJ_ROOM_MAC, ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET | (v4 ? ADJ_DECAP_L3_IPV4 : ADJ_DECAP_L3_IPV6)))
		return -1;
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return -1;
	eth->proto = v4 ? htons(ETH_P_IP) : htons(ETH_P_IPV6);
	/* A checksum that the device has verified is now the inner one. */
	bpf_csum_level(skb, CSUM_LEVEL_DEC);
	return 0;
}

/* clamp lowers the largest segment that a side of a connection announces to what fits both ways. */
global int clamp(struct __sk_buff *skb, u32 v4, u32 mtu)
{
	const u32 l4 = sizeof(struct eth) + (v4 ? sizeof(struct ipv4) : sizeof(struct ipv6));
	u32 at = l4 + sizeof(struct tcp), stop;
	u16 largest, announced;
	u8 option[4], off;

	if (mtu <= MSS_HEADERS6 || bpf_skb_load_bytes(skb, l4 + 12, &off, 1)) /* RFC 9293: data offset */
		return 0;
	largest = mtu - (v4 ? MSS_HEADERS4 : MSS_HEADERS6);
	stop = l4 + (off >> 4) * 4;
	for (int i = 0; i < TCP_OPTIONS && at + 4 <= stop; i++) {
		if (bpf_skb_load_bytes(skb, at, option, 4) || !option[0])
			return 0;
		if (option[0] == TCP_OPTION_MSS && option[1] == 4) {
			announced = option[2] << 8 | option[3];
			if (announced <= largest)
				return 0;
			/* At an odd place its bytes stand in two words of the sum. */
			if ((at - l4) & 1)
				bpf_l4_csum_replace(skb, l4 + 16, announced, largest, 2);
			else
				bpf_l4_csum_replace(skb, l4 + 16, htons(announced), htons(largest), 2);
			largest = htons(largest);
			bpf_skb_store_bytes(skb, at + 2, &largest, 2, 0);
			return 0;
		}
		if (option[0] == 1) { /* no operation */
			at++;
			continue;
		}
		if (option[1] < 2)
			return 0;
		at += option[1];
	}
	return 0;
}

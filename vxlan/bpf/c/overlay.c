// SPDX-License-Identifier: Apache-2.0
/*
 * The overlay's data path.
 *
 * from_task     at the host's end of a task's veth, ingress, or at the task's end
 *               of a netkit pair, where what the task sends begins
 * from_underlay at the device that has the VTEP's address, ingress; it shares
 *               the device, so what is not ours goes on to the next program
 * from_native   instead of it while a network of this node may go without VXLAN
 * from_tunnel   at our VXLAN device, ingress: what the kernel decapsulated
 *               (reassembled fragments, other underlay devices, the host leg)
 * forward       from_task for a packet that a balancer gave back
 */
#include "answer.h"
#include "native.h"
#include "recent.h"

#define OUTER4 (sizeof(struct ipv4) + sizeof(struct udp) + sizeof(struct vxlan) + sizeof(struct eth))
#define OUTER6 (sizeof(struct ipv6) + sizeof(struct udp) + sizeof(struct vxlan) + sizeof(struct eth))
#define VXLAN_VALID 0x08000000 /* RFC 7348 section 5: the I flag */
#define IP_DF 0x4000
#define IP_FRAGMENT 0x3fff /* more fragments, and the offset */
#define ECN_CE 3	   /* RFC 3168 */
#define MIN_MTU6 1280
#define UNKNOWN -2 /* no verdict */

/* Set when the programs are loaded: the kernel switches the protocol on decapsulation (6.3). */
const volatile u8 can_switch_family = 0;

/* Outer IPv4 identifications (RFC 6864), a count for each CPU in a cache line of its own. */
#define ID_CPUS 256
struct {
	u32 next, zero[15];
} ids[ID_CPUS];

/*
 * outer_id is unlike that of other packets under way between two nodes: CPUs
 * begin far from each other, and a random number costs ten times as much.
 */
static inline_always u16 outer_id(void)
{
	u32 cpu = bpf_get_smp_processor_id() & (ID_CPUS - 1);

	return (u16)(cpu * (0x10000 / ID_CPUS) + ids[cpu].next++);
}

/* outer_ecn: RFC 6040 section 4.1, normal mode: CE starts anew as ECT(0). */
static inline_always u8 outer_ecn(u8 inner)
{
	inner &= ECN_CE;
	return inner == ECN_CE ? 2 : inner;
}

/*
 * inner_size is the length in bytes of the largest inner packet that leaves
 * the device: that of one segment if the kernel still has to cut it.
 */
static inline_always u32 inner_size(struct __sk_buff *skb, u16 proto)
{
	u32 l3 = sizeof(struct ipv4), l4 = sizeof(struct udp);
	u8 next;
	void *data, *stop;

	if (likely(!skb->gso_size))
		return skb->len - sizeof(struct eth);
	data = bytes(skb);
	stop = end(skb);
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > stop)
			return 0;
		l3 = (ip->vihl & 15) * 4;
		next = ip->proto;
	} else {
		struct ipv6 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > stop)
			return 0;
		l3 = sizeof(*ip);
		next = ip->next;
	}
	if (next == IPPROTO_TCP) {
		u8 *off = data + sizeof(struct eth) + l3 + 12; /* RFC 9293: data offset */

		if ((void *)(off + 1) > stop)
			return 0;
		l4 = (*off >> 4) * 4;
	}
	return l3 + l4 + skb->gso_size;
}

/* by_tunnel lets the kernel's VXLAN device carry the packet, fragments and all. */
static inline_always int by_tunnel(struct __sk_buff *skb, const struct port *p, const struct dest *d)
{
	struct bpf_tunnel_key key = {.tunnel_id = p->vni, .ttl = 64};
	u64 flags;

	if (is_mapped(&d->vtep)) {
		key.remote[0] = ntohl(d->vtep.w[3]);
		key.local[0] = ntohl(p->vtep.w[3]);
		flags = ZERO_CSUM_TX;
	} else {
		memcpy(key.remote, d->vtep.w, 16);
		memcpy(key.local, p->vtep.w, 16);
		flags = TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags))
		return drop(REFUSED);
	return bpf_redirect(p->tunnel, 0);
}

/*
 * Segment sizes stay as they are (ADJ_FIXED_GSO): the port's MTU has left the
 * room for the outer headers already.
 */
static inline_always int encap4(struct __sk_buff *skb, struct sent *to, u8 tos)
{
	u16 port = 0xc000 | (bpf_get_hash_recalc(skb) & 0x3fff);
	u32 len = skb->len;
	struct eth *eth, *in;
	struct ipv4 *ip;
	struct udp *udp;
	struct vxlan *vx;
	u16 id = outer_id(), size;
	u32 sum;

	if (bpf_skb_adjust_room(skb, OUTER4, ADJ_ROOM_MAC,
				ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET | ADJ_ENCAP_L3_IPV4 | ADJ_ENCAP_L4_UDP | ADJ_ENCAP_L2_ETH |
					ADJ_ENCAP_L2(sizeof(struct eth))))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	udp = (void *)(ip + 1);
	vx = (void *)(udp + 1);
	in = (void *)(vx + 1);
	if ((void *)(in + 1) > end(skb))
		return drop(REFUSED);
	at64(in) = to->low;
	at32((void *)in + 8) = to->high;
	in->proto = eth->proto;
	eth->proto = htons(ETH_P_IP);
	size = htons(len + OUTER4 - sizeof(struct eth));
	/* From registers: what was just stored in other widths is slow to load. */
	sum = to->sum + htons(tos) + size + id;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (u16) ~((sum & 0xffff) + (sum >> 16));
	at64(ip) = htons(0x4500 | tos) | (u32)size << 16 | (u64)id << 32;
	at64((void *)ip + 8) = htons(64 << 8 | IPPROTO_UDP) | sum << 16 | (u64)to->src << 32;
	ip->dst = to->dst;
	at64(udp) = htons(port) | (u32)to->udp << 16 | (u64)htons(len + sizeof(*udp) + sizeof(*vx)) << 32;
	at64(vx) = to->vxlan;
	return bpf_redirect_neigh(to->ifindex, &to->nh, sizeof(to->nh), 0);
}

/*
 * is_netkit: a task's end of a netkit pair runs the program when it sends, before
 * any device has received the packet, and shows the host's end as the device.
 */
static inline_always int is_netkit(struct __sk_buff *skb)
{
	return !skb->ingress_ifindex;
}

/* to_task gives a packet to a local task, or to the router, whose hardware address is mac. */
static inline_always int to_task(struct __sk_buff *skb, u32 ifindex, const struct mac *mac)
{
	struct eth *eth;

	if (is_netkit(skb)) {
		/* No device receives here: the host's end there sends it to the far one. */
		asm volatile("" : "+r"(skb) : : "memory"); /* as in is_plain */
		eth = bytes(skb);
		if ((void *)(eth + 1) > end(skb))
			return drop(MALFORMED);
		at32(&eth->dst) = at32(mac);
		at16((void *)&eth->dst + 4) = at16((void *)mac + 4);
		return bpf_redirect(ifindex, 0);
	}
	/* The router takes frames to the hardware addresses of all who are elsewhere. */
	if (bpf_skb_change_type(skb, PACKET_HOST))
		return drop(REFUSED);
	return bpf_redirect_peer(ifindex, 0);
}

/*
 * by_recent sends a packet as the last one of its kind was sent. UNKNOWN: there
 * was none, or it is not of a kind.
 */
static inline_always int by_recent(struct __sk_buff *skb)
{
	struct eth *eth = bytes(skb);
	struct ipv4 *ip = (void *)(eth + 1);
	u32 slot, size, port = skb->ifindex;
	u64 now = this_epoch();
	struct sent *to;
	struct frame f;
	u8 tos;

	if ((void *)(ip + 1) > end(skb) || skb->vlan_present)
		return UNKNOWN;
	f = keep(eth);
	/* What a task sends by a packet socket may be of another protocol to the kernel. */
	if (f.proto != skb->protocol)
		return UNKNOWN;
	if (f.proto == htons(ETH_P_IP)) {
		tos = ip->tos;
	} else {
		struct ipv6 *ip6 = (void *)(eth + 1);

		/* ICMPv6 may ask the program itself. */
		if (f.proto != htons(ETH_P_IPV6) || (void *)(ip6 + 1) > end(skb) || ip6->next == IPPROTO_ICMPV6)
			return UNKNOWN;
		tos = ntohl(ip6->flow) >> 20;
	}
	slot = recent(f.low, f.high, port);
	to = bpf_map_lookup_elem(&sents, &slot);
	if (!to || !now || to->epoch != now || to->low != f.low || to->high != f.high || to->port != port)
		return UNKNOWN;
	if (to->kind == SENT_LOCAL)
		return to_task(skb, to->ifindex, &to->mac);
	size = inner_size(skb, f.proto);
	if (!size || size > to->mtu)
		return UNKNOWN;
	if (to->kind == SENT_VXLAN)
		return encap4(skb, to, outer_ecn(tos));
	if (f.proto != htons(ETH_P_IP) || ip->src != to->src || ip->dst != to->dst || ip->proto == PROTO_PROBE)
		return UNKNOWN;
	return bpf_redirect_neigh(to->ifindex, &to->nh, sizeof(to->nh), 0);
}

/* sending is the entry of a packet's kind, made anew. */
static inline_always struct sent *sending(struct __sk_buff *skb, u64 now, u16 kind, const struct dest *d)
{
	struct bpf_redir_neigh nh = {.nh_family = d->nh_family, .nh = {d->nh[0], d->nh[1], d->nh[2], d->nh[3]}};
	u32 slot, port = skb->ifindex;
	struct eth *eth;
	struct sent *to;
	struct frame f;

	asm volatile("" : "+r"(skb) : : "memory"); /* as in is_plain */
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return 0;
	f = keep(eth);
	slot = recent(f.low, f.high, port);
	to = bpf_map_lookup_elem(&sents, &slot);
	if (to)
		*to = (struct sent){.epoch = now, .low = f.low, .high = f.high, .port = port, .ifindex = d->ifindex, .kind = kind, .mtu = d->mtu, .nh = nh};
	return to;
}

static inline_always int by_vxlan4(struct __sk_buff *skb, u64 now, const struct port *p, const struct dest *d, u8 tos)
{
	struct sent *to = sending(skb, now, SENT_VXLAN, d);

	if (!to)
		return drop(MALFORMED);
	to->src = p->vtep.w[3];
	to->dst = d->vtep.w[3];
	to->sum = htons(0x4500) + htons(64 << 8 | IPPROTO_UDP) + (to->src & 0xffff) + (to->src >> 16) + (to->dst & 0xffff) + (to->dst >> 16);
	to->udp = d->udp;
	to->vxlan = htonl(VXLAN_VALID) | (u64)htonl(p->vni << 8) << 32;
	return encap4(skb, to, tos);
}

/* The outer checksum is zero, as RFC 6935 allows tunnels. */
static inline_always int encap6(struct __sk_buff *skb, const struct port *p, const struct dest *d, u8 tos)
{
	struct bpf_redir_neigh nh = {.nh_family = AF_INET6, .nh = {d->nh[0], d->nh[1], d->nh[2], d->nh[3]}};
	u16 port = 0xc000 | (bpf_get_hash_recalc(skb) & 0x3fff);
	u32 len = skb->len;
	struct eth *eth = bytes(skb), *in;
	struct frame was;
	struct ipv6 *ip;
	struct udp *udp;
	struct vxlan *vx;

	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	was = keep(eth);
	if (bpf_skb_adjust_room(skb, OUTER6, ADJ_ROOM_MAC,
				ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET | ADJ_ENCAP_L3_IPV6 | ADJ_ENCAP_L4_UDP | ADJ_ENCAP_L2_ETH |
					ADJ_ENCAP_L2(sizeof(struct eth))))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	udp = (void *)(ip + 1);
	vx = (void *)(udp + 1);
	in = (void *)(vx + 1);
	if ((void *)(in + 1) > end(skb))
		return drop(REFUSED);
	eth->proto = htons(ETH_P_IPV6);
	ip->flow = htonl(0x60000000 | (u32)tos << 20);
	ip->len = htons(len + sizeof(*udp) + sizeof(*vx));
	ip->next = IPPROTO_UDP;
	ip->hops = 64;
	memcpy(ip->src, p->vtep.w, 16);
	memcpy(ip->dst, d->vtep.w, 16);
	*udp = (struct udp){.src = htons(port), .dst = d->udp, .len = ip->len};
	*vx = (struct vxlan){.flags = htonl(VXLAN_VALID), .vni = htonl(p->vni << 8)};
	put(in, &was);
	return bpf_redirect_neigh(d->ifindex, &nh, sizeof(nh), 0);
}

/* note_plain files that packets between these addresses go as they are. */
static inline_always void note_plain(struct __sk_buff *skb, u64 now, const struct dest *d)
{
	struct sent *to = sending(skb, now, SENT_PLAIN, d);
	struct ipv4 *ip;

	asm volatile("" : "+r"(skb) : : "memory");
	ip = bytes(skb) + sizeof(struct eth);
	if (!to || (void *)(ip + 1) > end(skb))
		return;
	to->src = ip->src;
	to->dst = ip->dst;
}

static inline_always int to_node(struct __sk_buff *skb, const struct port *p, const struct dest *d, u16 proto, u64 now)
{
	u32 size = inner_size(skb, proto);
	void *l3 = bytes(skb) + sizeof(struct eth);
	u8 tos;

	if (unlikely(!p->udp))
		return drop(UNENCRYPTED); /* there is no such entry */
	if (l3 + sizeof(struct ipv6) > end(skb)) {
		if (proto != htons(ETH_P_IP) || l3 + sizeof(struct ipv4) > end(skb))
			return drop(MALFORMED);
	}
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = l3;

		if (unlikely(size > d->mtu)) {
			/* Who lets routers cut the packet gets it cut: the outer one is. */
			if (!(ip->frag & htons(IP_DF)))
				return by_tunnel(skb, p, d);
			drop(TOO_BIG);
			return icmp4(skb, ICMP_UNREACH, ICMP_UNREACH_NEEDFRAG, htonl(d->mtu)); /* RFC 1191 */
		}
		tos = ip->tos;
	} else {
		if (unlikely(size > d->mtu)) {
			/* Every link of IPv6 carries as much (RFC 8200 section 5): the outer packet is cut. */
			if (size <= MIN_MTU6)
				return by_tunnel(skb, p, d);
			drop(TOO_BIG);
			return icmp6(skb, ICMPV6_TOO_BIG, 0, htonl(d->mtu < MIN_MTU6 ? MIN_MTU6 : d->mtu));
		}
		if (l3 + sizeof(u32) > end(skb))
			return drop(MALFORMED);
		tos = ntohl(*(u32 *)l3) >> 20;
	}
	if (unlikely(d->kind == DEST_TUNNEL))
		return by_tunnel(skb, p, d);
	if (d->flags == (WAY_NATIVE | WAY_ON_LINK)) {
		if (is_plain(skb, p, d, proto)) {
			if (proto == htons(ETH_P_IP))
				note_plain(skb, now, d);
			return as_it_is(d);
		}
		now = 0; /* the next packet may be */
	}
	if (likely(d->nh_family == AF_INET && is_mapped(&d->vtep)))
		return by_vxlan4(skb, now, p, d, outer_ecn(tos));
	return encap6(skb, p, d, outer_ecn(tos));
}

/* answer_arp answers a request for what is elsewhere, and for local tasks too. */
static inline_always int answer_arp(struct __sk_buff *skb, const struct port *p)
{
	struct ep_key key = {.vni = p->vni};
	struct eth *eth;
	struct arp *arp;
	struct ep *ep;
	u32 asker;

	if (linear(skb, sizeof(*eth) + sizeof(*arp)))
		return drop(MALFORMED);
	eth = bytes(skb);
	arp = (void *)(eth + 1);
	if ((void *)(arp + 1) > end(skb))
		return drop(MALFORMED);
	if (arp->op != htons(1) || arp->hrd != htons(1) || arp->pro != htons(ETH_P_IP))
		return drop(MULTICAST);
	key.addr = mapped(arp->tpa);
	ep = bpf_map_lookup_elem(&eps, &key);
	if (!ep)
		return drop(UNKNOWN_ADDR);
	if (same_mac(ep->mac, p->mac))
		return drop(UNKNOWN_ADDR); /* its own: nobody else has it */
	asker = arp->spa;
	eth->dst = arp->sha;
	eth->src = ep->mac;
	arp->op = htons(2);
	arp->tha = arp->sha;
	arp->sha = ep->mac;
	arp->spa = arp->tpa;
	arp->tpa = asker;
	return bpf_redirect(skb->ifindex, 0);
}

struct advert { /* RFC 4861 section 4.4 with the target's hardware address */
	u8 type, code;
	u16 csum;
	u32 flags;
	struct addr target;
	u8 opt, optlen;
	struct mac mac;
};

/* answer_solicit answers a neighbour solicitation (RFC 4861 section 7.2.4). */
static inline_always int answer_solicit(struct __sk_buff *skb, const struct port *p)
{
	const u32 size = sizeof(struct eth) + sizeof(struct ipv6) + sizeof(struct advert);
	struct {
		struct addr src, dst;
		u32 len, next;
		struct advert nd;
	} m = {}; /* as struct pseudo6, and what it covers */
	struct ep_key key = {.vni = p->vni};
	struct eth *eth;
	struct ipv6 *ip;
	struct advert *nd;
	struct ep *ep;
	struct mac asker;

	if (linear(skb, size))
		return drop(MALFORMED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	nd = (void *)(ip + 1);
	if ((void *)nd + 24 > end(skb)) /* a solicitation without options */
		return drop(MALFORMED);
	memcpy(key.addr.w, nd->target.w, 16);
	memcpy(m.dst.w, ip->src, 16);
	asker = eth->src;
	if (!(m.dst.w[0] | m.dst.w[1] | m.dst.w[2] | m.dst.w[3]))
		return drop(UNKNOWN_ADDR); /* a test for duplicates: addresses are given, not found */
	ep = bpf_map_lookup_elem(&eps, &key);
	if (!ep || same_mac(ep->mac, p->mac))
		return drop(UNKNOWN_ADDR);
	m.src = key.addr;
	m.len = htonl(sizeof(m.nd));
	m.next = htonl(IPPROTO_ICMPV6);
	m.nd.type = ND_ADVERT;
	m.nd.flags = htonl(0x60000000); /* solicited, override */
	m.nd.target = key.addr;
	m.nd.opt = 2;
	m.nd.optlen = 1;
	m.nd.mac = ep->mac;
	m.nd.csum = fold(bpf_csum_diff(0, 0, (void *)&m, sizeof(m), 0));
	if (bpf_skb_change_tail(skb, size, 0) || linear(skb, size))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	nd = (void *)(ip + 1);
	if ((void *)(nd + 1) > end(skb))
		return drop(REFUSED);
	eth->dst = asker;
	eth->src = m.nd.mac;
	ip->flow = htonl(0x60000000);
	ip->len = htons(sizeof(*nd));
	ip->hops = 255;
	memcpy(ip->src, m.src.w, 16);
	memcpy(ip->dst, m.dst.w, 16);
	*nd = m.nd;
	return bpf_redirect(skb->ifindex, 0);
}

/* to_local gives a packet for dst to the port that d leads to, under the hardware address of its far end. */
static inline_always int to_local(struct __sk_buff *skb, u64 now, const struct dest *d, const struct mac *dst)
{
	u32 ifindex = d->ifindex;
	struct port *far = bpf_map_lookup_elem(&ports, &ifindex);
	struct mac mac = *dst;
	struct sent *to;

	if (likely(far))
		mac = far->mac;
	to = sending(skb, now, SENT_LOCAL, d);
	if (to)
		to->mac = mac;
	return to_task(skb, ifindex, &mac);
}

static inline_always int route(struct __sk_buff *skb, int balanced)
{
	u64 now = this_epoch();
	u32 ifindex = skb->ifindex;
	struct mac_key key = {};
	struct port *p;
	struct dest *d;
	struct eth *eth;
	u16 proto;

	settle();
	p = bpf_map_lookup_elem(&ports, &ifindex);
	if (!p || skb->vlan_present)
		return drop(OTHER_PROTO);
	/*
	 * What is read of a packet: Ethernet, IP, a TCP header without options. To
	 * ask for more would draw payload into the header of each TCP segment.
	 */
	if (linear(skb, sizeof(struct eth) + sizeof(struct ipv4) + sizeof(struct tcp)))
		return drop(MALFORMED);
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	if (unlikely(!same_mac(eth->src, p->mac)))
		return drop(SPOOFED);
	proto = eth->proto;
	/* A task's packet socket names the protocol by which the kernel goes: a forged answer of ARP must not be called IP. */
	if (unlikely(proto != skb->protocol))
		return drop(OTHER_PROTO);
	if (proto == htons(ETH_P_IPV6)) {
		struct ipv6 *ip;
		u8 *type;

		if (linear(skb, sizeof(struct eth) + sizeof(*ip) + sizeof(struct tcp)))
			return drop(MALFORMED);
		eth = bytes(skb);
		ip = (void *)(eth + 1);
		type = (void *)(ip + 1);
		if ((void *)(eth + 1) > end(skb))
			return drop(MALFORMED);
		if ((void *)(type + 1) <= end(skb) && ip->next == IPPROTO_ICMPV6 && *type == ND_SOLICIT)
			return answer_solicit(skb, p);
	} else if (unlikely(proto != htons(ETH_P_IP))) {
		return proto == htons(ETH_P_ARP) ? answer_arp(skb, p) : drop(OTHER_PROTO);
	}
	if (eth->dst.w[0] & htons(0x0100))
		return drop(MULTICAST);
	key.vni = p->vni;
	key.mac = eth->dst;
	d = bpf_map_lookup_elem(&macs, &key);
	if (unlikely(!d))
		return drop(UNKNOWN_MAC);
	switch (d->kind) {
	case DEST_DIRECT:
	case DEST_TUNNEL:
		return to_node(skb, p, d, proto, now);
	case DEST_TASK:
	case DEST_SEALED_TASK:
		return to_local(skb, now, d, &key.mac);
	case DEST_LEG:
	case DEST_SEALED_LEG:
		return bpf_redirect(d->ifindex, 0);
	case DEST_VIP:
		if (!balanced)
			bpf_tail_call(skb, &hooks, HOOK_BALANCE);
		return drop(NO_BALANCER);
	}
	return drop(UNKNOWN_MAC);
}

SEC("tc/from_task")
int from_task(struct __sk_buff *skb)
{
	int verdict = by_recent(skb);

	return verdict != UNKNOWN ? verdict : route(skb, 0);
}

SEC("tc/forward")
int forward(struct __sk_buff *skb)
{
	int verdict = by_recent(skb);

	return verdict != UNKNOWN ? verdict : route(skb, 1);
}

/* is_from reports whether mac of the network lives behind this VTEP. */
static inline_always int is_from(u32 vni, const struct mac *mac, const struct addr *vtep)
{
	struct mac_key key = {.vni = vni, .mac = *mac};
	struct dest *d;

	d = bpf_map_lookup_elem(&macs, &key);
	return d && (d->kind == DEST_DIRECT || d->kind == DEST_TUNNEL) && same_addr(&d->vtep, vtep);
}

/*
 * not_here drops what is sent to one of our networks but to no one in it who may
 * get it. Any other packet on that port is somebody else's.
 */
static inline_always int not_here(u32 vni, u16 udp, const struct addr *vtep, u32 why)
{
	struct net *n = bpf_map_lookup_elem(&nets, &vni);

	if (n && n->udp == udp && same_addr(&n->vtep, vtep))
		return drop(why);
	return ACT_NEXT;
}

/* congestion carries CE inwards (RFC 6040 section 4.2). 0: the packet must go. */
static inline_always int congestion(struct eth *in, void *stop)
{
	if (in->proto == htons(ETH_P_IP)) {
		struct ipv4 *ip = (void *)(in + 1);
		u32 sum;

		if ((void *)(ip + 1) > stop || !(ip->tos & ECN_CE))
			return 0;
		if ((ip->tos & ECN_CE) == ECN_CE)
			return 1;
		/* RFC 1624: ECT(0) or ECT(1) to CE adds 1 or 2 to the low byte of the first word. */
		sum = ntohs(ip->csum) + 0xffff - (ECN_CE - (ip->tos & ECN_CE));
		ip->csum = htons((sum & 0xffff) + (sum >> 16));
		ip->tos |= ECN_CE;
		return 1;
	} else {
		u32 *flow = (void *)(in + 1);

		if ((void *)(flow + 1) > stop || !(*flow & htonl(ECN_CE << 20)))
			return 0;
		*flow |= htonl(ECN_CE << 20);
		return 1;
	}
}

/* deliver takes outer bytes off and gives the packet to the local task. */
static inline_always int deliver(struct __sk_buff *skb, u32 ifindex, const struct frame *in, u32 outer, int family)
{
	u64 flags = ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET;
	struct eth *eth;

	if (can_switch_family)
		flags |= in->proto == htons(ETH_P_IP) ? ADJ_DECAP_L3_IPV4 : ADJ_DECAP_L3_IPV6;
	else if ((in->proto == htons(ETH_P_IP)) != (family == AF_INET))
		return ACT_NEXT; /* the VXLAN device can */
	if (bpf_skb_adjust_room(skb, -(s32)outer, ADJ_ROOM_MAC, flags))
		return drop(REFUSED);
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return drop(REFUSED);
	put(eth, in);
	/* A checksum that the device has verified is now the inner one. */
	bpf_csum_level(skb, CSUM_LEVEL_DEC);
	return bpf_redirect_peer(ifindex, 0);
}

/* receiver finds the local task that a frame is for. 0: there is none, and verdict is what becomes of it. */
static inline_always u32 receiver(const struct eth *in, u32 wire, u16 udp, const struct addr *src, const struct addr *dst, int *verdict)
{
	struct mac_key key = {.vni = ntohl(wire) >> 8, .mac = in->dst};
	struct dest *d = bpf_map_lookup_elem(&macs, &key);

	if (unlikely(!d)) {
		*verdict = not_here(key.vni, udp, dst, RX_UNKNOWN_MAC);
		return 0;
	}
	if (unlikely(d->kind >= DEST_SEALED_TASK)) {
		*verdict = not_here(key.vni, udp, dst, UNENCRYPTED);
		return 0;
	}
	if (d->kind != DEST_TASK || d->udp != udp || !same_addr(&d->vtep, dst)) {
		*verdict = ACT_NEXT; /* to the host leg, or not for this VTEP: the kernel knows */
		return 0;
	}
	if (unlikely(!is_from(key.vni, &in->src, src))) {
		*verdict = drop(RX_SOURCE);
		return 0;
	}
	return d->ifindex;
}

static inline_always int received(struct __sk_buff *skb, void *l3, u32 len, struct addr src, struct addr dst, int family)
{
	struct udp *udp = l3 + len;
	struct vxlan *vx = (void *)(udp + 1);
	struct eth *in = (void *)(vx + 1);
	struct frame was;
	int verdict;
	u32 ifindex;
	u64 now;
	u8 tos;

	if ((void *)(in + 1) > end(skb) || vx->flags != htonl(VXLAN_VALID))
		return ACT_NEXT;
	now = this_epoch();
	settle();
	ifindex = receiver(in, vx->vni, udp->dst, &src, &dst, &verdict);
	if (!ifindex)
		return verdict;
	was = keep(in);
	if (family == AF_INET) {
		u64 addrs = at64(&((struct ipv4 *)l3)->src);
		u32 slot = recent(at64(vx) ^ was.low, was.high, addrs);
		struct got *g = bpf_map_lookup_elem(&gots, &slot);

		if (g)
			*g = (struct got){.epoch = now, .frame = was, .vxlan = at64(vx), .addrs = addrs, .ifindex = ifindex, .udp = udp->dst};
	}
	if (in->proto != htons(ETH_P_IP) && in->proto != htons(ETH_P_IPV6))
		return drop(RX_PROTO);
	tos = family == AF_INET ? ((struct ipv4 *)l3)->tos : ntohl(((struct ipv6 *)l3)->flow) >> 20;
	if (unlikely((tos & ECN_CE) == ECN_CE) && !congestion(in, end(skb)))
		return drop(REFUSED);
	return deliver(skb, ifindex, &was, len + sizeof(*udp) + sizeof(*vx) + sizeof(*in), family);
}

static inline_always int encapsulated(struct __sk_buff *skb)
{
	u32 proto = skb->protocol;
	void *l3;

	if (skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return ACT_NEXT;
	if (proto == htons(ETH_P_IP)) {
		struct ipv4 *ip;

		l3 = bytes(skb) + sizeof(struct eth);
		ip = l3;
		if ((void *)(ip + 1) > end(skb) || ip->proto != IPPROTO_UDP)
			return ACT_NEXT;
		if (linear(skb, sizeof(struct eth) + OUTER4 + sizeof(struct ipv4)))
			return ACT_NEXT;
		l3 = bytes(skb) + sizeof(struct eth);
		ip = l3;
		if ((void *)(ip + 1) > end(skb))
			return ACT_NEXT;
		/* Fragments, and options, are for the kernel; it gives them to from_tunnel. */
		if (ip->vihl != 0x45 || ip->frag & htons(IP_FRAGMENT))
			return ACT_NEXT;
		return received(skb, l3, sizeof(*ip), mapped(ip->src), mapped(ip->dst), AF_INET);
	}
	if (proto == htons(ETH_P_IPV6)) {
		struct addr src, dst;
		struct ipv6 *ip;

		l3 = bytes(skb) + sizeof(struct eth);
		ip = l3;
		if ((void *)(ip + 1) > end(skb) || ip->next != IPPROTO_UDP)
			return ACT_NEXT;
		if (linear(skb, sizeof(struct eth) + OUTER6 + sizeof(struct ipv4)))
			return ACT_NEXT;
		l3 = bytes(skb) + sizeof(struct eth);
		ip = l3;
		if ((void *)(ip + 1) > end(skb))
			return ACT_NEXT;
		memcpy(src.w, ip->src, 16);
		memcpy(dst.w, ip->dst, 16);
		return received(skb, l3, sizeof(*ip), src, dst, AF_INET6);
	}
	return ACT_NEXT;
}

/* expected delivers a packet as the last one of its kind. UNKNOWN: there was none. */
static inline_always int expected(struct __sk_buff *skb)
{
	struct ipv4 *ip = bytes(skb) + sizeof(struct eth);
	struct udp *udp = (void *)(ip + 1);
	struct vxlan *vx = (void *)(udp + 1);
	struct eth *in = (void *)(vx + 1);
	struct frame was;
	struct got *g;
	u64 now, addrs, vxlan;
	u32 slot;

	if ((void *)(in + 1) > end(skb) || skb->protocol != htons(ETH_P_IP))
		return UNKNOWN;
	if (ip->proto != IPPROTO_UDP || ip->vihl != 0x45 || ip->frag & htons(IP_FRAGMENT) || (ip->tos & ECN_CE) == ECN_CE)
		return UNKNOWN;
	if (skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return UNKNOWN;
	now = this_epoch();
	vxlan = at64(vx);
	addrs = at64(&ip->src);
	was = keep(in);
	slot = recent(vxlan ^ was.low, was.high, addrs);
	g = bpf_map_lookup_elem(&gots, &slot);
	if (!g || !now || g->epoch != now || g->vxlan != vxlan || g->addrs != addrs || g->frame.low != was.low || g->frame.high != was.high ||
	    g->udp != udp->dst)
		return UNKNOWN;
	if (in->proto != htons(ETH_P_IP) && in->proto != htons(ETH_P_IPV6))
		return UNKNOWN;
	return deliver(skb, g->ifindex, &was, OUTER4, AF_INET);
}

SEC("tc/from_underlay")
int from_underlay(struct __sk_buff *skb)
{
	int verdict = expected(skb);

	return verdict != UNKNOWN ? verdict : encapsulated(skb);
}

SEC("tc/from_native")
int from_native(struct __sk_buff *skb)
{
	int verdict = expected(skb);

	if (verdict != UNKNOWN)
		return verdict;
	verdict = encapsulated(skb);
	return verdict == ACT_NEXT ? received_native(skb) : verdict;
}

SEC("tc/from_tunnel")
int from_tunnel(struct __sk_buff *skb)
{
	struct bpf_tunnel_key tk = {};
	struct mac_key key = {};
	struct addr src;
	struct eth *eth;
	struct dest *d;

	if (!bpf_skb_get_tunnel_key(skb, &tk, sizeof(tk), 0))
		src = mapped(htonl(tk.remote[0]));
	else if (!bpf_skb_get_tunnel_key(skb, &tk, sizeof(tk), TUNINFO_IPV6))
		memcpy(src.w, tk.remote, 16);
	else
		return drop(RX_PROTO);
	if (linear(skb, sizeof(*eth)))
		return drop(MALFORMED);
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	if (eth->proto != htons(ETH_P_IP) && eth->proto != htons(ETH_P_IPV6))
		return drop(RX_PROTO);
	key.vni = tk.tunnel_id;
	key.mac = eth->dst;
	d = bpf_map_lookup_elem(&macs, &key);
	if (d && d->kind >= DEST_SEALED_TASK)
		return drop(UNENCRYPTED);
	if (!d || (d->kind != DEST_TASK && d->kind != DEST_LEG))
		return drop(RX_UNKNOWN_MAC);
	if (!is_from(key.vni, &eth->src, &src))
		return drop(RX_SOURCE);
	if (d->kind == DEST_LEG)
		return bpf_redirect(d->ifindex, 0);
	return to_task(skb, d->ifindex, &key.mac);
}

/*
 * probe_netkit sends back what the task's end of a netkit pair sends, if it looks
 * there as is_netkit wants it.
 */
SEC("tc/probe_netkit")
int probe_netkit(struct __sk_buff *skb)
{
	return is_netkit(skb) ? bpf_redirect(skb->ifindex, 0) : ACT_DROP;
}

/* probe_switch tells whether can_switch_family may be set: 0 if the kernel takes the flag. */
SEC("tc/probe_switch")
int probe_switch(struct __sk_buff *skb)
{
	return bpf_skb_adjust_room(skb, -(s32)OUTER4, ADJ_ROOM_MAC, ADJ_FIXED_GSO | ADJ_NO_CSUM_RESET | ADJ_DECAP_L3_IPV6) != 0;
}

char _license[] SEC("license") = "Apache-2.0";

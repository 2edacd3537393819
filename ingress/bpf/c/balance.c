// SPDX-License-Identifier: Apache-2.0
/*
 * Service addresses: from_task of the overlay calls balance for each packet to
 * a service's hardware address. It writes that of a backend and gives the packet
 * back; nothing else is changed, the backend holds the address itself and
 * answers the client directly.
 */
#include "../../../vxlan/bpf/c/answer.h"

#define MAX_SERVICES 16384
#define MAX_SLOTS (1 << 20)
#define MAX_FLOWS (1 << 16)

#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* A ring is named after its contents; size is a power of two, 0 = nobody. */
struct service {
	u64 ring;
	u32 size;
	u32 zero;
};

struct slot {
	u64 ring;
	u32 index;
	u32 zero;
};

struct flow {
	u32 vni;
	u16 sport, dport;
	struct addr src, dst;
	u32 proto;
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
	__uint(max_entries, MAX_SLOTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct slot);
	__type(value, struct ep);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, struct ep);
} flows SEC(".maps");

/* The finaliser of splitmix64 over the words of a flow. */
static inline_always u32 spread(const struct flow *f)
{
	u64 x = f->src.w[3] ^ (u64)f->dst.w[3] << 32;

	x ^= ((u64)f->sport << 16 | f->dport) * 0x9e3779b97f4a7c15ULL;
	x ^= ((u64)f->src.w[2] << 32 | f->src.w[1]) + f->proto;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return (u32)(x ^ x >> 31);
}

/* reset4 answers a segment that nobody takes (RFC 9293 section 3.10.7.1). */
static inline_always int reset4(struct __sk_buff *skb)
{
	const u32 size = sizeof(struct eth) + sizeof(struct ipv4) + sizeof(struct tcp);
	struct {
		u32 src, dst;
		u16 proto, len;
		struct tcp tcp;
	} m = {};
	struct eth *eth = bytes(skb), was;
	struct ipv4 *ip = (void *)(eth + 1);
	struct tcp *tcp = (void *)(ip + 1);
	u32 len;

	if ((void *)(tcp + 1) > end(skb))
		return drop(MALFORMED);
	if (tcp->flags & TCP_RST)
		return drop(NO_BALANCER);
	was = *eth;
	m.src = ip->dst;
	m.dst = ip->src;
	m.proto = htons(IPPROTO_TCP);
	m.len = htons(sizeof(m.tcp));
	m.tcp.src = tcp->dst;
	m.tcp.dst = tcp->src;
	m.tcp.off = sizeof(m.tcp) / 4 << 4;
	m.tcp.flags = TCP_RST;
	if (tcp->flags & TCP_ACK) {
		m.tcp.seq = tcp->ack;
	} else {
		len = ntohs(ip->len) - sizeof(*ip) - (tcp->off >> 4) * 4 + !!(tcp->flags & TCP_SYN);
		m.tcp.ack = htonl(ntohl(tcp->seq) + len);
		m.tcp.flags |= TCP_ACK;
	}
	m.tcp.csum = fold(bpf_csum_diff(0, 0, (void *)&m, sizeof(m), 0));
	if (bpf_skb_change_tail(skb, size, 0) || linear(skb, size))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	tcp = (void *)(ip + 1);
	if ((void *)(tcp + 1) > end(skb))
		return drop(REFUSED);
	eth->dst = was.src;
	eth->src = was.dst;
	*ip = (struct ipv4){.vihl = 0x45, .len = htons(sizeof(*ip) + sizeof(*tcp)), .ttl = 64, .proto = IPPROTO_TCP, .src = m.src, .dst = m.dst};
	ip->csum = fold(bpf_csum_diff(0, 0, (void *)ip, sizeof(*ip), 0));
	*tcp = m.tcp;
	return bpf_redirect(skb->ifindex, 0);
}

static inline_always int reset6(struct __sk_buff *skb)
{
	const u32 size = sizeof(struct eth) + sizeof(struct ipv6) + sizeof(struct tcp);
	struct {
		struct pseudo6 head;
		struct tcp tcp;
	} m = {};
	struct eth *eth = bytes(skb), was;
	struct ipv6 *ip = (void *)(eth + 1);
	struct tcp *tcp = (void *)(ip + 1);
	u32 len;

	if ((void *)(tcp + 1) > end(skb))
		return drop(MALFORMED);
	if (tcp->flags & TCP_RST)
		return drop(NO_BALANCER);
	was = *eth;
	memcpy(m.head.src, ip->dst, 16);
	memcpy(m.head.dst, ip->src, 16);
	m.head.len = htonl(sizeof(m.tcp));
	m.head.next = htonl(IPPROTO_TCP);
	m.tcp.src = tcp->dst;
	m.tcp.dst = tcp->src;
	m.tcp.off = sizeof(m.tcp) / 4 << 4;
	m.tcp.flags = TCP_RST;
	if (tcp->flags & TCP_ACK) {
		m.tcp.seq = tcp->ack;
	} else {
		len = ntohs(ip->len) - (tcp->off >> 4) * 4 + !!(tcp->flags & TCP_SYN);
		m.tcp.ack = htonl(ntohl(tcp->seq) + len);
		m.tcp.flags |= TCP_ACK;
	}
	m.tcp.csum = fold(bpf_csum_diff(0, 0, (void *)&m, sizeof(m), 0));
	if (bpf_skb_change_tail(skb, size, 0) || linear(skb, size))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	tcp = (void *)(ip + 1);
	if ((void *)(tcp + 1) > end(skb))
		return drop(REFUSED);
	eth->dst = was.src;
	eth->src = was.dst;
	ip->flow = htonl(0x60000000);
	ip->len = htons(sizeof(*tcp));
	ip->hops = 64;
	memcpy(ip->src, m.head.src, 16);
	memcpy(ip->dst, m.head.dst, 16);
	*tcp = m.tcp;
	return bpf_redirect(skb->ifindex, 0);
}

/* refuse says that nobody takes the packet: never silence where an answer is known. */
static inline_always int refuse(struct __sk_buff *skb, int v4, u32 proto)
{
	if (proto == IPPROTO_TCP)
		return v4 ? reset4(skb) : reset6(skb);
	if (proto == IPPROTO_UDP)
		return v4 ? icmp4(skb, ICMP_UNREACH, ICMP_UNREACH_PORT, 0) : icmp6(skb, ICMPV6_UNREACH, ICMPV6_UNREACH_PORT, 0);
	return drop(NO_BALANCER);
}

/*
 * choose takes the backend of a new flow from its service's ring. The ring may
 * be replaced between the two lookups: then the second try sees the new one.
 */
static inline_always struct ep *choose(const struct flow *f)
{
	struct ep_key key = {.vni = f->vni, .addr = f->dst};
	struct slot at = {};
	struct service *s;
	struct ep *ep;

#pragma unroll
	for (int try = 0; try < 2; try++) {
		s = bpf_map_lookup_elem(&services, &key);
		if (!s || !s->size)
			return 0;
		at.ring = s->ring;
		at.index = spread(f) & (s->size - 1);
		ep = bpf_map_lookup_elem(&slots, &at);
		if (ep)
			return ep;
	}
	return 0;
}

/* ports reads those of TCP and UDP. A fragment has none: all of one datagram must go one way. */
static inline_always int ports_of(struct __sk_buff *skb, void *l4, struct flow *f, u8 *flags)
{
	struct udp *udp = l4;

	if (f->proto != IPPROTO_TCP && f->proto != IPPROTO_UDP)
		return 0;
	if ((void *)(udp + 1) > end(skb))
		return -1;
	f->sport = udp->src;
	f->dport = udp->dst;
	if (f->proto == IPPROTO_TCP) {
		struct tcp *tcp = l4;

		if ((void *)(tcp + 1) > end(skb))
			return -1;
		*flags = tcp->flags;
	}
	return 0;
}

SEC("tc/balance")
int balance(struct __sk_buff *skb)
{
	u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct flow f = {};
	struct eth *eth;
	struct ep *ep, chosen;
	int v4;
	u8 flags = 0;

	eth = bytes(skb);
	if (!p || (void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	f.vni = p->vni;
	v4 = eth->proto == htons(ETH_P_IP);
	if (v4) {
		struct ipv4 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb))
			return drop(MALFORMED);
		f.src = mapped(ip->src);
		f.dst = mapped(ip->dst);
		f.proto = ip->proto;
		if (ip->vihl == 0x45 && !(ip->frag & htons(0x3fff)) && ports_of(skb, ip + 1, &f, &flags))
			return drop(MALFORMED);
	} else {
		struct ipv6 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb))
			return drop(MALFORMED);
		memcpy(f.src.w, ip->src, 16);
		memcpy(f.dst.w, ip->dst, 16);
		f.proto = ip->next;
		if (ports_of(skb, ip + 1, &f, &flags))
			return drop(MALFORMED);
	}
	ep = 0;
	if ((flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		ep = bpf_map_lookup_elem(&flows, &f);
	if (!ep) {
		ep = choose(&f);
		if (!ep)
			return refuse(skb, v4, f.proto);
		chosen = *ep;
		bpf_map_update_elem(&flows, &f, &chosen, 0);
	} else {
		chosen = *ep;
	}
	if (flags & TCP_RST)
		bpf_map_delete_elem(&flows, &f);
	eth = bytes(skb);
	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	eth->dst = chosen.mac;
	bpf_tail_call(skb, &hooks, HOOK_FORWARD);
	return drop(NO_BALANCER);
}

char _license[] SEC("license") = "Apache-2.0";

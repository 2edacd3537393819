// SPDX-License-Identifier: Apache-2.0
/*
 * Service addresses: from_task of the overlay calls balance for each packet to
 * a service's hardware address. It writes that of a backend and gives the packet
 * back; nothing else is changed, the backend holds the address itself and
 * answers the client directly.
 */
#include "../../../vxlan/bpf/c/answer.h"
#include "rings.h"

#define MAX_FLOWS (1 << 16)
#define MAX_PASSING (1 << 15)
#define MAX_PIECES (1 << 12)

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct flow {
	u32 vni;
	u16 sport, dport;
	struct addr src, dst;
	u32 proto;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, struct ep);
} flows SEC(".maps");

/*
 * Flows that pass: datagrams, and connections of which the client has closed its half.
 * Short ones crowd out each other here, and no open connection that is silent.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PASSING);
	__type(key, struct flow);
	__type(value, struct ep);
} passing SEC(".maps");

/* Datagrams in pieces under way, by their identification in the place of the ports. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PIECES);
	__type(key, struct flow);
	__type(value, struct ep);
} pieces SEC(".maps");

struct sctp { /* RFC 9260 section 3.1, and the first two bytes of the first chunk */
	u16 src, dst;
	u32 tag, sum;
	u8 type, flags;
};

#define IPPROTO_SCTP 132	 /* RFC 9260 */
#define SCTP_INIT 1		 /* types of chunks: RFC 9260 section 3.2 */
#define SCTP_ABORT 6
#define SCTP_SHUTDOWN 7
#define SCTP_SHUTDOWN_ACK 8
#define SCTP_SHUTDOWN_COMPLETE 14

struct fragment { /* RFC 8200 section 4.5 */
	u8 next, zero;
	u16 off;
	u32 id;
};

#define IPPROTO_FRAGMENT 44
#define MORE 0x2000	   /* RFC 791: another piece follows */
#define OFFSET 0x1fff	   /* where in the datagram this one begins */
#define OFFSET6 0xfff8	   /* RFC 8200 */
#define ICMP_HEADER 8	   /* RFC 792, RFC 4443: what an error quotes begins behind it */
#define ICMP_TIME 11	   /* RFC 792: time exceeded */
#define ICMP_PARAMETER 12  /* RFC 792: the last of the errors */
#define ICMPV6_PARAMETER 4 /* RFC 4443: likewise */
#define ICMP_UNREACH_PROTOCOL 2 /* RFC 792 */
#define ICMPV6_UNKNOWN_NEXT 1	/* RFC 4443 section 3.4: code of a parameter problem */
#define NEXT_AT 6		/* RFC 8200: where in its header the next one is named */

/* What of a datagram a packet is. */
enum part { WHOLE, FIRST, LATER };

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
	int is_sctp;

	if (proto == IPPROTO_TCP)
		return v4 ? reset4(skb) : reset6(skb);
	if (proto != IPPROTO_UDP && proto != IPPROTO_SCTP)
		return drop(NO_BALANCER);
	/*
	 * An association ends at once by these errors alone (RFC 9260 section 10). One call for
	 * both: of two the compiler makes one that the verifier refuses.
	 */
	is_sctp = proto == IPPROTO_SCTP;
	if (v4)
		return icmp4(skb, ICMP_UNREACH, is_sctp ? ICMP_UNREACH_PROTOCOL : ICMP_UNREACH_PORT, 0);
	return icmp6(skb, is_sctp ? ICMPV6_PARAMETER : ICMPV6_UNREACH, is_sctp ? ICMPV6_UNKNOWN_NEXT : ICMPV6_UNREACH_PORT, is_sctp ? htonl(NEXT_AT) : 0);
}

/* choose takes the backend of a new flow from its service's ring. */
static inline_always struct ep *choose(const struct flow *f)
{
	struct ep_key key = {.vni = f->vni, .addr = f->dst};

	return pick(&key, spread(f));
}

/* Flows that are opened and closed, by a handshake. */
static inline_always int is_connection(u32 proto) { return proto == IPPROTO_TCP || proto == IPPROTO_SCTP; }

static inline_always int has_ports(u32 proto) { return is_connection(proto) || proto == IPPROTO_UDP; }

/*
 * ports_of reads those of TCP, UDP and SCTP. What begins or ends an association is said
 * in TCP's words: INIT is always alone in its packet, and what ends one comes first in its.
 */
static inline_always int ports_of(struct __sk_buff *skb, void *l4, struct flow *f, u8 *flags)
{
	struct udp *udp = l4;

	if (!has_ports(f->proto))
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
	} else if (f->proto == IPPROTO_SCTP) {
		struct sctp *sctp = l4;

		if ((void *)(sctp + 1) > end(skb))
			return -1;
		if (sctp->type == SCTP_INIT)
			*flags = TCP_SYN;
		else if (sctp->type == SCTP_SHUTDOWN || sctp->type == SCTP_SHUTDOWN_ACK)
			*flags = TCP_FIN;
		else if (sctp->type == SCTP_ABORT || sctp->type == SCTP_SHUTDOWN_COMPLETE)
			*flags = TCP_RST;
	}
	return 0;
}

/*
 * quoted4 reads the flow that an ICMP error is about: of the quoted packet, which
 * was an answer, the two ends the other way round. 0: it is no error, or quotes
 * nothing with ports.
 */
static inline_always int quoted4(struct __sk_buff *skb, struct flow *f)
{
	const u32 at = sizeof(struct eth) + sizeof(struct ipv4);
	struct {
		u8 icmp[ICMP_HEADER];
		struct ipv4 ip;
		u16 src, dst;
	} *q;

	if (linear(skb, at + sizeof(*q)))
		return 0;
	q = bytes(skb) + at;
	if ((void *)(q + 1) > end(skb) || q->ip.vihl != 0x45)
		return 0;
	if (q->icmp[0] != ICMP_UNREACH && q->icmp[0] != ICMP_TIME && q->icmp[0] != ICMP_PARAMETER)
		return 0;
	f->src = mapped(q->ip.dst);
	f->dst = mapped(q->ip.src);
	f->proto = q->ip.proto;
	f->sport = q->dst;
	f->dport = q->src;
	return has_ports(f->proto);
}

static inline_always int quoted6(struct __sk_buff *skb, struct flow *f)
{
	const u32 at = sizeof(struct eth) + sizeof(struct ipv6);
	struct {
		u8 icmp[ICMP_HEADER];
		struct ipv6 ip;
		u16 src, dst;
	} *q;

	if (linear(skb, at + sizeof(*q)))
		return 0;
	q = bytes(skb) + at;
	if ((void *)(q + 1) > end(skb) || !q->icmp[0] || q->icmp[0] > ICMPV6_PARAMETER)
		return 0;
	memcpy(f->src.w, q->ip.dst, 16);
	memcpy(f->dst.w, q->ip.src, 16);
	f->proto = q->ip.next;
	f->sport = q->dst;
	f->dport = q->src;
	return has_ports(f->proto);
}

/* piece6 reads a fragment header, and the ports behind it, which only the first has. */
static inline_always int piece6(struct __sk_buff *skb, struct flow *f, u8 *flags, u32 *id)
{
	const u32 at = sizeof(struct eth) + sizeof(struct ipv6);
	struct fragment *fr;

	if (linear(skb, at + sizeof(*fr) + sizeof(struct tcp)))
		return -1;
	fr = bytes(skb) + at;
	if ((void *)(fr + 1) > end(skb))
		return -1;
	f->proto = fr->next;
	*id = fr->id;
	if (fr->off & htons(OFFSET6))
		return LATER;
	return ports_of(skb, fr + 1, f, flags) ? -1 : FIRST;
}

/* known is where a flow went last. */
static inline_always struct ep *known(const struct flow *f)
{
	struct ep *ep = 0;

	if (is_connection(f->proto))
		ep = bpf_map_lookup_elem(&flows, f);
	return ep ? ep : bpf_map_lookup_elem(&passing, f);
}

/* to_backend gives the packet back with the hardware address of a backend. */
static inline_always int to_backend(struct __sk_buff *skb, const struct ep *ep)
{
	struct eth *eth = bytes(skb);

	if ((void *)(eth + 1) > end(skb))
		return drop(MALFORMED);
	eth->dst = ep->mac;
	bpf_tail_call(skb, &hooks, HOOK_FORWARD);
	return drop(NO_BALANCER);
}

/*
 * A later piece goes where the first one went. One that has overtaken it is chosen
 * by addresses; nobody is told that it goes nowhere (RFC 1122 section 3.2.2).
 */
static inline_always int later(struct __sk_buff *skb, const struct flow *key, const struct flow *f)
{
	struct ep chosen, *ep = bpf_map_lookup_elem(&pieces, key);

	if (!ep)
		ep = choose(f);
	if (!ep)
		return drop(NO_BALANCER);
	chosen = *ep;
	return to_backend(skb, &chosen);
}

SEC("tc/balance")
int balance(struct __sk_buff *skb)
{
	u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct flow f = {}, key;
	struct eth *eth;
	struct ep *ep, chosen;
	int v4, part = WHOLE;
	u32 id = 0;
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
		if (unlikely(ip->frag & htons(MORE | OFFSET))) {
			part = ip->frag & htons(OFFSET) ? LATER : FIRST;
			id = ip->id;
		}
		if (ip->vihl == 0x45 && part != LATER && ports_of(skb, ip + 1, &f, &flags))
			return drop(MALFORMED);
	} else {
		struct ipv6 *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(skb))
			return drop(MALFORMED);
		memcpy(f.src.w, ip->src, 16);
		memcpy(f.dst.w, ip->dst, 16);
		f.proto = ip->next;
		if (unlikely(f.proto == IPPROTO_FRAGMENT)) {
			part = piece6(skb, &f, &flags, &id);
			if (part < 0)
				return drop(MALFORMED);
		} else if (ports_of(skb, ip + 1, &f, &flags)) {
			return drop(MALFORMED);
		}
	}
	if (unlikely(part)) {
		key = f;
		key.sport = id;
		key.dport = id >> 16;
		if (part == LATER)
			return later(skb, &key, &f);
	} else if (v4 ? f.proto == IPPROTO_ICMP : f.proto == IPPROTO_ICMPV6) {
		struct flow about = {.vni = f.vni};

		/* One about an unknown flow goes where that flow would. */
		if (v4 ? quoted4(skb, &about) : quoted6(skb, &about)) {
			ep = known(&about);
			if (!ep)
				ep = choose(&about);
			if (!ep)
				return drop(NO_BALANCER);
			chosen = *ep;
			return to_backend(skb, &chosen);
		}
	}
	ep = 0;
	if ((flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		ep = known(&f);
	else
		bpf_map_delete_elem(&passing, &f);
	if (!ep) {
		ep = choose(&f);
		if (!ep) /* an answer is made of what stands behind the IP header */
			return v4 || !part ? refuse(skb, v4, f.proto) : drop(NO_BALANCER);
		chosen = *ep;
		if (is_connection(f.proto))
			bpf_map_update_elem(&flows, &f, &chosen, 0);
		else
			bpf_map_update_elem(&passing, &f, &chosen, 0);
	} else {
		chosen = *ep;
	}
	if (flags & TCP_FIN)
		bpf_map_update_elem(&passing, &f, &chosen, 0);
	if (flags & (TCP_FIN | TCP_RST))
		bpf_map_delete_elem(&flows, &f);
	if (unlikely(part))
		bpf_map_update_elem(&pieces, &key, &chosen, 0);
	return to_backend(skb, &chosen);
}

char _license[] SEC("license") = "Apache-2.0";

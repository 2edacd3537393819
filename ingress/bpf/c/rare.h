/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packets of known flows that are not whole ones of TCP or UDP: pieces of
 * datagrams, and ICMP errors about what went the other way. They come by the
 * host's stack's own hooks only, never past VXLAN.
 */
#pragma once
#include "wrap.h"


struct shape {
	u32 l4;	    /* where it begins */
	u32 id;	    /* of a piece */
	u8 proto;
	u8 is_piece;
	u8 is_first;
};

struct fragment6 { /* RFC 8200 section 4.5 */
	u8 next, zero;
	u16 offset;
	u32 id;
};

/* shape_of reads the headers before those of TCP, UDP or ICMP. */
static inline_always int shape_of(struct __sk_buff *skb, int v4, struct shape *s)
{
	if (v4) {
		struct ipv4 ip;

		if (bpf_skb_load_bytes(skb, sizeof(struct eth), &ip, sizeof(ip)) || ip.vihl != 0x45)
			return -1;
		s->l4 = sizeof(struct eth) + sizeof(ip);
		s->proto = ip.proto;
		s->is_piece = !!(ip.frag & htons(IP_FRAGMENT));
		s->is_first = !(ip.frag & htons(0x1fff));
		s->id = ip.id;
	} else {
		struct ipv6 ip;
		struct fragment6 f;

		if (bpf_skb_load_bytes(skb, sizeof(struct eth), &ip, sizeof(ip)))
			return -1;
		s->l4 = sizeof(struct eth) + sizeof(ip);
		s->proto = ip.next;
		s->is_first = 1;
		if (ip.next == IPPROTO_FRAGMENT) {
			if (bpf_skb_load_bytes(skb, s->l4, &f, sizeof(f)))
				return -1;
			s->l4 += sizeof(f);
			s->proto = f.next;
			s->is_piece = 1;
			s->is_first = !(f.offset & htons(0xfff8));
			s->id = f.id;
		}
	}
	return 0;
}

/* load_addrs reads the addresses of an IP header. */
static inline_always int load_addrs(struct __sk_buff *skb, u32 l3, u32 v4, struct addr *src, struct addr *dst)
{
	u32 two[2];

	if (!v4)
		return bpf_skb_load_bytes(skb, l3 + 8, src, 16) || bpf_skb_load_bytes(skb, l3 + 24, dst, 16);
	if (bpf_skb_load_bytes(skb, l3 + 12, two, sizeof(two)))
		return -1;
	*src = mapped(two[0]);
	*dst = mapped(two[1]);
	return 0;
}

/* load_ends reads the ends of a packet. from: the client is its source. */
static inline_always int load_ends(struct __sk_buff *skb, u32 l3, u32 l4, int v4, int from, struct ends *k)
{
	u16 ports[2];

	if (load_addrs(skb, l3, v4, from ? &k->client : &k->host, from ? &k->host : &k->client))
		return -1;
	if (bpf_skb_load_bytes(skb, l4, ports, sizeof(ports)))
		return -1;
	k->cport = from ? ports[0] : ports[1];
	k->hport = from ? ports[1] : ports[0];
	return 0;
}

/* set_addr replaces an address of an IP header, and IPv4's own sum. */
static inline_always int set_addr(struct __sk_buff *skb, u32 l3, u32 at, const struct addr *was, const struct addr *is)
{
	if (!is_mapped(is))
		return bpf_skb_store_bytes(skb, l3 + at, is, 16, 0);
	return bpf_l3_csum_replace(skb, l3 + 10, was->w[3], is->w[3], 4) || bpf_skb_store_bytes(skb, l3 + at, &is->w[3], 4, 0);
}

/* Where the addresses are in the headers, as RFC 791 and RFC 8200 have them. */
static inline_always u32 src_at(int v4) { return v4 ? 12 : 8; }
static inline_always u32 dst_at(int v4) { return v4 ? 16 : 24; }

/* turn_piece gives a piece of a datagram the other side's ends; only the first has ports and a sum. */
static inline_always int turn_piece(struct __sk_buff *skb, int v4, int to_host, const struct shape *s, const struct ends *k, const struct turn *t)
{
	u32 was, is, sum = s->l4 + (s->proto == IPPROTO_TCP ? 16 : 6);
	u64 udp = s->proto == IPPROTO_UDP ? F_MARK_MANGLED_0 : 0;
	struct addr from = k->host, to = t->host;

	if (s->is_first) {
		was = to_host ? k->cport | (u32)k->hport << 16 : k->hport | (u32)k->cport << 16;
		is = to_host ? t->cport | (u32)t->hport << 16 : t->hport | (u32)t->cport << 16;
		if (bpf_l4_csum_replace(skb, sum, 0, bpf_csum_diff((void *)&from, 16, (void *)&to, 16, 0), F_PSEUDO_HDR | udp))
			return -1;
		if (bpf_l4_csum_replace(skb, sum, was, is, 4 | udp) || bpf_skb_store_bytes(skb, s->l4, &is, 4, 0))
			return -1;
	}
	return set_addr(skb, sizeof(struct eth), to_host ? dst_at(v4) : src_at(v4), &from, &to);
}

/*
 * known_piece finds the flow of a piece. The first one's is found by its ports, and
 * the others' by what that one has left.
 */
static inline_always int known_piece(struct __sk_buff *skb, int v4, int to_host, const struct shape *s, struct ends *k, struct turn *t)
{
	struct piece piece = {.id = s->id, .proto = s->proto};
	struct turn *known;

	if (load_addrs(skb, sizeof(struct eth), v4, &piece.src, &piece.dst))
		return -1;
	k->proto = s->proto;
	k->client = to_host ? piece.src : piece.dst;
	k->host = to_host ? piece.dst : piece.src;
	if (s->is_first) {
		if (load_ends(skb, sizeof(struct eth), s->l4, v4, to_host, k) || (to_host && !is_published(k->proto, k->hport)))
			return -1;
		known = to_host ? known_request(k) : known_answer(k);
	} else {
		known = bpf_map_lookup_elem(&fragments, &piece);
	}
	if (!known)
		return -1;
	*t = *known;
	if (s->is_first && bpf_map_update_elem(&fragments, &piece, t, 0))
		return -1;
	return 0;
}

/*
 * known_error finds the flow that an ICMP error is about, by the packet in it,
 * which went the other way. outer is whom the error is for, or from.
 */
static inline_always int known_error(struct __sk_buff *skb, int v4, int to_host, const struct shape *s, struct ends *k, struct turn *t, struct addr *outer)
{
	const u32 l3 = s->l4 + 8;
	struct addr src, dst;
	struct turn *known;
	u8 type, word, next;

	if (bpf_skb_load_bytes(skb, s->l4, &type, 1))
		return -1;
	if (v4) { /* RFC 792: unreachable, time exceeded, parameter problem */
		if (type != ICMP_UNREACH && type != 11 && type != 12)
			return -1;
		if (bpf_skb_load_bytes(skb, l3, &word, 1) || word != 0x45 || bpf_skb_load_bytes(skb, l3 + 9, &next, 1))
			return -1;
	} else { /* RFC 4443 section 2.1: errors are those below 128 */
		if (type == 0 || type > 4 || bpf_skb_load_bytes(skb, l3 + 6, &next, 1))
			return -1;
	}
	if (next != IPPROTO_TCP && next != IPPROTO_UDP)
		return -1;
	k->proto = next;
	if (load_ends(skb, l3, l3 + (v4 ? sizeof(struct ipv4) : sizeof(struct ipv6)), v4, !to_host, k))
		return -1;
	if (load_addrs(skb, sizeof(struct eth), v4, &src, &dst))
		return -1;
	*outer = to_host ? dst : src;
	if (to_host) {
		if (!same_addr(&dst, &k->host) || !is_published(k->proto, k->hport))
			return -1;
		known = known_request(k);
	} else {
		if (!same_addr(&dst, &k->client))
			return -1;
		known = known_answer(k);
	}
	if (!known)
		return -1;
	*t = *known;
	return 0;
}

/* turn_error gives an ICMP error, and the packet in it, the other side's ends. */
static inline_always int turn_error(struct __sk_buff *skb, int v4, int to_host, const struct shape *s, const struct ends *k, const struct turn *t, const struct addr *outer)
{
	const u32 l3 = s->l4 + 8, sum = s->l4 + 2, ports = l3 + (v4 ? sizeof(struct ipv4) : sizeof(struct ipv6));
	struct addr from = k->host, to = t->host, whom = *outer;
	u32 was, is;

	was = to_host ? k->hport | (u32)k->cport << 16 : k->cport | (u32)k->hport << 16;
	is = to_host ? t->hport | (u32)t->cport << 16 : t->cport | (u32)t->hport << 16;
	if (bpf_l4_csum_replace(skb, sum, was, is, 4) || bpf_skb_store_bytes(skb, ports, &is, 4, 0))
		return -1;
	/* What the address changes in IPv4's sum of the quoted header, that sum's own change makes up for. */
	if (!v4 && (bpf_l4_csum_replace(skb, sum, 0, bpf_csum_diff((void *)&from, 16, (void *)&to, 16, 0), 0) ||
		    bpf_l4_csum_replace(skb, sum, 0, bpf_csum_diff((void *)&whom, 16, (void *)&to, 16, 0), F_PSEUDO_HDR)))
		return -1;
	if (set_addr(skb, l3, to_host ? src_at(v4) : dst_at(v4), &from, &to))
		return -1;
	return set_addr(skb, sizeof(struct eth), to_host ? dst_at(v4) : src_at(v4), &whom, &to);
}

static inline_always int is_error(const struct shape *s, int v4)
{
	return !s->is_piece && s->proto == (v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* rare_request is request for such a packet. */
global int rare_request(struct __sk_buff *skb, u32 v4)
{
	struct entry *e = this_entry();
	int tunnel, verdict, error;
	struct shape s = {};
	struct turn t = {};
	struct ends k = {};
	struct addr outer;
	struct dest *d;

	if (!e || shape_of(skb, v4, &s))
		return ACT_NEXT;
	error = is_error(&s, v4);
	if (error ? known_error(skb, v4, 1, &s, &k, &t, &outer) : !s.is_piece || known_piece(skb, v4, 1, &s, &k, &t))
		return ACT_NEXT;
	d = way_to(skb, e, v4, &t.mac, skb->len - sizeof(struct eth), 0, &tunnel, &verdict);
	if (!d)
		return verdict;
	if (error ? turn_error(skb, v4, 1, &s, &k, &t, &outer) : turn_piece(skb, v4, 1, &s, &k, &t))
		return drop(REFUSED);
	return send(skb, e, d, &t.mac, tunnel, 0);
}

/* rare_answer is answer for such a packet, at the leg. */
global int rare_answer(struct __sk_buff *skb, u32 v4)
{
	struct shape s = {};
	struct turn t = {};
	struct ends k = {};
	struct addr outer;
	struct mac from;
	int error;

	if (shape_of(skb, v4, &s) || bpf_skb_load_bytes(skb, 6, &from, sizeof(from)))
		return ACT_NEXT;
	error = is_error(&s, v4);
	if (error ? known_error(skb, v4, 0, &s, &k, &t, &outer) : !s.is_piece || known_piece(skb, v4, 0, &s, &k, &t))
		return ACT_NEXT;
	if (!same_mac(from, t.mac))
		return ACT_NEXT;
	if (skb->len - sizeof(struct eth) > t.hop.mtu)
		return error ? ACT_NEXT : too_big(skb, v4, t.hop.mtu);
	if (error ? turn_error(skb, v4, 0, &s, &k, &t, &outer) : turn_piece(skb, v4, 0, &s, &k, &t))
		return drop(REFUSED);
	return to_client(&k, &t);
}

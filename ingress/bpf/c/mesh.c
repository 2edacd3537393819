// SPDX-License-Identifier: Apache-2.0
/*
 * Published ports: what belongs to a flow that is known goes past the host's
 * stack.
 *
 * from_outside at the ingress of the links by which clients come: requests go on
 *              to the backend, answers that are in VXLAN to the client; what may
 *              begin a flow is noted, and goes through the host as all else
 * to_leg       at the egress of the host's leg: what was noted and comes out here
 *              has been let in and given a backend, and is a flow from now on
 * from_leg     at its ingress: answers of local tasks, and those that came by the
 *              VXLAN device
 */
#include "wrap.h"
#include "rare.h"

/*
 * read_ends reads a whole packet of TCP or UDP without options of IPv4. to_host:
 * the client is its source. head is the length of both headers.
 */
static inline_always int read_ends(void *l3, void *stop, int v4, int to_host, struct ends *k, u8 *flags, u32 *head)
{
	struct udp *l4;

	if (v4) {
		struct ipv4 *ip = l3;

		if ((void *)(ip + 1) > stop || ip->vihl != 0x45 || ip->frag & htons(IP_FRAGMENT))
			return -1;
		k->proto = ip->proto;
		k->client = mapped(to_host ? ip->src : ip->dst);
		k->host = mapped(to_host ? ip->dst : ip->src);
		*head = sizeof(*ip);
		l4 = (void *)(ip + 1);
	} else {
		struct ipv6 *ip = l3;

		if ((void *)(ip + 1) > stop)
			return -1;
		k->proto = ip->next;
		memcpy(k->client.w, to_host ? ip->src : ip->dst, 16);
		memcpy(k->host.w, to_host ? ip->dst : ip->src, 16);
		*head = sizeof(*ip);
		l4 = (void *)(ip + 1);
	}
	if ((void *)(l4 + 1) > stop)
		return -1;
	k->cport = to_host ? l4->src : l4->dst;
	k->hport = to_host ? l4->dst : l4->src;
	*flags = 0;
	if (k->proto == IPPROTO_UDP) {
		*head += sizeof(struct udp);
		return 0;
	}
	if (k->proto == IPPROTO_TCP) {
		struct tcp *tcp = (void *)l4;

		if ((void *)(tcp + 1) > stop)
			return -1;
		*flags = tcp->flags;
		*head += (tcp->off >> 4) * 4;
		return 0;
	}
	return -1;
}

/* note keeps what a packet asks until it comes out at the leg. */
static inline_always int note(struct __sk_buff *skb, const struct ends *k)
{
	u32 zero = 0;
	struct fresh *f = bpf_map_lookup_elem(&fresh, &zero);

	if (f) {
		f->ends = *k;
		f->link = skb->ifindex;
		f->hash = bpf_get_hash_recalc(skb);
	}
	return ACT_NEXT;
}

/*
 * heal looks after a flow once in a while: the two tables forget each by itself,
 * routes change, and a client that comes by another link now is answered by that
 * one, if a route leads there. What another flow has taken meanwhile stays that one's.
 */
apart int heal(struct __sk_buff *skb, const struct entry *e, const struct ends *k, struct turn *t)
{
	u32 link = skb->ifindex;
	struct ends back = {.client = k->client, .host = t->host, .cport = t->cport, .hport = t->hport, .proto = k->proto};
	struct turn to = {.host = k->host, .mac = t->mac, .hport = k->hport, .cport = k->cport}, *old;
	struct mac_key task = {.vni = e->vni, .mac = t->mac};
	struct hop *hop;
	struct dest *d;

	t->seen = now();
	hop = reached(link, &k->client);
	if (hop) {
		t->link = link;
		t->hop = *hop;
	}
	to.link = t->link;
	to.hop = t->hop;
	old = known_answer(&back);
	if (old) {
		if (is_of(old, k)) {
			old->link = to.link;
			old->hop = to.hop;
		}
		return 0;
	}
	d = bpf_map_lookup_elem(&macs, &task);
	if (d && (d->kind == DEST_DIRECT || d->kind == DEST_TUNNEL))
		to.vtep = d->vtep;
	return file_answer(&back, &to, NOEXIST);
}

/* forget takes a connection out of the tables that has passed, unless it has come to something else since. */
static inline_always void forget(const struct passing *p)
{
	struct turn *t = bpf_map_lookup_elem(&requests, &p->request);
	struct ends back = {.client = p->request.client, .proto = IPPROTO_TCP};

	if (!t || t->since != p->since || lasts(t->state))
		return;
	back.host = t->host;
	back.cport = t->cport;
	back.hport = t->hport;
	bpf_map_delete_elem(&requests, &p->request);
	t = bpf_map_lookup_elem(&answers, &back);
	if (t && is_of(t, &p->request))
		bpf_map_delete_elem(&answers, &back);
}

/* PASS_TRIES is our own choice: other processors may take the room that was made. */
#define PASS_TRIES 4

/* pass puts a connection among those that pass. If all tries are in vain it stays until the tables are full. */
apart int pass(const struct ends *k, u32 since)
{
	struct passing p;

	for (int i = 0; i < PASS_TRIES; i++) {
		p = (struct passing){.request = *k, .since = since};
		if (!bpf_map_push_elem(&passings, &p, 0))
			return 0;
		if (!bpf_map_pop_elem(&passings, &p))
			forget(&p);
	}
	return 0;
}

/* come_to notes what a connection has come to. */
apart int come_to(const struct ends *k, struct turn *t, u32 what)
{
	u32 was = __sync_fetch_and_or(&t->state, what);

	if (!lasts(was) || lasts(was | what))
		return 0;
	t->since = now();
	return pass(k, t->since);
}

/* request takes a client's packet to the backend, if its flow is known. */
static inline_always int request(struct __sk_buff *skb, const struct entry *e, int v4)
{
	struct ends k = {};
	struct turn *known, t;
	void *l3 = bytes(skb) + sizeof(struct eth);
	u32 head, size, tos;
	int df = 1;
	u8 flags;

	if (read_ends(l3, end(skb), v4, 1, &k, &flags, &head) || !is_published(k.proto, k.hport))
		return ACT_NEXT;
	if (is_new(flags))
		return note(skb, &k);
	known = known_request(&k);
	if (!known)
		return k.proto == IPPROTO_UDP ? note(skb, &k) : ACT_NEXT;
	if (unlikely(known->seen != now() || known->link != skb->ifindex))
		heal(skb, e, &k, known);
	t = *known;
	if (unlikely(flags & (TCP_FIN | TCP_RST)))
		come_to(&k, known, flags & TCP_RST ? IS_RESET : IS_OPEN | CLIENT_ENDS);
	else if (k.proto == IPPROTO_TCP && unlikely(!(t.state & IS_OPEN)))
		__sync_fetch_and_or(&known->state, IS_OPEN);
	if (v4) {
		struct ipv4 *ip = l3;

		tos = ip->tos;
		df = !!(ip->frag & htons(IP_DF));
	} else {
		tos = ntohl(*(u32 *)l3) >> 20 & 0xff;
	}
	size = skb->gso_size ? head + skb->gso_size : skb->len - sizeof(struct eth);
	return to_backend(skb, e, v4, &k, &t, size, tos, df);
}

/* answered notes that a backend ends a connection, or resets it. asked are the ends of its request, host is the backend. */
apart int answered(const struct ends *asked, const struct addr *host, u32 what)
{
	struct turn *request = bpf_map_lookup_elem(&requests, asked);

	return request && same_addr(&request->host, host) ? come_to(asked, request, what) : 0;
}

static inline_always u32 lesser(u32 a, u32 b) { return a < b ? a : b; }

/*
 * answer takes a backend's packet, behind outer bytes of VXLAN's, to the client,
 * if its flow is known. vtep is where those came from.
 */
static inline_always int answer(struct __sk_buff *skb, const struct entry *e, u32 outer, const struct addr *vtep, int v4)
{
	struct eth *in = bytes(skb) + outer;
	struct mac_key from = {.vni = e->vni};
	struct ends k = {};
	struct turn *known, t;
	struct dest *d = 0;
	u32 head, size;
	u8 flags;

	if ((void *)(in + 1) > end(skb))
		return ACT_NEXT;
	if (read_ends(in + 1, end(skb), v4, 0, &k, &flags, &head))
		return ACT_NEXT;
	known = known_answer(&k);
	if (!known || !same_mac(in->src, known->mac))
		return ACT_NEXT;
	t = *known;
	if (unlikely(flags & (TCP_FIN | TCP_RST))) {
		struct ends asked = {.client = k.client, .host = t.host, .cport = t.cport, .hport = t.hport, .proto = IPPROTO_TCP};

		answered(&asked, &k.host, flags & TCP_RST ? IS_RESET : BACKEND_ENDS);
	}
	from.mac = t.mac;
	if (outer && !same_addr(&t.vtep, vtep))
		return ACT_NEXT; /* a node that has another address now: the way by the leg knows it */
	if (unlikely(flags & TCP_SYN))
		d = bpf_map_lookup_elem(&macs, &from);
	size = skb->gso_size ? head + skb->gso_size : skb->len - outer - sizeof(struct eth);
	if (unlikely(size > t.hop.mtu))
		return outer ? ACT_NEXT : too_big(skb, v4, t.hop.mtu); /* it comes again, by the leg */
	if (outer && unwrap(skb, outer, v4))
		return drop(REFUSED);
	if (rewrite(skb, v4, 0, &k, &t))
		return drop(REFUSED);
	if (unlikely(flags & TCP_SYN))
		clamp(skb, v4, lesser(t.hop.mtu, d && (d->kind == DEST_DIRECT || d->kind == DEST_TUNNEL) ? d->mtu : e->mtu));
	return to_client(&k, &t);
}

/* in_vxlan looks into a packet to the UDP port of VXLAN, whose headers are at l3. */
static inline_always int in_vxlan(struct __sk_buff *skb, const struct entry *e, u32 l3len)
{
	const u32 outer = l3len == sizeof(struct ipv4) ? OUTER4 : OUTER6;
	struct addr vtep;
	struct vxlan *vx;
	struct eth *in;

	if (linear(skb, outer + sizeof(*in) + sizeof(struct ipv6) + sizeof(struct udp)))
		return ACT_NEXT;
	vx = bytes(skb) + sizeof(struct eth) + l3len + sizeof(struct udp);
	in = (void *)(vx + 1);
	if ((void *)(in + 1) > end(skb))
		return ACT_NEXT;
	if (vx->flags != htonl(VXLAN_VALID) || vx->vni != htonl(e->vni << 8) || !same_mac(in->dst, e->mac))
		return ACT_NEXT;
	if (l3len == sizeof(struct ipv4)) {
		struct ipv4 *ip = bytes(skb) + sizeof(struct eth);

		if (!is_mapped(&e->vtep) || ip->dst != e->vtep.w[3] || (ip->tos & ECN_CE) == ECN_CE)
			return ACT_NEXT;
		vtep = mapped(ip->src);
	} else {
		struct ipv6 *ip = bytes(skb) + sizeof(struct eth);

		memcpy(vtep.w, ip->dst, 16);
		if (!same_addr(&vtep, &e->vtep) || (ntohl(ip->flow) >> 20 & ECN_CE) == ECN_CE)
			return ACT_NEXT;
		memcpy(vtep.w, ip->src, 16);
	}
	if (in->proto == htons(ETH_P_IP))
		return answer(skb, e, outer, &vtep, 1);
	if (in->proto == htons(ETH_P_IPV6)) {
		if (linear(skb, outer + sizeof(*in) + sizeof(struct ipv6) + sizeof(struct tcp)))
			return ACT_NEXT;
		return answer(skb, e, outer, &vtep, 0);
	}
	return ACT_NEXT;
}

/* kinds of packets of one of these families, as from_outside and from_leg tell them */
enum { IS_OTHER, IS_WHOLE, IS_RARE, IS_VXLAN };

static inline_always int kind4(struct __sk_buff *skb, const struct entry *e)
{
	struct ipv4 *ip;
	struct udp *udp;

	if (linear(skb, sizeof(struct eth) + sizeof(*ip) + sizeof(struct tcp)))
		return IS_OTHER;
	ip = bytes(skb) + sizeof(struct eth);
	udp = (void *)(ip + 1);
	if ((void *)(udp + 1) > end(skb))
		return IS_OTHER;
	if (ip->frag & htons(IP_FRAGMENT) || ip->proto == IPPROTO_ICMP)
		return IS_RARE;
	return ip->proto == IPPROTO_UDP && udp->dst == e->udp && ip->vihl == 0x45 ? IS_VXLAN : IS_WHOLE;
}

static inline_always int kind6(struct __sk_buff *skb, const struct entry *e)
{
	struct ipv6 *ip;
	struct udp *udp;

	if (linear(skb, sizeof(struct eth) + sizeof(*ip) + sizeof(struct tcp)))
		return IS_OTHER;
	ip = bytes(skb) + sizeof(struct eth);
	udp = (void *)(ip + 1);
	if ((void *)(udp + 1) > end(skb))
		return IS_OTHER;
	if (ip->next == IPPROTO_FRAGMENT || ip->next == IPPROTO_ICMPV6)
		return IS_RARE;
	return ip->next == IPPROTO_UDP && udp->dst == e->udp ? IS_VXLAN : IS_WHOLE;
}

/*
 * Functions of their own, so that clang does not make one address of packet and
 * offset for both families, which the verifier does not follow.
 */
apart int request4(struct __sk_buff *skb, const struct entry *e) { return request(skb, e, 1); }
apart int request6(struct __sk_buff *skb, const struct entry *e) { return request(skb, e, 0); }
apart int answer4(struct __sk_buff *skb, const struct entry *e) { return answer(skb, e, 0, 0, 1); }
apart int answer6(struct __sk_buff *skb, const struct entry *e) { return answer(skb, e, 0, 0, 0); }
apart int vxlan4(struct __sk_buff *skb, const struct entry *e) { return in_vxlan(skb, e, sizeof(struct ipv4)); }
apart int vxlan6(struct __sk_buff *skb, const struct entry *e) { return in_vxlan(skb, e, sizeof(struct ipv6)); }

SEC("tc/from_outside")
int from_outside(struct __sk_buff *skb)
{
	struct entry *e = this_entry();
	int v4 = skb->protocol == htons(ETH_P_IP), kind;

	if (!e || skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return ACT_NEXT;
	if (v4)
		kind = kind4(skb, e);
	else if (skb->protocol == htons(ETH_P_IPV6))
		kind = kind6(skb, e);
	else
		return ACT_NEXT;
	if (likely(kind == IS_WHOLE))
		return v4 ? request4(skb, e) : request6(skb, e);
	if (kind == IS_VXLAN)
		return v4 ? vxlan4(skb, e) : vxlan6(skb, e);
	return kind == IS_RARE ? rare_request(skb, v4) : ACT_NEXT;
}

SEC("tc/from_leg")
int from_leg(struct __sk_buff *skb)
{
	struct entry *e = this_entry();
	int v4 = skb->protocol == htons(ETH_P_IP), kind, verdict = ACT_NEXT;

	if (!e || skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return ACT_NEXT;
	if (v4)
		kind = kind4(skb, e);
	else if (skb->protocol == htons(ETH_P_IPV6))
		kind = kind6(skb, e);
	else
		return ACT_NEXT;
	if (kind == IS_RARE)
		verdict = rare_answer(skb, v4);
	else if (kind != IS_OTHER)
		verdict = v4 ? answer4(skb, e) : answer6(skb, e);
	if (verdict == ACT_NEXT)
		count_slow(skb, SLOW_ANSWERS);
	return verdict;
}

/* PORT_TRIES is our own choice. Another flow has the port only if the host has forgotten that flow already. */
#define PORT_TRIES 8

/*
 * learn files a flow. The client's port is that which connection tracking has
 * chosen, but where a flow that goes past it has the same one: then another.
 */
apart int learn(struct __sk_buff *skb, const struct entry *e, struct fresh *f, int v4)
{
	struct mac_key to = {.vni = e->vni};
	struct ends k = {}, was;
	struct turn t, *old;
	struct dest *d;
	struct eth *eth = bytes(skb);
	u32 head, at, number = f->hash;
	struct hop *hop;
	int found = 0;
	u8 flags, tos;

	if ((void *)(eth + 1) > end(skb) || read_ends(eth + 1, end(skb), v4, 1, &k, &flags, &head))
		return ACT_NEXT;
	tos = v4 ? ((struct ipv4 *)(eth + 1))->tos : ntohl(((struct ipv6 *)(eth + 1))->flow) >> 20;
	if (k.proto != f->ends.proto || !same_addr(&k.client, &f->ends.client) || (k.proto == IPPROTO_TCP && !is_new(flags)))
		return ACT_NEXT;
	f->hash = 0;
	to.mac = eth->dst;
	d = bpf_map_lookup_elem(&macs, &to);
	if (!d || (d->kind != DEST_DIRECT && d->kind != DEST_TUNNEL && d->kind != DEST_TASK))
		return ACT_NEXT;
	hop = reached(f->link, &k.client);
	if (!hop)
		return ACT_NEXT; /* answers take another way than by this link: the host's */
	was = k;
	t = (struct turn){.host = f->ends.host, .mac = to.mac, .hport = f->ends.hport, .cport = f->ends.cport, .link = f->link, .hop = *hop};
	if (d->kind != DEST_TASK)
		t.vtep = d->vtep;
	for (int i = 0; i < PORT_TRIES; i++) {
		if (!file_answer(&k, &t, NOEXIST)) {
			found = 1;
			break;
		}
		old = known_answer(&k);
		if (old && is_of(old, &f->ends)) {
			found = !file_answer(&k, &t, 0);
			break;
		}
		old = i ? 0 : known_request(&f->ends);
		if (old && same_addr(&old->host, &k.host) && old->hport == k.hport) {
			k.cport = old->cport; /* it is sent once more */
			continue;
		}
		number = number * 0x9e3779b1 + 0x7f4a7c15;
		k.cport = htons(1024 + (number >> 16) % (65536 - 1024));
	}
	if (!found)
		return drop(REFUSED);
	at = now();
	t = (struct turn){.host = k.host, .mac = to.mac, .hport = k.hport, .cport = k.cport, .link = f->link, .hop = *hop, .seen = at, .since = at};
	if (file_request(&f->ends, &t))
		return ACT_NEXT;
	if (k.proto == IPPROTO_TCP)
		pass(&f->ends, at);
	if (unlikely(k.cport != was.cport) && rewrite(skb, v4, 1, &was, &t))
		return drop(REFUSED);
	if (d->kind != DEST_DIRECT || skb->gso_size || skb->len - sizeof(*eth) > d->mtu)
		return ACT_NEXT;
	/* Whoever has let it in has done so by now: it need not go through the leg. */
	return wrap(skb, e, d, outer_ecn(tos), 1);
}

SEC("tc/to_leg")
int to_leg(struct __sk_buff *skb)
{
	u32 zero = 0, proto = skb->protocol;
	struct entry *e = this_entry();
	struct fresh *f = bpf_map_lookup_elem(&fresh, &zero);

	if (proto == htons(ETH_P_IP) || proto == htons(ETH_P_IPV6))
		count_slow(skb, SLOW_REQUESTS);
	if (!e || !f || !f->hash || f->hash != skb->hash)
		return ACT_NEXT;
	if (linear(skb, sizeof(struct eth) + sizeof(struct ipv6) + sizeof(struct tcp)))
		return ACT_NEXT;
	if (proto == htons(ETH_P_IP))
		return learn(skb, e, f, 1);
	return proto == htons(ETH_P_IPV6) ? learn(skb, e, f, 0) : ACT_NEXT;
}

char _license[] SEC("license") = "Apache-2.0";

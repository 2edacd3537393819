package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Diversion hands what is sent to service addresses on a bridge to the IP stack of
// the bridge's own namespace, for a balancer that works there.
type Diversion struct {
	VNI   uint32
	NetNS string // path of the bridge's namespace
	// MAC is the bridge's own hardware address, which leads to the stack.
	MAC net.HardwareAddr
	// IPv6: service addresses of that family are diverted, too.
	IPv6 bool
	// Unmarked are service addresses whose packets get no mark: the balancer goes on
	// with flows that it knows, and begins none.
	Unmarked []netip.Addr
	// Speakers are as ingress.Network's.
	Speakers []ingress.Speaker
}

// markBytes is the length of a mark: an address's last four bytes.
const markBytes = 4

// metaBroute is NFT_META_BRI_BROUTE (linux/netfilter/nf_tables.h): the bridge leaves a
// frame to the stack of its own port, as if that were no port. Since Linux 6.4.
const metaBroute expr.MetaKey = 35

// packetHost is PACKET_HOST (linux/if_packet.h): a frame for the host itself.
const packetHost = 0

// divertRules is the table of one network: whatever has the hardware address of a
// service goes up, and has as its mark the last four bytes of the address that it is
// sent to, as they stand in the packet. They are the same for all services, so that no
// number of them costs anything here, but for the few that take nothing new. Segments in
// the midst of a connection get no mark: the balancer finds them by their ports, and
// what has a mark is routed anew by each device that it meets.
//
// Up is to the bridge's own hardware address. straight: what is IPv4 goes there from its
// port, past the bridge.
func divertRules(d Diversion, straight bool) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge}
	r.speak(d.Speakers)
	others := []rule{{"by " + spokenChain, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: spokenChain}}}}
	if d.IPv6 {
		others = append(append(others, forServices(), neighbourDiscovery()), r.up(&ipv6, d, ipv6.isFamily(expr.CmpOpEq), "to "+d.MAC.String(), ipv6.toHost(d.MAC))...)
	}
	rules := []rule{{"no IPv4: by " + othersChain, join(etherIs(expr.CmpOpNeq, unix.ETH_P_IP), []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: othersChain}})}, forServices()}
	if straight {
		rules = append(rules, r.up(&ipv4, d, nil, "straight up", ipv4.straightUp())...)
	} else {
		rules = append(rules, r.up(&ipv4, d, nil, "to "+d.MAC.String(), ipv4.toHost(d.MAC))...)
	}
	r.chains = append([]chain{{
		name: "prerouting", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(-300), // NF_BR_PRI_NAT_DST_BRIDGED
		rules: rules,
	}, {name: othersChain, rules: others}}, r.chains...)
	return r
}

// othersChain is where all goes that is no IPv4.
const othersChain = "others"

// up is what leads one family's packets, which is matches, to the stack; where says how.
func (r *ruleset) up(f *family, d Diversion, is []expr.Any, where string, up []expr.Any) (rules []rule) {
	add := func(words string, parts ...[]expr.Any) {
		rules = append(rules, rule{f.words + words + ", " + where, join(is, join(parts...), up, f.accept())})
	}
	proto := uint32(protocol4)
	if f.is6 {
		proto = next6
	}
	add("tcp that begins nothing: without a mark",
		[]expr.Any{f.nh(f.proto, proto, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: f.proto, Data: []byte{unix.IPPROTO_TCP}}}, f.flags(flagSYN, expr.CmpOpEq, 0))
	unmarked := f.addressSet("unmarked")
	for _, a := range d.Unmarked {
		if f.has(a) {
			unmarked.elements[raw(a)] = ""
		}
	}
	if len(unmarked.elements) > 0 { // to look into an empty set costs as much
		r.sets = append(r.sets, unmarked)
		add("to a service that takes nothing new: without a mark", []expr.Any{f.load(f.vip, f.destination), has(unmarked.name, f.vip)})
	}
	add("mark by the address", []expr.Any{
		&expr.Payload{DestRegister: f.slot, Base: expr.PayloadBaseNetworkHeader, Offset: f.destination + f.bytes - markBytes, Len: markBytes},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: f.slot},
	})
	return rules
}

// toHost gives a frame the bridge's own hardware address.
func (f *family) toHost(mac net.HardwareAddr) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: f.mac, Data: mac}, f.writeMAC()}
}

// straightUp hands a frame to the stack where it comes in. Two values are loaded at once.
func (f *family) straightUp() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: f.mac, Data: []byte{packetHost, 0, 0, 0, 1, 0, 0, 0}},
		&expr.Meta{Key: expr.MetaKeyPKTTYPE, SourceRegister: true, Register: f.mac},
		&expr.Meta{Key: metaBroute, SourceRegister: true, Register: f.mac + 1},
	}
}

// Diverter makes Diversions. Its methods are called by one goroutine at a time.
type Diverter struct {
	e *Engine
	// bent: the kernel cannot leave a frame to the stack of its port.
	bent bool
}

// NewDiverter returns one that has done nothing yet. repaired, when not nil, is
// Engine.Repaired.
func NewDiverter(repaired func(weft.Repair)) *Diverter {
	return &Diverter{e: &Engine{places: map[string]*place{}, Repaired: repaired}}
}

// Apply makes the table of the diversion's namespace equal to it; another one of
// weft's is replaced. It blocks on the kernel.
func (v *Diverter) Apply(d Diversion) error {
	if len(d.MAC) != 6 {
		return fmt.Errorf("divert service addresses: the bridge of network %d has no hardware address", d.VNI)
	}
	p, err := v.e.placeAt(d.NetNS, fmt.Sprintf("network %d", d.VNI))
	if err != nil {
		return err
	}
	v.e.places[d.NetNS] = p
	err = v.load(d.NetNS, p, d)
	if !v.bent && errors.Is(err, unix.EOPNOTSUPP) {
		v.bent = true
		err = v.load(d.NetNS, p, d)
	}
	return err
}

func (v *Diverter) load(path string, p *place, d Diversion) error {
	return withConn(path, func(conn *nftables.Conn) error { return v.e.converge(p, conn, divertRules(d, !v.bent)) })
}

// Straight reports whether the last Apply led IPv4 up from its port.
func (v *Diverter) Straight() bool { return !v.bent }

// Probe loads the table into a namespace. An error wraps weft.ErrUnsupported.
func (v *Diverter) Probe(path string) error {
	return withConn(path, func(conn *nftables.Conn) error {
		if err := loads(conn, divertRules(Diversion{MAC: make(net.HardwareAddr, 6), IPv6: true}, false)); err != nil {
			return fmt.Errorf("%w: nftables bridge table: %w", weft.ErrUnsupported, err)
		}
		return nil
	})
}

// Remove removes the table; none is no error.
func (v *Diverter) Remove(path string) error {
	delete(v.e.places, path)
	return withConn(path, func(conn *nftables.Conn) error {
		return removeTable(conn, ruleset{family: nftables.TableFamilyBridge}.table())
	})
}

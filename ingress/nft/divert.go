package nft

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

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

// divertRules is the table of one network: whatever has the hardware address of a
// service gets the bridge's, and as its mark the last four bytes of the address
// that it is sent to, as they stand in the packet. They are the same for all
// services, so that no number of them costs anything here, but for the few that take
// nothing new.
func divertRules(d Diversion) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge}
	rules := []rule{r.speak(d.Speakers), forServices()}
	for _, f := range families(d.IPv6) {
		if f.is6 {
			rules = append(rules, neighbourDiscovery())
		}
		unmarked := f.addressSet("unmarked")
		for _, a := range d.Unmarked {
			if f.has(a) {
				unmarked.elements[raw(a)] = ""
			}
		}
		r.sets = append(r.sets, unmarked)
		up := []expr.Any{
			&expr.Immediate{Register: f.mac, Data: d.MAC},
			&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: f.mac, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
			&expr.Counter{},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}
		rules = append(rules,
			rule{fmt.Sprintf("%sto a service that takes nothing new: to %s", f.words, d.MAC), join(f.toService(), []expr.Any{has(unmarked.name, f.vip)}, up)},
			rule{fmt.Sprintf("%smark by the address, to %s", f.words, d.MAC), join([]expr.Any{
				&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: f.mac},
				&expr.Cmp{Op: expr.CmpOpEq, Register: f.mac, Data: []byte{byte(f.ether >> 8), byte(f.ether)}},
				&expr.Payload{DestRegister: f.slot, Base: expr.PayloadBaseNetworkHeader, Offset: f.destination + f.bytes - markBytes, Len: markBytes},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: f.slot},
			}, up)})
	}
	r.chains = append([]chain{{
		name: "prerouting", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(-300), // NF_BR_PRI_NAT_DST_BRIDGED
		rules: rules,
	}}, r.chains...)
	return r
}

// Diverter makes Diversions. Its methods are called by one goroutine at a time.
type Diverter struct{ e *Engine }

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
	return withConn(d.NetNS, func(conn *nftables.Conn) error { return v.e.converge(p, conn, divertRules(d)) })
}

// Probe loads the table into a namespace. An error wraps weft.ErrUnsupported.
func (v *Diverter) Probe(path string) error {
	return withConn(path, func(conn *nftables.Conn) error {
		if err := loads(conn, divertRules(Diversion{MAC: make(net.HardwareAddr, 6), IPv6: true})); err != nil {
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

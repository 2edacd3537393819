package nft

import (
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// routerRules is the table in the namespace through which encrypted networks
// reach other nodes. The balancer has written the chosen backend's hardware address
// into a packet to a service address; by it the packet gets the backend's
// own address, and connection tracking gives the answer the service's. Packets to
// an endpoint's own address come with the router's hardware address and pass.
// There is one of each family.
func (f *family) routerRules(r ingress.Router) ruleset {
	backends := set{
		name: "backends", key: nftables.TypeEtherAddr, data: f.addr, isMap: true,
		elements: map[string]string{}, show: f.showBackend,
	}
	for _, b := range r.Backends {
		if a := f.addressOf(b); a.IsValid() {
			backends.elements[string(b.MAC)] = raw(a)
		}
	}
	return ruleset{
		family: f.host, sets: []set{backends},
		chains: []chain{{
			name: "prerouting", kind: nftables.ChainTypeNAT,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest,
			rules: []rule{{"to a service by its backend's hardware address: to the backend", []expr.Any{
				&expr.Payload{DestRegister: f.mac, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
				lookup("backends", f.mac, f.hostAddr),
				&expr.Counter{},
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: f.nat, RegAddrMin: f.hostAddr},
			}}},
		}},
	}
}

// acceptRules let the router's links take what is addressed to a backend's
// hardware address, which is not theirs.
func acceptRules(r ingress.Router) ruleset {
	out := ruleset{family: nftables.TableFamilyNetdev}
	for _, vni := range r.VNIs {
		link := weft.RouterName(vni)
		out.chains = append(out.chains, chain{
			name: "in-" + link, kind: nftables.ChainTypeFilter, device: link,
			hook: nftables.ChainHookIngress, priority: nftables.ChainPriorityFilter,
			rules: []rule{{link + ": take what is for another's hardware address", []expr.Any{
				&expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.PACKET_OTHERHOST}},
				&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.PACKET_HOST)},
				&expr.Meta{Key: expr.MetaKeyPKTTYPE, SourceRegister: true, Register: 1},
			}}},
		})
	}
	return out
}

func (f *family) showBackend(key, data string) string {
	return net.HardwareAddr(key).String() + " -> " + f.show(data)
}

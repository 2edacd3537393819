package netstate

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// A task learns every node by which a request may come to it, this one among
// them; a node is known by its leg alone, whoever else joins or leaves.
func TestDeriveEntry(t *testing.T) {
	in := base()
	in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
	past := Node{ID: "n1-before", VTEP: vtep1, IngressAddr: netip.MustParsePrefix("10.255.0.9/16")}
	in.Nodes = append(in.Nodes, past, Node{ID: "n3", VTEP: netip.MustParseAddr("10.99.0.3")})
	node := func(n Node) ingress.EntryNode {
		a := n.IngressAddr.Addr()
		return ingress.EntryNode{MAC: weft.NodeMAC(n.ID, a), Addr: a}
	}
	want := ingress.Entry{
		Link: weft.IngressLeg, Addr: self.IngressAddr, Nodes: []ingress.EntryNode{node(self), node(other)},
		Tasks: []ingress.EntryTask{{Task: "web1", NetNS: "/ns/web1", Link: "eth0", Addr: netip.MustParsePrefix("10.255.0.5/16")}},
	}
	if got := Derive(in).Ingress.Ingress; !reflect.DeepEqual(got, want) {
		t.Errorf("entry\n%+v, want\n%+v", got, want)
	}
	in.Nodes = []Node{self}
	want.Nodes = want.Nodes[:1]
	if got := Derive(in).Ingress.Ingress; !reflect.DeepEqual(got, want) {
		t.Errorf("entry of one node\n%+v, want\n%+v", got, want)
	}
	in.Self.IngressAddr = netip.Prefix{}
	if got := Derive(in).Ingress.Ingress; !reflect.DeepEqual(got, ingress.Entry{}) {
		t.Errorf("entry of a node without a leg: %+v", got)
	}
}

// Answers fit the narrowest way to any node that still has a leg.
func TestEntryMTU(t *testing.T) {
	in := base()
	far := Node{ID: "n4", VTEP: netip.MustParseAddr("10.99.0.4"), IngressAddr: netip.MustParsePrefix("10.255.0.14/16")}
	bare := Node{ID: "n3", VTEP: netip.MustParseAddr("10.99.0.3")}
	in.Nodes = append(in.Nodes, far, bare)
	for _, tc := range []struct {
		paths map[netip.Addr]int
		want  int
	}{
		{nil, 0},
		{map[netip.Addr]int{other.VTEP: in.MTU}, 0},
		{map[netip.Addr]int{other.VTEP: in.MTU - 100}, in.MTU - 150},
		{map[netip.Addr]int{other.VTEP: in.MTU - 100, far.VTEP: in.MTU - 200, bare.VTEP: in.MTU - 300}, in.MTU - 250},
	} {
		in.Paths = tc.paths
		if got := Derive(in).Ingress.Ingress.MTU; got != tc.want {
			t.Errorf("paths %v: MTU %d, want %d", tc.paths, got, tc.want)
		}
	}
}

// What a task's port sees of a node is what the node's leg is made with.
func TestEntryNodesAreTheLegs(t *testing.T) {
	here := base()
	there := base()
	there.Self = other
	for _, in := range []Input{here, there} {
		leg := Derive(in).Overlay.Networks[weft.IngressVNI].HostLeg
		for _, from := range []Input{here, there} {
			found := false
			for _, n := range Derive(from).Ingress.Ingress.Nodes {
				found = found || n.Addr == leg.Addr.Addr() && n.MAC.String() == leg.MAC.String()
			}
			if !found {
				t.Errorf("%s does not know the leg %s %s of %s", from.Self.ID, leg.Addr, leg.MAC, in.Self.ID)
			}
		}
	}
}

// On an encrypted ingress network the way between nodes is by addresses of the
// network alone: a client's could not pass.
func TestEncryptedIngressHidesClients(t *testing.T) {
	in := base()
	if p := Derive(in).Ingress.Published[0]; p.HideClient {
		t.Error("the client is hidden although nobody asked for it")
	}
	secret := mesh
	secret.Spec.Options = map[string]string{weft.OptionEncrypted: ""}
	in.Networks = []weft.Network{front, secret}
	if !secret.Spec.Encrypted() {
		t.Fatal("the test's network is not encrypted")
	}
	if p := Derive(in).Ingress.Published[0]; !p.HideClient {
		t.Error("the client's address is kept where it cannot pass")
	}
}

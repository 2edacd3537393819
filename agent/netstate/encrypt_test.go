package netstate

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// secretFront is network front, encrypted.
func secretFront() weft.Network {
	n := front
	n.Spec.Options = map[string]string{weft.OptionEncrypted: ""}
	return n
}

// TestDeriveEncrypted: an encrypted network has the peers' keys, a smaller MTU
// and a way for the balancer to who is elsewhere; others have none of it.
func TestDeriveEncrypted(t *testing.T) {
	in := base()
	in.KeyEpoch = 3
	in.Nodes[1].Keys = []weft.NodeKey{{Epoch: 3, Port: 51821}}
	in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
	there := remoteWeb(2, "10.0.16.4", weft.EndpointReady)
	in.Endpoints = []weft.OwnedEndpoint{there}
	plain := Derive(in)
	if e := plain.Overlay.Encryption; e.Epoch != 0 || e.Peers != nil || plain.Ingress.Router.NetNS != "" {
		t.Errorf("without an encrypted network: %+v, %+v", e, plain.Ingress.Router)
	}
	in.Networks = []weft.Network{back, secretFront(), mesh}
	out := Derive(in)
	n := out.Overlay.Networks[front.VNI]
	if !n.Encrypted || n.MTU != 1440 || out.Overlay.Networks[weft.IngressVNI].Encrypted || out.Overlay.Networks[weft.IngressVNI].MTU != 1450 {
		t.Errorf("networks %+v", out.Overlay.Networks)
	}
	want := vxlan.Encryption{Epoch: 3, Peers: []vxlan.EncryptionPeer{{Node: "n2", VTEP: vtep2, Keys: in.Nodes[1].Keys}}}
	if !reflect.DeepEqual(out.Overlay.Encryption, want) {
		t.Errorf("encryption %+v", out.Overlay.Encryption)
	}
	mac := weft.EndpointMAC(there.Task, there.Addr)
	r := ingress.Router{NetNS: "/ns/" + weft.CryptNetNS("n1"), VNIs: []uint32{front.VNI}, Backends: []ingress.Backend{{Task: there.Task, Addr: there.Addr, MAC: mac}}}
	if !reflect.DeepEqual(out.Ingress.Router, r) {
		t.Errorf("router %+v", out.Ingress.Router)
	}
	if err := vxlan.Validate(out.Overlay); err != nil {
		t.Error(err)
	}
	// Between the two states nothing of either is missing.
	for _, u := range []vxlan.State{Union(plain.Overlay, out.Overlay), Union(out.Overlay, vxlan.State{})} {
		if u.Encryption.Epoch != 3 || len(u.Encryption.Peers) != 1 {
			t.Errorf("between: %+v", u.Encryption)
		}
	}
}

// TestDeriveUnderlay: all members may send, and before any is known nobody is
// kept out.
func TestDeriveUnderlay(t *testing.T) {
	in := base()
	if u := Derive(in).Ingress.Underlay; u.Port != 4789 || u.Self != vtep1 || !slices.Equal(u.Members, []netip.Addr{vtep1, vtep2}) {
		t.Errorf("underlay %+v", u)
	}
	in.Nodes = nil
	if u := Derive(in).Ingress.Underlay; u.Port != 0 {
		t.Errorf("underlay of nobody %+v", u)
	}
}

// TestRestartKeepsEncryptedEndpoints: what a kernel shows of an encrypted network
// is the router behind every endpoint elsewhere. That is no change of holder: a
// daemon that starts anew takes no address from anybody.
func TestRestartKeepsEncryptedEndpoints(t *testing.T) {
	in := base()
	in.Networks[1].Spec.Options = map[string]string{weft.OptionEncrypted: ""}
	in.Local = []LocalTask{localWeb(1, "10.0.16.3/20", "10.255.0.5/16", weft.EndpointReady)}
	in.Endpoints = []weft.OwnedEndpoint{remoteWeb(2, "10.0.16.4", weft.EndpointReady)}
	want := Derive(in).Overlay
	if n := want.Networks[front.VNI]; !n.Encrypted || len(n.Peers) != 1 {
		t.Fatalf("the network is %+v, want an encrypted one with a peer", n)
	}
	have := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for vni, n := range want.Networks {
		n.Peers, n.VIPs = vxlan.Observed(vxlan.Derive(n))
		have.Networks[vni] = n
	}
	if _, ok := Between(have, want, in); ok {
		t.Error("an address goes from one holder to another although nothing changed")
	}
}

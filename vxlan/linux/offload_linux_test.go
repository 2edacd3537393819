package linux

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// TestCutsTunnels: a veth says that it does, the loopback that it does not.
func TestCutsTunnels(t *testing.T) {
	path, err := netns.Create(t.TempDir(), "n")
	must(t, err)
	t.Cleanup(func() { netns.Remove(path) })
	must(t, netns.Do(path, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "under0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "under1"}); err != nil {
			return err
		}
		for name, a := range map[string]string{"lo": "10.99.8.1", "under0": "10.99.8.2"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			err = netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(a), Mask: net.CIDRMask(32, 32)}})
			if err = errors.Join(err, netlink.LinkSetUp(l)); err != nil {
				return err
			}
			got, err := CutsTunnels(netip.MustParseAddr(a))
			if err != nil || got != (name == "under0") {
				t.Errorf("%s: %t, %v", name, got, err)
			}
		}
		if _, err := CutsTunnels(netip.MustParseAddr("10.99.8.3")); !errors.Is(err, weft.ErrNotFound) {
			t.Errorf("without a link: %v", err)
		}
		return nil
	}))
}

// FuzzFeatures: whatever the kernel answers, it is read or refused.
func FuzzFeatures(f *testing.F) {
	f.Add([]byte{11, 1, 0, 0})
	f.Add([]byte{11, 1, 0, 0, 8, 0, 4, 0x80, 4, 0, 3, 0x80})
	f.Fuzz(func(_ *testing.T, b []byte) { hasFeature(b, tunnelSegmentation) })
}

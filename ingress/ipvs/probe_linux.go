package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"

	kernel "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// The probe's own names, which nobody sees outside its namespace. Addresses are of
// RFC 5737 and RFC 3849.
const (
	probeNS     = "weft-probe-ipvs"
	probeBridge = "br"
	probeVNI    = weft.LastVNI
)

// Probe implements ingress.Engine: it puts a service of each family with a backend
// that takes and one that drains on a bridge in a scratch namespace, reads them
// back and removes all of it. It is not called at the same time as Apply.
func (e *Engine) Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	path, err := netns.Create(e.cfg.NetNSDir, probeNS)
	if err != nil {
		return fmt.Errorf("make probe namespace: %w", err)
	}
	err = e.rehearse(ctx, path)
	if err != nil && !errors.Is(err, weft.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", err, weft.ErrUnsupported)
	}
	if err != nil {
		err = fmt.Errorf("service engine ipvs: %w", err)
	}
	return errors.Join(err, netns.Remove(path))
}

func (e *Engine) rehearse(ctx context.Context, path string) error {
	if err := netns.Do(path, func() error {
		if _, err := family(); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = probeBridge, net.FlagUp
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make a bridge: %w", err)
		}
		return nil
	}); err != nil {
		return err
	}
	p, err := New(Config{Node: "probe", NetNSDir: e.cfg.NetNSDir})
	if err != nil {
		return err
	}
	n := ingress.Network{VNI: probeVNI, NetNS: path, Bridge: probeBridge, IPv6: true}
	for i, vip := range []string{"192.0.2.1", "2001:db8::1"} {
		s := ingress.Service{ID: "probe", VIP: netip.MustParseAddr(vip)}
		for j := range byte(2) {
			s.Backends = append(s.Backends, ingress.Backend{
				Task: weft.ID([]byte{'0' + j}), Addr: netip.AddrFrom4([4]byte{192, 0, 2, 2 + j}), Addr6: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: 2 + j}),
				MAC: net.HardwareAddr{2, 0, 0, 0, byte(i), j}, Draining: j == 1,
			})
		}
		n.Services = append(n.Services, s)
	}
	if err := p.Apply(ctx, ingress.Table{Networks: []ingress.Network{n}}); err != nil {
		return fmt.Errorf("this kernel lacks a part of what is needed (modules ip_vs, ip_vs_rr, macvlan, nf_tables): %w", err)
	}
	e.bent = !p.divert.Straight()
	err = netns.Do(path, func() error {
		h, err := kernel.New("")
		if err != nil {
			return fmt.Errorf("open IPVS: %w", err)
		}
		defer h.Close()
		have, _, err := readServices(h, n.VNI)
		if err != nil {
			return err
		}
		want, err := plan(n)
		if err == nil && !reflect.DeepEqual(have, want.services) {
			err = fmt.Errorf("the kernel took services %v and has %v", want.services, have)
		}
		return err
	})
	return errors.Join(err, p.Close(ctx))
}

// Note says what this host's kernel lacks that the engine would use; "" = nothing, or not
// probed yet. It is not called at the same time as Probe.
func (e *Engine) Note() string {
	if !e.bent {
		return ""
	}
	return "what is sent to a service address takes the longer way over the bridge, as this kernel cannot take a frame out at its port (Linux 6.4)"
}

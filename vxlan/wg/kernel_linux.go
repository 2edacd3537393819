package wg

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// kernelDriver has the devices in the kernel.
type kernelDriver struct{ path string }

func (k *kernelDriver) ensure(_ context.Context, path string, _ uint16) error {
	k.path = path
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	// The requests come from the host's namespace, so that the devices' UDP
	// sockets are there.
	for slot := range weft.KeySlots {
		if err := addDevice(weft.CryptLink(slot), ns.FD()); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add WireGuard device %s: %w", weft.CryptLink(slot), err)
		}
	}
	return nil
}

func addDevice(name string, ns int) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink socket: %w", err)
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Namespace = name, netlink.NsFd(ns)
	return h.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
}

// control opens the kernel's WireGuard interface inside the namespace.
func (k *kernelDriver) control(f func(*wgctrl.Client) error) error {
	var c *wgctrl.Client
	err := netns.Do(k.path, func() (err error) {
		c, err = wgctrl.New()
		return err
	})
	if err != nil {
		return fmt.Errorf("open WireGuard control: %w", err)
	}
	defer c.Close()
	return f(c)
}

func (k *kernelDriver) read(_ context.Context, slot int) (device, error) {
	d := device{peers: map[weft.PublicKey]peer{}}
	err := k.control(func(c *wgctrl.Client) error {
		have, err := c.Device(weft.CryptLink(slot))
		if err != nil {
			return fmt.Errorf("read WireGuard device %s: %w", weft.CryptLink(slot), err)
		}
		d.private, d.port = privateKey(have.PrivateKey), uint16(have.ListenPort)
		for _, p := range have.Peers {
			q := peer{allowed: map[netip.Addr]bool{}, handshake: p.LastHandshakeTime}
			if p.Endpoint != nil {
				e := p.Endpoint.AddrPort()
				q.endpoint = netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
			}
			for _, a := range p.AllowedIPs {
				q.allowed[prefixOf(&a).Addr()] = true
			}
			d.peers[weft.PublicKey(p.PublicKey)] = q
		}
		return nil
	})
	return d, err
}

func (k *kernelDriver) write(_ context.Context, slot int, c change) error {
	cfg := wgtypes.Config{ReplacePeers: c.isFresh, PrivateKey: (*wgtypes.Key)(c.private)}
	if c.port != nil {
		port := int(*c.port)
		cfg.ListenPort = &port
	}
	for _, p := range c.peers {
		pc := wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.public), Remove: p.remove}
		if p.endpoint.IsValid() {
			pc.Endpoint = net.UDPAddrFromAddrPort(p.endpoint)
		}
		for _, a := range p.allow {
			pc.AllowedIPs = append(pc.AllowedIPs, *ipNet(netip.PrefixFrom(a, a.BitLen())))
		}
		if p.keepalive {
			every := keepalive
			pc.PersistentKeepaliveInterval = &every
		}
		cfg.Peers = append(cfg.Peers, pc)
	}
	err := k.control(func(w *wgctrl.Client) error { return w.ConfigureDevice(weft.CryptLink(slot), cfg) })
	if errors.Is(err, unix.EADDRINUSE) {
		return portTaken(*c.port)
	}
	if err != nil {
		return fmt.Errorf("configure WireGuard device %s: %w", weft.CryptLink(slot), err)
	}
	return nil
}

// remove: the devices go with their namespace, but the kernel takes its time
// about that, and their ports stay taken meanwhile.
func (k *kernelDriver) remove(context.Context) error {
	err := netns.Do(k.path, func() error {
		for slot := range weft.KeySlots {
			l, err := netlink.LinkByName(weft.CryptLink(slot))
			var missing netlink.LinkNotFoundError
			if errors.As(err, &missing) {
				continue
			}
			if err != nil {
				return fmt.Errorf("look up WireGuard device: %w", err)
			}
			if err := netlink.LinkDel(l); err != nil && !gone(err) {
				return fmt.Errorf("delete WireGuard device: %w", err)
			}
		}
		return nil
	})
	if errors.Is(err, weft.ErrNotFound) {
		return nil
	}
	return err
}

// probeKernel makes a device in a scratch namespace and removes both.
func probeKernel(scratch string) error {
	path, err := netns.Create(scratch, probeName)
	if err != nil {
		return fmt.Errorf("make probe namespace: %w", err)
	}
	ns, err := netns.Open(path)
	if err == nil {
		if err = addDevice(weft.CryptLink(0), ns.FD()); err != nil {
			err = fmt.Errorf("%w: add a WireGuard device: %w", weft.ErrUnsupported, err)
		}
		err = errors.Join(err, ns.Close())
	}
	return errors.Join(err, netns.Remove(path))
}

const probeName = "weft-probe-wg"

func portTaken(port uint16) error {
	return fmt.Errorf("open UDP port %d for encrypted networks: it is taken: stop the other program: %w", port, weft.ErrConflict)
}

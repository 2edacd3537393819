//go:build lab

package lab

import (
	"bytes"
	order "encoding/binary"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// What TestLabRepairs breaks on the overlay engine ebpf.

// pins is where a host's overlay engine keeps its maps; "" as long as it has none.
// The daemon is not asked: it may stand still.
func (r *rig) pins(host string) string {
	found, _ := filepath.Glob(filepath.Join(r.host(host).Paths.ExecRoot, "bpf", "*", "v*"))
	if len(found) != 1 {
		return ""
	}
	return found[0]
}

// eachEntry calls f with every entry of a network in a map: network numbers stand
// at the beginning of keys, or of the values where the key is a link. f may change
// the map.
func eachEntry(pins, name string, vni uint32, f func(m *ebpf.Map, key, value []byte) error) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(pins, name), nil)
	if err != nil {
		return err
	}
	defer m.Close()
	var keys, values [][]byte
	var key, value []byte
	all := m.Iterate()
	for all.Next(&key, &value) {
		of := key
		if name == overlay.MapPorts {
			of = value
		}
		if order.NativeEndian.Uint32(of) == vni {
			keys, values = append(keys, bytes.Clone(key)), append(values, bytes.Clone(value))
		}
	}
	if err := all.Err(); err != nil {
		return err
	}
	for i := range keys {
		if err := f(m, keys[i], values[i]); err != nil {
			return err
		}
	}
	return nil
}

// isRemote tells by the kind of a value of the map of hardware addresses (enum kind
// of vxlan/bpf/c/overlay.h).
func isRemote(value []byte) bool { return value[0] == 3 || value[0] == 4 }

// strikeMaps is strike on the engine ebpf: n entries and n neighbours, ports,
// networks, attachments and slots.
func (d *damager) strikeMaps(index, n int, w repairWorld) {
	d.t.Helper()
	pins, front, back := d.rig.pins(d.host), w.nets["front"], w.nets["back"]
	remote := map[string]bool{}
	d.spoil(pins, overlay.MapMACs, front, n, "fdb", func(key, value []byte) bool {
		if isRemote(value) {
			remote[string(key[4:10])] = true
			value[27] ^= 9 // the last byte of the node's address
		}
		return isRemote(value)
	})
	d.spoil(pins, "eps", front, n, "neighbour", func(_, value []byte) bool {
		is := remote[string(value[:6])]
		value[5] ^= 9
		return is
	})
	switch index {
	case 0: // an entry of a port gone, a network gone, the way back from the balancer
		d.spoil(pins, overlay.MapPorts, front, 1, "port", func(_, _ []byte) bool { return true })
		d.counts["port wrong"] += d.counts["port missing"] // the port is there
		delete(d.counts, "port missing")
		d.spoil(pins, overlay.MapNets, back, 1, "network", func(_, _ []byte) bool { return true })
		d.unhook(pins, 1)
	case 1: // a port down, the balancer unhooked, the underlay's program detached
		d.must(withLinks(d.rig.host(d.host).Paths.NetNS, func(h *netlink.Handle) error {
			l, err := h.LinkByName(d.portOf(pins, front))
			if err != nil {
				return err
			}
			return h.LinkSetDown(l)
		}))
		d.counts["port wrong"]++
		d.unhook(pins, int(overlay.HookBalance))
		d.detach(pins, "u*", "device wrong", (link.Link).Detach)
	case 2: // a port's link unpinned, the tunnel's program detached, the host's table gone
		d.detach(pins, d.portOf(pins, back), "port wrong", (link.Link).Unpin)
		d.detach(pins, "t*", "device wrong", (link.Link).Detach)
		d.hostTable()
	}
}

// spoil deletes every other of n entries of a map and writes the rest as change
// leaves them. Those for which it says no are left alone.
func (d *damager) spoil(pins, name string, vni uint32, n int, object string, change func(key, value []byte) bool) {
	d.t.Helper()
	done := 0
	d.must(eachEntry(pins, name, vni, func(m *ebpf.Map, key, value []byte) error {
		if !change(key, value) || done == n {
			return nil
		}
		done++
		if done%2 == 1 {
			d.counts[object+" missing"]++
			return m.Delete(key)
		}
		d.counts[object+" wrong"]++
		return m.Put(key, value)
	}))
	if done < n {
		d.t.Fatalf("%s has %d entries of map %s to break, want %d", d.host, done, name, n)
	}
}

// portOf is the host's end of a task's port.
func (d *damager) portOf(pins string, vni uint32) (name string) {
	d.t.Helper()
	d.must(withLinks(d.rig.host(d.host).Paths.NetNS, func(h *netlink.Handle) error {
		return eachEntry(pins, overlay.MapPorts, vni, func(_ *ebpf.Map, key, _ []byte) error {
			l, err := h.LinkByIndex(int(order.NativeEndian.Uint32(key)))
			if err == nil {
				name = l.Attrs().Name
			}
			return err
		})
	}))
	return name
}

func (d *damager) unhook(pins string, slot int) {
	d.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(pins, overlay.MapHooks), nil)
	d.must(err)
	defer m.Close()
	d.must(m.Delete(uint32(slot)))
	d.counts["hook wrong"]++
}

// detach breaks the link of a pin.
func (d *damager) detach(pins, pin, kind string, how func(link.Link) error) {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(pins, "links", pin))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("links %q of %s: %v, %v (where the kernel has no tcx there are none: the tests of vxlan/bpf break filters)", pin, d.host, found, err)
	}
	l, err := link.LoadPinnedLink(found[0], nil)
	d.must(err)
	defer l.Close()
	d.must(how(l))
	d.counts[kind]++
}

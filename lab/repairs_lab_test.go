//go:build lab

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// What others break in the kernel behind weft's back: found, put right within
// seconds, counted once. Labs are named "t-rep…", ports are 8071 and up.

const (
	// repairLimit is what an operator is promised.
	repairLimit = 10 * time.Second
	// repairEntries is how many forwarding entries, and as many neighbours,
	// are deleted or corrupted, over three hosts.
	repairEntries = 20
)

// TestLabRepairs breaks 57 things on 3 hosts with 12 tasks, 60 on the engine ebpf;
// soak: 5 hosts with 200 tasks.
func TestLabRepairs(t *testing.T) { repairs(t, "t-rep", 3, 12) }

// TestSoakRepairs is TestLabRepairs in its long form.
func TestSoakRepairs(t *testing.T) {
	soak(t)
	repairs(t, "t-rep-s", 5, 200)
}

func repairs(t *testing.T, lab string, hosts, tasks int) {
	result := newSoakResult(t)
	r := newRig(t, lab, "--hosts", fmt.Sprint(hosts))
	var names []string
	for i := range hosts {
		names = append(names, fmt.Sprintf("h%d", i+1))
	}
	w := r.repairWorld(names, tasks)
	for _, h := range names {
		if c := r.repairCounts(h); len(c) > 0 {
			t.Errorf("%s has repaired %v, and nobody has broken anything", h, c)
		}
	}
	// Or what follows would prove nothing.
	r.eventually("every host reaches the tasks", func() error { return r.reach(names) })
	before, wasKernel := r.processes(names), r.kernels(names, w)
	want := map[string]map[string]int{}
	began := time.Now()
	for i, h := range three {
		d := damager{t: t, rig: r, host: h, counts: map[string]int{}}
		d.paused(func() {
			d.strike(i, w)
			d.strikeBoxes(i)
		})
		want[h] = d.counts
	}
	took, err := r.awaitRepairs(names, want, began.Add(repairLimit))
	if err != nil {
		t.Fatal(err)
	}
	result.printf("%d hosts, %d tasks: %d repairs within %s: %v", hosts, tasks, total(want), took.Round(10*time.Millisecond), want)
	for h, is := range r.kernels(names, w) {
		if more, less := without(is, wasKernel[h]), without(wasKernel[h], is); len(more)+len(less) > 0 {
			t.Errorf("%s has %q more, lacks %q", h, more, less)
		}
	}
	if err := r.reach(names); err != nil {
		t.Errorf("after the repairs: %v", err)
	}
	// Two passes later: nothing was counted again.
	if err := pause(t.Context(), 11*time.Second); err != nil {
		t.Fatal(err)
	}
	for _, h := range names {
		got := r.repairCounts(h)
		if !maps.Equal(got, want[h]) {
			t.Errorf("%s has counted %v two passes later, want %v", h, got, want[h])
		}
		log, err := os.ReadFile(r.host(h).Paths.Log)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(log, []byte("msg=repaired ")); n != sum(got) {
			t.Errorf("%s has logged %d repairs and counted %d", h, n, sum(got))
		}
	}
	if now := r.processes(names); !slices.Equal(now, before) {
		t.Errorf("containers have changed: %q more, %q gone", without(now, before), without(before, now))
	}
	result.printf("no repair counted twice, no container restarted, all tables as before")
	r.repairsOfAbsence(names, w, wasKernel["h1"])
}

// repairWorld is networks and services: front with the tasks, back with one
// task per host.
type repairWorld struct {
	nets map[string]uint32 // VNI by name
	ids  map[string]weft.ID
}

func (r *rig) repairWorld(hosts []string, tasks int) repairWorld {
	r.t.Helper()
	w := repairWorld{nets: map[string]uint32{"ingress": weft.IngressVNI}, ids: map[string]weft.ID{}}
	for _, n := range []string{"front", "back"} {
		w.ids[n] = weft.ID(r.must(r.on("h1", "network", "create", "--driver", "overlay", n)...))
		text := r.must(r.on("h1", "network", "inspect", "-f", `{{index .Options "com.docker.network.driver.overlay.vxlanid_list"}}`, n)...)
		vni, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			r.t.Fatal(err)
		}
		w.nets[n] = uint32(vni)
	}
	r.must(r.on("h1", "service", "create", "-d", "--name", "side", "--mode", "global", "--network", "back", "--publish", "8071:80", "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "many", "--replicas", fmt.Sprint(tasks), "--network", "front", "weft/whoami")...)
	want := fmt.Sprintf("%d/%d", tasks, tasks)
	ctx, cancel := context.WithTimeout(r.t.Context(), settle+time.Duration(tasks)*2*time.Second)
	defer cancel()
	for {
		out := r.must(r.on("h1", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")...)
		if strings.Contains(out, "many "+want) && strings.Contains(out, fmt.Sprintf("side %d/%d", len(hosts), len(hosts))) {
			break
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			r.t.Fatalf("tasks: %s", out)
		}
	}
	// Every host knows every task once each has a neighbour for each remote one.
	r.eventually("every host knows all tasks", func() error {
		for _, h := range hosts {
			remote, err := r.remoteOf(h, w.nets["front"])
			if err != nil {
				return err
			}
			local := len(r.containers(h, "many"))
			if remote+local != tasks {
				return fmt.Errorf("%s has %d local tasks and %d remote ones, want %d", h, local, remote, tasks)
			}
		}
		return nil
	})
	return w
}

// onEBPF reports whether the labs run the engine ebpf.
func onEBPF() bool { e := os.Getenv(overlayEnv); return e == "ebpf" || e == "" }

// remoteOf is how many endpoints of a network a host knows on others.
func (r *rig) remoteOf(host string, vni uint32) (int, error) {
	if onEBPF() {
		n := 0
		err := eachEntry(r.pins(host), overlay.MapMACs, vni, func(_ *ebpf.Map, _, value []byte) error {
			if isRemote(value) {
				n++
			}
			return nil
		})
		return n, err
	}
	lines, err := tablesOf(r.hidden(host, vni))
	return len(slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "fdb self ") })), err
}

// hidden is the namespace file of a network on a host.
func (r *rig) hidden(host string, vni uint32) string {
	r.t.Helper()
	var info struct{ Swarm struct{ NodeID weft.ID } }
	if err := r.ask(host, "/info", &info); err != nil {
		r.t.Fatal(err)
	}
	return filepath.Join(r.host(host).Paths.ExecRoot, "netns", weft.OverlayNetNS(info.Swarm.NodeID, vni))
}

// ask gets a JSON object from a host's daemon.
func (r *rig) ask(host, path string, out any) error {
	var d net.Dialer
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", r.host(host).Paths.Socket)
	}}}
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, "http://weft"+path, nil)
	if err != nil {
		return err
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s of %s: %s %s, %v", path, host, res.Status, b, err)
	}
	return json.Unmarshal(b, out)
}

// repairCounts are the repairs of a host by kind.
func (r *rig) repairCounts(host string) map[string]int {
	r.t.Helper()
	var a api.RepairsAnswer
	if err := r.ask(host, api.RepairsPath, &a); err != nil {
		r.t.Fatal(err)
	}
	out := map[string]int{}
	for _, c := range a.Repairs {
		out[c.Kind] = int(c.Count)
	}
	return out
}

func sum(m map[string]int) (n int) {
	for _, c := range m {
		n += c
	}
	return n
}

func total(ms map[string]map[string]int) (n int) {
	for _, m := range ms {
		n += sum(m)
	}
	return n
}

// awaitRepairs waits until the hosts have counted exactly what is wanted.
func (r *rig) awaitRepairs(hosts []string, want map[string]map[string]int, deadline time.Time) (time.Duration, error) {
	began := time.Now()
	for {
		missing := ""
		for _, h := range hosts {
			got := r.repairCounts(h)
			if !maps.Equal(got, want[h]) {
				missing = fmt.Sprintf("%s has counted %v, want %v", h, got, want[h])
			}
			if sum(got) > sum(want[h]) {
				return 0, errors.New(missing)
			}
		}
		if missing == "" {
			return time.Since(began), nil
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("not repaired within %s: %s", repairLimit, missing)
		}
		if err := pause(r.t.Context(), 50*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// processes are the containers of all hosts with their first process.
func (r *rig) processes(hosts []string) []string {
	r.t.Helper()
	var out []string
	for _, h := range hosts {
		ids := strings.Fields(r.must(r.on(h, "ps", "-a", "-q", "--no-trunc")...))
		for line := range strings.Lines(r.must(r.on(h, append([]string{"inspect", "-f", h + " {{.Id}} {{.State.Pid}} {{.State.Status}}"}, ids...)...)...)) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	slices.Sort(out)
	return out
}

// kernels are the overlay tables of every host and what is around its tasks, one
// line for each thing.
func (r *rig) kernels(hosts []string, w repairWorld) map[string][]string {
	r.t.Helper()
	out := map[string][]string{}
	for _, h := range hosts {
		for name, vni := range w.nets {
			lines, err := r.tables(h, vni)
			if err != nil {
				r.t.Fatal(err)
			}
			for _, l := range lines {
				out[h] = append(out[h], name+": "+l)
			}
		}
		around, err := r.boxesOf(h)
		if err != nil {
			r.t.Fatal(err)
		}
		out[h] = append(out[h], around...)
		err = withNFT(r.host(h).Paths.NetNS, func(c *nftables.Conn) error {
			tables, err := c.ListTables()
			for _, tb := range tables {
				out[h] = append(out[h], "nft table "+tb.Name)
			}
			return err
		})
		if err != nil {
			r.t.Fatal(err)
		}
	}
	return out
}

// tables are those of one network.
func (r *rig) tables(host string, vni uint32) (out []string, err error) {
	if !onEBPF() {
		return tablesOf(r.hidden(host, vni))
	}
	for _, name := range []string{overlay.MapMACs, "eps", overlay.MapPorts, overlay.MapNets} {
		err = errors.Join(err, eachEntry(r.pins(host), name, vni, func(_ *ebpf.Map, key, value []byte) error {
			out = append(out, fmt.Sprintf("%s %x %x", name, key, value))
			return nil
		}))
	}
	return out, err
}

// withNFT calls f with a connection into the namespace, whose file must stay
// open: the library dials with each transaction.
func withNFT(ns string, f func(*nftables.Conn) error) error {
	file, err := os.Open(ns)
	if err != nil {
		return err
	}
	defer file.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(file.Fd())))
	if err != nil {
		return err
	}
	return f(conn)
}

// tablesOf reads a hidden namespace: links with what is set of them, permanent
// neighbours, static forwarding entries. Indexes are told by name.
func tablesOf(ns string) ([]string, error) {
	var out []string
	err := withLinks(ns, func(h *netlink.Handle) error {
		links, err := h.LinkList()
		if err != nil {
			return err
		}
		name := map[int]string{0: "-"}
		for _, l := range links {
			name[l.Attrs().Index] = l.Attrs().Name
		}
		for _, l := range links {
			a := l.Attrs()
			out = append(out, fmt.Sprintf("link %s mtu %d up %t on %s", a.Name, a.MTU, a.Flags&net.FlagUp != 0, name[a.MasterIndex]))
			if p, err := h.LinkGetProtinfo(l); err == nil && a.MasterIndex != 0 {
				out = append(out, fmt.Sprintf("port %s learning %t flood %t hairpin %t", a.Name, p.Learning, p.Flood, p.Hairpin))
			}
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			ns, err := h.NeighList(0, family)
			if err != nil {
				return err
			}
			for _, n := range ns {
				if n.State == netlink.NUD_PERMANENT {
					out = append(out, fmt.Sprintf("neighbour %s %s", n.IP, n.HardwareAddr))
				}
			}
		}
		fdb, err := h.NeighList(0, unix.AF_BRIDGE)
		if err != nil {
			return err
		}
		for _, e := range fdb {
			switch {
			case e.Flags&netlink.NTF_SELF != 0 && e.IP != nil:
				out = append(out, fmt.Sprintf("fdb self %s %s %s", e.HardwareAddr, name[e.LinkIndex], e.IP))
			case e.State == netlink.NUD_NOARP:
				out = append(out, fmt.Sprintf("fdb %s %s", e.HardwareAddr, name[e.LinkIndex]))
			}
		}
		return nil
	})
	return out, err
}

// reach asks the service address of many from one container of it on every host.
func (r *rig) reach(hosts []string) error {
	r.t.Helper()
	vip, err := r.vip("many")
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range hosts {
		ids := r.containers(h, "many")
		ns := "/proc/" + r.must(r.on(h, "inspect", "-f", "{{.State.Pid}}", ids[0])...) + "/ns/net"
		for range 2 * len(hosts) {
			if err := askOnce(r.t.Context(), ns, ask(vip+":80")); err != nil {
				errs = append(errs, fmt.Errorf("from %s: %w", h, err))
			}
		}
		addr := r.host(h).Addr.String() + ":8071"
		if err := askOnce(r.t.Context(), r.clientNS(), ask(addr)); err != nil {
			errs = append(errs, fmt.Errorf("port of %s: %w", h, err))
		}
	}
	return errors.Join(errs...)
}

// damager breaks things on one host and counts what must be repaired.
type damager struct {
	t      *testing.T
	rig    *rig
	host   string
	counts map[string]int
}

func (d *damager) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatalf("break %s: %v", d.host, err)
	}
}

// paused runs f while the host's daemon stands still, so that no pass sees half
// of the damage.
func (d *damager) paused(f func()) {
	d.t.Helper()
	pid, err := daemonPID(d.rig.host(d.host))
	if err != nil || pid == 0 {
		d.t.Fatalf("daemon of %s: pid %d, %v", d.host, pid, err)
	}
	d.must(unix.Kill(pid, unix.SIGSTOP))
	defer func() { d.must(unix.Kill(pid, unix.SIGCONT)) }()
	f()
}

// strike breaks the share of one of three hosts.
func (d *damager) strike(index int, w repairWorld) {
	d.t.Helper()
	n := (repairEntries + index) / len(three) // 6, 7, 7
	if onEBPF() {
		d.strikeMaps(index, n, w)
		return
	}
	front, back, ingress := d.hiddenOf(w, "front"), d.hiddenOf(w, "back"), d.hiddenOf(w, "ingress")
	d.must(withLinks(front, func(h *netlink.Handle) error {
		return errors.Join(d.entries(h, w.nets["front"], n), d.neighbours(h, w.nets["front"], n))
	}))
	switch index {
	case 0: // a device down, and the MTU of another
		d.link(back, weft.VXLANName(w.nets["back"]), "device wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetDown(l) })
		d.link(ingress, weft.VXLANName(weft.IngressVNI), "network wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetMTU(l, 1300) })
	case 1: // learning on, and a task's port off its bridge
		d.link(back, weft.VXLANName(w.nets["back"]), "device wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetLearning(l, true) })
		d.must(withLinks(front, func(h *netlink.Handle) error {
			links, err := h.LinkList()
			if err != nil {
				return err
			}
			i := slices.IndexFunc(links, func(l netlink.Link) bool { return strings.HasPrefix(l.Attrs().Name, "wp") })
			d.counts["port wrong"]++
			return h.LinkSetNoMaster(links[i])
		}))
	case 2: // a device off its bridge, and the host's table gone
		d.link(back, weft.VXLANName(w.nets["back"]), "device wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetNoMaster(l) })
		d.hostTable()
	}
}

func (d *damager) hostTable() {
	d.t.Helper()
	d.must(withNFT(d.rig.host(d.host).Paths.NetNS, func(c *nftables.Conn) error {
		c.DelTable(&nftables.Table{Name: weft.TableName, Family: nftables.TableFamilyIPv4})
		return c.Flush()
	}))
	d.counts["nft table wrong"]++
}

// hiddenOf is the namespace file; the daemon cannot be asked, it stands still.
func (d *damager) hiddenOf(w repairWorld, network string) string {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.rig.host(d.host).Paths.ExecRoot, "netns", fmt.Sprintf("weft-*-n%d", w.nets[network])))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("namespace of %s on %s: %v, %v", network, d.host, found, err)
	}
	return found[0]
}

func (d *damager) link(ns, name, kind string, f func(*netlink.Handle, netlink.Link) error) {
	d.t.Helper()
	d.must(withLinks(ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		return f(h, l)
	}))
	d.counts[kind]++
}

// entries deletes every other of n forwarding entries and leads the rest astray.
func (d *damager) entries(h *netlink.Handle, vni uint32, n int) error {
	vx, err := h.LinkByName(weft.VXLANName(vni))
	if err != nil {
		return err
	}
	fdb, err := h.NeighList(vx.Attrs().Index, unix.AF_BRIDGE)
	if err != nil {
		return err
	}
	fdb = slices.DeleteFunc(fdb, func(e netlink.Neigh) bool { return e.Flags&netlink.NTF_SELF == 0 || e.IP == nil })
	if len(fdb) < n {
		return fmt.Errorf("%d forwarding entries, want %d", len(fdb), n)
	}
	for i, e := range fdb[:n] {
		x := netlink.Neigh{LinkIndex: e.LinkIndex, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP | netlink.NUD_REACHABLE, HardwareAddr: e.HardwareAddr}
		if i%2 == 0 {
			d.counts["fdb missing"]++
			master := x
			x.Flags, x.IP = netlink.NTF_SELF, net.IPv4zero
			master.Flags = netlink.NTF_MASTER
			err = errors.Join(h.NeighDel(&x), h.NeighDel(&master))
		} else {
			d.counts["fdb wrong"]++
			x.Flags, x.IP = netlink.NTF_SELF, net.IPv4(192, 0, 2, 9)
			err = h.NeighSet(&x)
		}
		if err != nil {
			return fmt.Errorf("entry %s: %w", e.HardwareAddr, err)
		}
	}
	return nil
}

// neighbours deletes every other of n neighbours and gives the rest another
// hardware address.
func (d *damager) neighbours(h *netlink.Handle, vni uint32, n int) error {
	br, err := h.LinkByName(weft.BridgeName(vni))
	if err != nil {
		return err
	}
	ns, err := h.NeighList(br.Attrs().Index, unix.AF_INET)
	if err != nil {
		return err
	}
	ns = slices.DeleteFunc(ns, func(e netlink.Neigh) bool { return e.State != netlink.NUD_PERMANENT })
	if len(ns) < n {
		return fmt.Errorf("%d neighbours, want %d", len(ns), n)
	}
	for i, e := range ns[:n] {
		x := netlink.Neigh{LinkIndex: e.LinkIndex, State: netlink.NUD_PERMANENT, IP: e.IP}
		if i%2 == 0 {
			d.counts["neighbour missing"]++
			err = h.NeighDel(&x)
		} else {
			d.counts["neighbour wrong"]++
			x.HardwareAddr = net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}
			err = h.NeighSet(&x)
		}
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", e.IP, err)
		}
	}
	return nil
}

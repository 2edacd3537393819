package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// The ways back in a task's namespace: by rule, then by the one route of their
// table. Numbers are our own choice.
const (
	wayTable = 4096 // of routes, by the port on the ingress network
	legTable = 4097 // by the gateway leg (legs_linux.go)
	// ruleMarked: what bears an entry node's mark, wherever it seems to go. It
	// stands behind the rule of local addresses, which a sandbox moves to 100
	// (agent/sandbox): what comes in bears the mark, too.
	ruleMarked = 200
	// ruleOwn and ruleDatagrams stand behind the main table (32766). A task
	// without a way out has no route to a client afar, so that no answer would
	// come to be marked: one from its own port, or a datagram of a socket that
	// has not said from where. What opens a connection still finds no route.
	ruleOwn       = 33000
	ruleDatagrams = 33001
)

// Kinds of repairs inside a task.
const (
	kindRule  = "routing rule wrong"
	kindRoute = "route wrong"
)

// insideMaxGap is how old the last look into a task may be while other things
// change; a pass that brings nothing new looks at everything.
const insideMaxGap = 5 * time.Second

// inside is what the engine has made in tasks' namespaces. Owned by Apply.
type inside struct {
	tasks map[string]*insideTask // by path of the namespace
	nodes []ingress.EntryNode
}

type insideTask struct {
	place *place
	want  wish
	seen  time.Time
	leg   [2]netip.Prefix
	mtu   int
	// link is the port's index at the last look, gateway the gateway leg's: another
	// one has the kernel's settings, which is nobody's fault.
	link, gateway int
}

// wishes are those of all tasks, one for each namespace.
func (e *Engine) wishes(t ingress.Table) []wish {
	var out []wish
	at := map[string]int{}
	sctp := slices.ContainsFunc(t.Published, func(p ingress.Published) bool { return p.Protocol == weft.SCTP })
	for _, task := range t.Ingress.Tasks {
		at[task.NetNS] = len(out)
		out = append(out, wish{EntryTask: task, sctp: sctp})
	}
	if !e.ip6 {
		return out
	}
	ports := legPorts(t.Published)
	for _, leg := range t.Gateway.Legs {
		w := wish{EntryTask: ingress.EntryTask{Task: leg.Task, NetNS: leg.NetNS}, gateway: leg, ports: ports[leg.Addr6.Addr()], sctp: sctp}
		if i, ok := at[leg.NetNS]; ok {
			w.EntryTask = out[i].EntryTask
			out[i] = w
			continue
		}
		out = append(out, w)
	}
	return out
}

// applyInside makes the ways back of all tasks. It goes before the host's table,
// so that no answer is sent before it knows where to. audit says to look at tasks
// of which nothing has changed, too.
func (e *Engine) applyInside(t ingress.Table, audit bool) error {
	was := e.within
	leg := [2]netip.Prefix{t.Ingress.Addr, t.Ingress.Addr6}
	now := inside{tasks: map[string]*insideTask{}, nodes: t.Ingress.Nodes}
	same := reflect.DeepEqual(was.nodes, now.nodes)
	var errs []error
	for _, task := range e.wishes(t) {
		k := was.tasks[task.NetNS]
		if same && !audit && k != nil && k.want.equal(task) && k.leg == leg && k.mtu == t.Ingress.MTU && time.Since(k.seen) < insideMaxGap {
			now.tasks[task.NetNS] = k
			continue
		}
		k, err := e.applyTask(t.Ingress, task, k)
		if errors.Is(err, weft.ErrNotFound) || errors.Is(err, unix.ENOENT) {
			continue // it has ended, or a power cut has taken it: no way leads there
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("way back from task %s: %w", task.Task.Short(), err))
			continue
		}
		now.tasks[task.NetNS] = k
	}
	e.within = now
	return errors.Join(errs...)
}

func (e *Engine) applyTask(entry ingress.Entry, t wish, was *insideTask) (*insideTask, error) {
	ns, err := netns.Open(t.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	p, err := newPlace(t.NetNS, "task "+t.Task.Short())
	if err != nil {
		return nil, err
	}
	now := &insideTask{place: p, want: t, seen: time.Now(), leg: [2]netip.Prefix{entry.Addr, entry.Addr6}, mtu: entry.MTU}
	if was != nil && was.place.inode == p.inode {
		now.place, now.link, now.gateway = was.place, was.link, was.gateway
	} else {
		was = nil
	}
	// Only what was made by this engine, in the same namespace and for the same wish,
	// can have been broken by others.
	audit := was != nil && was.want.equal(t) && was.leg == now.leg && was.mtu == now.mtu
	return now, ns.Do(func() error {
		if t.sctp {
			if err := e.setScope(now, audit); err != nil {
				return err
			}
		}
		if t.gateway.Link != "" {
			if err := e.applyLeg(now, audit); err != nil {
				return err
			}
		}
		if t.Link == "" {
			return nil
		}
		return e.applyPort(entry, now, audit)
	})
}

// applyPort makes the way back by a task's port on the ingress network.
func (e *Engine) applyPort(entry ingress.Entry, now *insideTask, audit bool) error {
	t := now.want
	l, err := netlink.LinkByName(t.Link)
	if err != nil {
		return fmt.Errorf("look up link %s: %w", t.Link, err)
	}
	audit = audit && now.link == l.Attrs().Index
	now.link = l.Attrs().Index
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	if err := e.setWaySysctls(now, audit); err != nil {
		return err
	}
	for _, f := range families(e.ip6) {
		own, via := f.addrs(entry, t.EntryTask)
		if !own.IsValid() || !via.IsValid() {
			continue
		}
		w := f.way(own, via, now.link, entry.MTU)
		if err := e.setWay(f, now.place.name, w, w.portRules(f), audit); err != nil {
			return err
		}
		if err := e.converge(now.place, conn, f.insideRules(entry, t)); err != nil {
			return err
		}
	}
	return e.converge(now.place, conn, insideLink(entry, t.EntryTask))
}

// setWaySysctls lets packets of clients afar come in by the port, although the
// route to them without a mark leads elsewhere: the reverse path is looked for
// with the mark, which only those have that an entry node brings. Sockets that accept
// their connections route by it from the first packet on.
func (e *Engine) setWaySysctls(t *insideTask, audit bool) error {
	return e.setSysctls([][2]string{
		{"net/ipv4/conf/" + t.want.Link + "/rp_filter", "2"},
		{"net/ipv4/conf/" + t.want.Link + "/src_valid_mark", "1"},
		// As on the host, where a policy says it (times.go).
		{"net/netfilter/nf_conntrack_tcp_timeout_fin_wait", e.closing()},
		{"net/netfilter/nf_conntrack_tcp_timeout_close_wait", e.closing()},
		{"net/ipv4/tcp_fwmark_accept", "1"},
	}, t.place.name, audit)
}

// scopePrivate is SCTP_SCOPE_POLICY_PRIVATE (linux/sctp.h).
const scopePrivate = "2"

// setScope lets servers of SCTP take clients of public addresses at their own, which are
// private. As it comes, the kernel leaves private addresses of IPv4 out of such an
// association if the task has any of IPv6, private or not, and then knows nothing of what
// comes to the one that it left out (sctp_in_scope). The setting comes with the module,
// which the first socket loads. A kernel without leaves it to the container to see that
// it has no such sockets.
func (e *Engine) setScope(t *insideTask, audit bool) error {
	const key = "net/sctp/addr_scope_policy"
	_, err := readSysctl(key)
	if errors.Is(err, fs.ErrNotExist) {
		audit = false
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil
		}
		if err == nil {
			err = unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("ask for SCTP: %w", err)
		}
	}
	return e.setSysctls([][2]string{{key, scopePrivate}}, t.place.name, audit)
}

// closing is closingTimeout as a sysctl.
func (e *Engine) closing() string {
	return strconv.FormatUint(uint64(seconds(closingTimeout/time.Duration(max(1, e.hurry)))), 10)
}

// way is how answers of one family leave a task.
type way struct {
	table int
	link  int          // index of its port
	own   netip.Prefix // of its port
	via   netip.Addr
	mtu   int // 0 = the port's
}

// leastIPv6 is what every link of IPv6 carries (RFC 8200 section 5).
const leastIPv6 = 1280

func (f *family) way(own netip.Prefix, via netip.Addr, link, mtu int) way {
	if f.is6 && mtu > 0 {
		mtu = max(mtu, leastIPv6)
	}
	return way{wayTable, link, own, via, mtu}
}

func (f *family) netlinkFamily() int {
	if f.is6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// rule is one to the way's table.
func (w way) rule(f *family, priority int) netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = f.netlinkFamily(), priority, w.table
	return *r
}

// fromOwn is one for what comes from the way's own address.
func (w way) fromOwn(f *family, priority int) netlink.Rule {
	r := w.rule(f, priority)
	r.Src = &net.IPNet{IP: w.own.Addr().AsSlice(), Mask: net.CIDRMask(w.own.Addr().BitLen(), w.own.Addr().BitLen())}
	return r
}

// portRules are the routing rules of the way by a task's port.
func (w way) portRules(f *family) []netlink.Rule {
	isMarked, datagrams, mask := w.rule(f, ruleMarked), w.rule(f, ruleDatagrams), ingress.EntryMarkMask
	isMarked.Mark, isMarked.Mask = ingress.EntryMark, &mask
	datagrams.IPProto = unix.IPPROTO_UDP
	return []netlink.Rule{isMarked, w.fromOwn(f, ruleOwn), datagrams}
}

// sameRule compares what the kernel keeps of a rule of ours.
func sameRule(a, b netlink.Rule) bool {
	mask := func(r netlink.Rule) uint32 {
		if r.Mask == nil {
			return 0
		}
		return *r.Mask
	}
	src := func(r netlink.Rule) string {
		if r.Src == nil {
			return ""
		}
		return r.Src.String()
	}
	sport := func(r netlink.Rule) netlink.RulePortRange {
		if r.Sport == nil {
			return netlink.RulePortRange{}
		}
		return *r.Sport
	}
	return a.Priority == b.Priority && sport(a) == sport(b) && a.Table == b.Table && a.Mark == b.Mark && mask(a) == mask(b) && src(a) == src(b) && a.IPProto == b.IPProto && a.IifName == b.IifName
}

// setWay makes the rules and the route of one family right. of is whose they are.
func (e *Engine) setWay(f *family, of string, w way, want []netlink.Rule, audit bool) error {
	have, err := listRules(f.netlinkFamily())
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	missing := slices.Clone(want)
	for i := range have {
		r := &have[i]
		if r.Table != w.table {
			continue
		}
		if k := slices.IndexFunc(missing, func(m netlink.Rule) bool { return sameRule(*r, m) }); k >= 0 {
			missing = slices.Delete(missing, k, k+1)
			continue
		}
		r.Family = f.netlinkFamily()
		if err := netlink.RuleDel(r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete routing rule %d: %w", r.Priority, err)
		}
	}
	for i := range missing {
		r := &missing[i]
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule %d: %w", r.Priority, err)
		}
		if audit {
			e.report(weft.Repair{Kind: kindRule, Object: fmt.Sprintf("rule %d of %s", r.Priority, of), Reason: "it was gone"})
		}
	}
	return e.setRoute(f, of, w, audit)
}

func listRules(family int) ([]netlink.Rule, error) {
	rules, err := netlink.RuleList(family)
	for i := 1; errors.Is(err, netlink.ErrDumpInterrupted) && i < dumpTries; i++ {
		rules, err = netlink.RuleList(family)
	}
	return rules, err
}

// setRoute makes the one route of the table right. It bears the MTU of the
// narrowest way to an entry node: all answers take it, whichever node they go to.
func (e *Engine) setRoute(f *family, of string, w way, audit bool) error {
	filter := &netlink.Route{Table: w.table}
	list := func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(f.netlinkFamily(), filter, netlink.RT_FILTER_TABLE)
	}
	have, err := list()
	for i := 1; errors.Is(err, netlink.ErrDumpInterrupted) && i < dumpTries; i++ {
		have, err = list()
	}
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	found, broken := false, "it was gone"
	for i := range have {
		r := &have[i]
		gw, _ := netip.AddrFromSlice(r.Gw)
		src, _ := netip.AddrFromSlice(r.Src)
		isDefault := r.Dst == nil || r.Dst.IP.IsUnspecified()
		if isDefault && r.LinkIndex == w.link && gw.Unmap() == w.via && src.Unmap() == w.own.Addr() {
			if found = r.MTU == w.mtu; !found {
				broken = fmt.Sprintf("its MTU was %d instead of %d", r.MTU, w.mtu)
			}
			continue // one with another MTU is replaced, without a gap
		}
		if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route %s of table %d: %w", r.Dst, w.table, err)
		}
	}
	if found {
		return nil
	}
	all := &net.IPNet{IP: make(net.IP, w.via.BitLen()/8), Mask: net.CIDRMask(0, w.via.BitLen())}
	r := &netlink.Route{
		Table: w.table, Dst: all, LinkIndex: w.link, Gw: w.via.AsSlice(), Src: w.own.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		MTU: w.mtu,
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("add route by %s: %w", w.via, err)
	}
	if audit {
		e.report(weft.Repair{Kind: kindRoute, Object: "way back of " + of, Reason: broken})
	}
	return nil
}

// closeInside removes the ways back that this engine has made.
func (e *Engine) closeInside() error {
	var errs []error
	for path, t := range e.within.tasks {
		err := netns.Do(path, func() error {
			conn, err := open()
			if err != nil {
				return fmt.Errorf("open nftables: %w", err)
			}
			var errs []error
			for fam := range t.place.left {
				errs = append(errs, removeTable(conn, ruleset{family: fam, name: insideTable}.table()))
			}
			for _, f := range families(e.ip6) {
				errs = append(errs, f.removeWay(wayTable), f.removeWay(legTable))
			}
			if t.want.gateway.Link != "" {
				errs = append(errs, removeAddr6(t.want.gateway.Link, t.want.gateway.Addr6))
			}
			return errors.Join(errs...)
		})
		if err != nil && !errors.Is(err, weft.ErrNotFound) {
			errs = append(errs, fmt.Errorf("remove way back from task %s: %w", t.want.Task.Short(), err))
		}
	}
	e.within = inside{}
	return errors.Join(errs...)
}

func (f *family) removeWay(table int) error {
	rules, err := listRules(f.netlinkFamily())
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for i := range rules {
		r := &rules[i]
		if r.Table != table {
			continue
		}
		r.Family = f.netlinkFamily()
		if err := netlink.RuleDel(r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete routing rule %d: %w", r.Priority, err)
		}
	}
	routes, err := netlink.RouteListFiltered(f.netlinkFamily(), &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for i := range routes {
		if err := netlink.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route of table %d: %w", table, err)
		}
	}
	return nil
}

// probeInside loads a task's tables in the calling thread's namespace.
func (e *Engine) probeInside() error {
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	node := ingress.EntryNode{MAC: weft.RouterMAC(weft.IngressVNI), Addr: netip.AddrFrom4([4]byte{10, 255, 0, 2})}
	entry := ingress.Entry{
		Addr: netip.PrefixFrom(node.Addr, 16), Addr6: netip.PrefixFrom(netip.IPv6Loopback(), 64), Nodes: []ingress.EntryNode{node},
	}
	task := wish{EntryTask: ingress.EntryTask{Link: "lo", Addr: entry.Addr, Addr6: entry.Addr6}, gateway: ingress.EntryTask{Link: "lo"}}
	for _, f := range families(e.ip6) {
		if err := loads(conn, f.insideRules(entry, task)); err != nil {
			return err
		}
	}
	return loads(conn, insideLink(entry, task.EntryTask))
}

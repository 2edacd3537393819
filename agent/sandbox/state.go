package sandbox

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// Class is the kind of an object that a sandbox, or the host for all of them,
// has in the kernel. Objects are made in the order of their classes. A new class
// is a constant and a name here, what wants it, and a case each in reading and
// in making (readInside, makeInside).
type Class uint8

// Classes; those of the host come first.
const (
	HostSetting   Class = iota // a sysctl of the host
	Bridge                     // the gateway bridge
	BridgeAddress              // an address of it
	Setting                    // a sysctl in the task's namespace
	Loopback                   // its lo
	LocalRule                  // where its rule for local addresses stands; one per family
	Rule                       // a routing rule for a service address
	Address                    // an address on lo
	Leg                        // the gateway leg, both ends
	LegAddress                 // the address of its inner end
	Route                      // a route by it
)

// classNames are the first half of a Repair's Kind.
var classNames = [...]string{
	"gateway sysctl", "gateway bridge", "gateway bridge address", "task sysctl", "loopback", "task local rule", "service address rule",
	"service address", "gateway leg", "gateway leg address", "gateway route",
}

func (c Class) String() string { return classNames[c] }

// isOurs says that whatever of the class is there is weft's, by name or priority.
// Of the others a task with rights of its own may have made some.
func (c Class) isOurs() bool { return c == Rule || c == Leg }

// Object is one thing in the kernel.
type Object struct {
	Class Class
	Name  string
}

// State is what is in the kernel, or should be, with the value of each object. The
// value of one that is either in order or not is "" for in order, else what is
// wrong, as a reason for people.
type State map[Object]string

// Op is one change: to Value, or away.
type Op struct {
	Object
	Value string
	Away  bool
}

func (o Op) String() string {
	if o.Away {
		return fmt.Sprintf("remove %s %s", o.Class, o.Name)
	}
	return strings.TrimSpace(fmt.Sprintf("set %s %s %s", o.Class, o.Name, o.Value))
}

// Diff is the shortest list of changes that leads from have to want, in the order
// in which they are to be made. What is there and not wanted goes if left, the
// state that was left there before, has it or its class is weft's alone; with all
// set, in any case.
func Diff(have, want, left State, all bool) []Op {
	var ops []Op
	for o, v := range want {
		if was, ok := have[o]; !ok || was != v {
			ops = append(ops, Op{Object: o, Value: v})
		}
	}
	for o := range have {
		if _, ok := want[o]; ok {
			continue
		}
		if _, ok := left[o]; ok || all || o.Class.isOurs() {
			ops = append(ops, Op{Object: o, Away: true})
		}
	}
	slices.SortFunc(ops, func(a, b Op) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), order(a.Away, b.Away), cmp.Compare(a.Name, b.Name))
	})
	return ops
}

// order puts what goes behind what comes: a link without addresses loses its routes.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// memory is what was last left in the kernel of one sandbox or of the host; left
// is nil when nothing is known.
type memory struct {
	left State
	// unsure are objects on which a change has failed: what they are now is our
	// own doing.
	unsure map[Object]bool
	// bridge is the bridge that the leg was on, by index; 0 = none. One that
	// another bridge has come for has lost its place with it.
	bridge int
}

func (m memory) equal(o memory) bool {
	return m.bridge == o.bridge && maps.Equal(m.unsure, o.unsure) && (m.left == nil) == (o.left == nil) && maps.Equal(m.left, o.left)
}

// findings says of each operation which repair it is; nil = it follows a change of
// the wish, or another repair answers for it.
func (m memory) findings(have State, ops []Op, bridge int) []*weft.Repair {
	out := make([]*weft.Repair, len(ops))
	lost := map[Class]string{} // what is put right before, by reason
	for i, op := range ops {
		if m.left == nil {
			break
		}
		had, inHave := have[op.Object]
		was, inLeft := m.left[op.Object]
		r := weft.Repair{Object: op.Class.String() + " " + op.Name}
		switch {
		case op.Away && !inLeft && !m.unsure[op.Object]:
			r.Kind, r.Reason = "stray", "weft did not make it"
		case m.unsure[op.Object], op.Away, !inLeft, inHave && had == was:
			continue
		case !inHave:
			r.Kind, r.Reason = "missing", faultGone
		case op.Value == "":
			r.Kind, r.Reason = "wrong", had
		default:
			r.Kind, r.Reason = "wrong", fmt.Sprintf("it was %s instead of %s", cmp.Or(had, "empty"), was)
		}
		answered := wentWith(op.Object, lost) || op.Class == Leg && inHave && m.bridge != bridge
		lost[op.Class] = r.Reason
		if answered {
			continue
		}
		r.Kind = op.Class.String() + " " + r.Kind
		out[i] = &r
	}
	return out
}

// wentWith reports whether the kernel itself takes the object along with one that
// was found lost: IPv6 addresses with a link that goes down, routes and addresses
// with a leg.
func wentWith(o Object, lost map[Class]string) bool {
	switch o.Class {
	case BridgeAddress:
		return lost[Bridge] == faultGone
	case Address:
		return lost[Loopback] != "" && strings.Contains(o.Name, ":")
	case LegAddress:
		return strings.Contains(lost[Leg], faultGone)
	case Route:
		return strings.Contains(lost[Leg], faultGone) || strings.Contains(lost[Leg], faultInner) || lost[LegAddress] != ""
	}
	return false
}

// Faults that answer for others. faultGone is also how the loss of either end of a
// leg ends: they go together.
const (
	faultGone  = "it was gone"
	faultInner = "its inner end was down"
)

// after is the memory once ops were tried, failed those that could not be done. A
// repair that failed is owed; what a failed change has left is nobody's fault.
func (m memory) after(want State, ops []Op, found []*weft.Repair, failed map[Object]bool, bridge int) memory {
	next := memory{left: maps.Clone(want), bridge: bridge}
	for i, op := range ops {
		if !failed[op.Object] {
			continue
		}
		delete(next.left, op.Object)
		if was, ok := m.left[op.Object]; ok {
			next.left[op.Object] = was
		}
		if found[i] == nil {
			if next.unsure == nil {
				next.unsure = map[Object]bool{}
			}
			next.unsure[op.Object] = true
		}
	}
	return next
}

// Values of objects that are not in order or not only.
const (
	ruleToMain   = "asks the main table first"
	ruleMoved    = "behind the rules of service addresses"
	ruleUnmoved  = "before the rules of service addresses"
	familyV4     = "IPv4"
	familyV6     = "IPv6"
	defaultRoute = "default"
)

// loopbackNet is the kernel's own address of lo, on which the resolver stands.
var loopbackNet = netip.MustParsePrefix("127.0.0.1/8")

// settings are the sysctls of every task.
func settings(pingGroups string) State {
	s := State{}
	for _, k := range [][2]string{
		// A service address on lo must not be answered for on the overlay:
		// the bridge answers for it (direct return).
		{"net/ipv4/conf/all/arp_ignore", "1"}, {"net/ipv4/conf/default/arp_ignore", "1"},
		{"net/ipv4/conf/all/arp_announce", "2"}, {"net/ipv4/conf/default/arp_announce", "2"},
		// Answers from a service address, which is on our own lo too, and
		// what we ask of our own service and the balancer gives back to us.
		{"net/ipv4/conf/all/accept_local", "1"}, {"net/ipv4/conf/default/accept_local", "1"},
		// As Docker: any user may bind any port and ping.
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		{"net/ipv4/ping_group_range", pingGroups},
		// Addresses come from an allocator; waiting for duplicates would
		// cost the first packets.
		{"net/ipv6/conf/all/accept_dad", "0"}, {"net/ipv6/conf/default/accept_dad", "0"},
		// What leaves by a port has that port's address: for a request to our
		// own service RFC 6724 section 5 rule 1 would choose the service's.
		{"net/ipv6/conf/default/use_oif_addrs_only", "1"},
	} {
		s[Object{Setting, k[0]}] = k[1]
	}
	return s
}

// wanted is the state of a task's sandbox: leg and gateway are its address on the
// gateway bridge and the bridge's own, both invalid without one.
func (s Spec) wanted(pingGroups string, leg netip.Prefix, gateway netip.Addr) State {
	want := settings(pingGroups)
	want[Object{Loopback, "lo"}] = ""
	want[Object{Address, loopbackNet.String()}] = ""
	for _, v := range s.VIPs {
		v = v.Unmap()
		family := familyV4
		if v.Is6() {
			family = familyV6
		}
		want[Object{LocalRule, family}] = ruleMoved
		p := netip.PrefixFrom(v, v.BitLen()).String()
		want[Object{Rule, p}] = ruleToMain
		want[Object{Address, p}] = ""
	}
	if leg.IsValid() {
		want[Object{Leg, LegName}] = ""
		want[Object{LegAddress, leg.String()}] = ""
		want[Object{Route, defaultRoute}] = routeText(gateway, LegName)
	}
	return want
}

func routeText(via netip.Addr, dev string) string { return fmt.Sprintf("via %s on %s", via, dev) }

// wantedHost is the state of the host for all sandboxes.
func wantedHost(addr netip.Prefix) State {
	return State{
		{HostSetting, forwardKey}:      "1",
		{Bridge, weft.GatewayBridge}:   "",
		{BridgeAddress, addr.String()}: "",
	}
}

const forwardKey = "net/ipv4/ip_forward"

// gatewayOf chooses the address of the gateway bridge: what it was left with, else
// what most legs of tasks have a subnet in common with, else what the bridge has.
// Invalid = a new one is to be chosen.
func gatewayOf(left State, legs []netip.Prefix, have []netip.Prefix) netip.Prefix {
	for _, o := range slices.SortedFunc(maps.Keys(left), func(a, b Object) int { return cmp.Compare(a.Name, b.Name) }) {
		if p, err := netip.ParsePrefix(o.Name); o.Class == BridgeAddress && err == nil {
			return p
		}
	}
	count := map[netip.Prefix]int{}
	for _, l := range legs {
		count[l.Masked()]++
	}
	var best netip.Prefix
	for p, n := range count {
		if n > count[best] || n == count[best] && p.Addr().Less(best.Addr()) {
			best = p
		}
	}
	if best.IsValid() {
		return netip.PrefixFrom(best.Addr().Next(), best.Bits())
	}
	if len(have) > 0 {
		return have[0]
	}
	return netip.Prefix{}
}

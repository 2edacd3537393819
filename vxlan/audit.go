package vxlan

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// Faults that Read tells apart for the audit. All others are words for people.
const (
	// FaultGone: the object should be there and is not.
	FaultGone = "it was gone"
	// FaultDown: the network's bridge was down, which takes its neighbours.
	FaultDown = "its bridge was down"
)

// Audit tells repairs from changes: it remembers what the last Apply left in
// the kernel. An operation is a repair when the kernel no longer has what was
// left there; it is a change when only the wish differs.
//
// Each fault has one object and is counted once, when it has been put right:
//   - What went with a greater object is on that one's account: everything in
//     a network that is made anew, missing forwarding entries of a device that
//     is remade, and missing neighbours of a bridge that was down. A device
//     that networks share is one object, and has no entries of its own.
//   - A repair that fails is owed until it succeeds. What a failed change has
//     left half done is no repair.
//   - The first Apply of a process does not know what was left before it: only
//     what no wish explains counts, a device that is down or half an entry.
//
// The zero value is ready. It is owned by the engine's Apply.
type Audit struct {
	left *State // what the last Apply wanted, as far as valid; nil before the first
	// unsure are objects on which a change has failed: what they are now is
	// our own doing.
	unsure map[object]bool
	// isWhole: the last Apply made all that was wanted. noWays: the last Read of
	// anything had no MTU of ways. Before one it may have.
	isWhole, noWays bool
}

// Apply carries out one Apply of an engine: it plans what makes have into want,
// calls do for each operation in order, and returns the repairs among those
// that succeeded. It goes on past failures and returns all errors joined, as
// NetworkError; when a network or its device cannot be made, its other
// operations are left out, for the cause is told once. Neither state may be
// changed afterwards. Blocks as long as do does; not for concurrent use.
func (a *Audit) Apply(ctx context.Context, have, want State, do func(Op) error) ([]weft.Repair, error) {
	sane, err := sanitize(have, want)
	errs := []error{err}
	ops := Diff(have, sane)
	findings := a.findings(have, ops)
	var done []weft.Repair
	unsure := map[object]bool{}
	broken := map[uint32]bool{}
	ended := false
	for i, op := range ops {
		if err := ctx.Err(); err != nil && !ended {
			ended = true
			errs = append(errs, err)
		}
		success := false
		if !ended && !broken[op.VNI] {
			err := do(op)
			if err != nil {
				errs = append(errs, &NetworkError{VNI: op.VNI, Err: fmt.Errorf("%s: %w", op, err)})
				broken[op.VNI] = op.Kind <= OpSetDevice
			}
			success = err == nil
		}
		switch r := findings[i]; {
		case !success && r == nil:
			unsure[objectOf(op)] = true
		case success && r != nil:
			done = append(done, *r)
		}
	}
	a.left, a.unsure = &sane, unsure
	err = errors.Join(errs...)
	a.isWhole = err == nil
	if len(have.Networks) > 0 {
		a.noWays = true
		for _, n := range have.Networks {
			a.noWays = a.noWays && !n.Ways
		}
	}
	return done, err
}

// Delta is the function Delta from what the last Apply left, if that Apply had no
// fault: an engine may then make the operations without reading anything but their
// objects. Once it has, it says so with Left; if one of them has failed, with
// Unsure, and calls Apply.
func (a *Audit) Delta(want State) (ops []Op, was State, ok bool) {
	if a.left == nil || !a.isWhole {
		return nil, State{}, false
	}
	left := *a.left
	if !a.noWays {
		left.Networks = maps.Clone(left.Networks)
		for vni, n := range left.Networks {
			n.Ways = true
			left.Networks[vni] = n
		}
	}
	return Delta(left, want)
}

// Left takes note of a state that was made by Delta.
func (a *Audit) Left(want State) { a.left = &want }

// Unsure takes note of operations of Delta that may have been made.
func (a *Audit) Unsure(ops []Op) {
	if a.unsure == nil {
		a.unsure = map[object]bool{}
	}
	for _, op := range ops {
		a.unsure[objectOf(op)] = true
	}
}

// class is the kind of an object in the kernel.
type class uint8

const (
	classNetwork class = iota // namespace, bridge and what is set of them
	classDevice
	classFDB
	classNeigh
	classPort
	classLeg
)

var classNames = [...]string{"network", "device", "fdb", "neighbour", "port", "host leg"}

// object identifies what an operation works on.
type object struct {
	class class
	vni   uint32
	addr  netip.Addr
	mac   MAC
	task  weft.ID
}

// objectOf is total: TestEveryOperationIsClassed fails on a kind without a case.
func objectOf(op Op) object {
	o := object{vni: op.VNI}
	switch op.Kind {
	case OpDelStale, OpAddNetwork, OpSetNetwork, OpDelNetwork:
		o.class = classNetwork
	case OpSetDevice:
		o.class = classDevice
	case OpSetFDB, OpDelFDB:
		o.class, o.mac = classFDB, MACOf(op.MAC)
	case OpSetNeigh, OpDelNeigh:
		o.class, o.addr = classNeigh, op.Addr
	case OpSetPort, OpDelPort:
		o.class, o.task = classPort, op.Port.Task
	case OpSetHostLeg, OpDelHostLeg:
		o.class = classLeg
	default:
		panic(fmt.Sprintf("operation %s has no object", op.Kind))
	}
	return o
}

// words name the object for people.
func (o object) words(op Op) string {
	switch o.class {
	case classDevice:
		return weft.VXLANName(o.vni)
	case classFDB:
		return fmt.Sprintf("fdb %s of network %d", op.MAC, o.vni)
	case classNeigh:
		return fmt.Sprintf("neighbour %s of network %d", op.Addr, o.vni)
	case classPort:
		return fmt.Sprintf("port %s of task %s of network %d", op.Port.IfName, op.Port.Task.Short(), o.vni)
	case classLeg:
		return op.HostLeg.Name
	}
	return fmt.Sprintf("network %d", o.vni)
}

// findings says of each operation which repair it is; nil = a change, or on the
// account of another one.
func (a *Audit) findings(have State, ops []Op) []*weft.Repair {
	out := make([]*weft.Repair, len(ops))
	views := map[uint32]*view{}
	shared := map[string]bool{}
	for i, op := range ops {
		v := views[op.VNI]
		if v == nil {
			v = a.look(have, op.VNI)
			views[op.VNI] = v
		}
		fault, reason := v.find(op)
		o := objectOf(op)
		if fault == "" || a.unsure[o] {
			continue
		}
		words := o.words(op)
		if o.class == classDevice && v.had.Device != "" {
			if words = v.had.Device; shared[words] {
				continue
			}
			shared[words] = true
		}
		out[i] = &weft.Repair{Kind: classNames[o.class] + " " + fault, Object: words, Reason: reason}
	}
	return out
}

// What can be wrong with an object: the second half of a Repair's Kind.
const (
	missing = "missing"
	wrong   = "wrong"
	stray   = "stray" // there, and not by weft
)

// notWhole is the reason where an engine's Read tells no better.
const notWhole = "a part of it was missing or wrong"

// view is one network as it was left and as it was found.
type view struct {
	had, left     Network
	inHad, inLeft bool
	isFirst       bool // nothing is known of what was left anywhere
	hadTables     Tables
	leftTables    Tables
	hadPorts      map[weft.ID]Port
	leftPorts     map[weft.ID]Port
	// What an earlier operation on the network answers for.
	isRemade, wasDown, isNewDevice bool
}

func (a *Audit) look(have State, vni uint32) *view {
	v := &view{isFirst: a.left == nil}
	v.had, v.inHad = have.Networks[vni]
	if a.left != nil {
		v.left, v.inLeft = a.left.Networks[vni]
	}
	v.hadTables, v.leftTables = Derive(v.had), Derive(v.left)
	v.hadPorts, v.leftPorts = portsByTask(v.had.Ports), portsByTask(v.left.Ports)
	return v
}

func portsByTask(ps []Port) map[weft.ID]Port {
	m := make(map[weft.ID]Port, len(ps))
	for _, p := range ps {
		m[p.Task] = p
	}
	return m
}

// find is called once for each operation, in the order of Diff: what answers
// for others comes before them.
func (v *view) find(op Op) (fault, reason string) {
	switch op.Kind {
	case OpDelStale:
		return "", "" // OpAddNetwork follows
	case OpAddNetwork:
		v.isRemade = true
		return v.findNetwork(op)
	case OpDelNetwork:
		if !v.isFirst && !v.inLeft {
			return stray, "no network of this node has this VNI"
		}
		return "", ""
	}
	if v.isRemade {
		return "", ""
	}
	switch op.Kind {
	case OpSetNetwork:
		fault, reason = v.findSettings()
		v.wasDown = v.had.Fault == FaultDown
	case OpSetDevice:
		v.isNewDevice = true
		fault, reason = v.findDevice()
	case OpSetFDB, OpDelFDB:
		fault, reason = v.findFDB(op)
	case OpSetNeigh, OpDelNeigh:
		fault, reason = v.findNeigh(op)
	case OpSetPort, OpDelPort:
		fault, reason = v.findPort(op)
	case OpSetHostLeg, OpDelHostLeg:
		fault, reason = v.findLeg(op)
	}
	return fault, reason
}

func (v *view) findNetwork(op Op) (fault, reason string) {
	switch {
	case v.inHad && v.had.Fault == FaultGone:
		return missing, FaultGone
	case v.inHad && v.had.Fault != "":
		return wrong, v.had.Fault
	case !v.inLeft || v.left.ID != op.Network.ID:
		return "", ""
	case !v.inHad:
		return missing, FaultGone
	case v.had.ID == "":
		return wrong, notWhole
	}
	return wrong, fmt.Sprintf("it says that it is network %q", v.had.ID)
}

func (v *view) findSettings() (fault, reason string) {
	switch {
	case v.had.Fault != "":
		return wrong, v.had.Fault
	case !v.inLeft:
		return "", ""
	case v.had.MTU != v.left.MTU:
		return wrong, fmt.Sprintf("MTU was %d instead of %d", v.had.MTU, v.left.MTU)
	case v.had.Native != v.left.Native:
		return wrong, fmt.Sprintf("taking packets without encapsulation was %t instead of %t", v.had.Native, v.left.Native)
	case !slices.Equal(sortedPrefixes(v.had.Subnets), sortedPrefixes(v.left.Subnets)):
		return wrong, fmt.Sprintf("subnets were %v instead of %v", v.had.Subnets, v.left.Subnets)
	}
	return "", ""
}

func (v *view) findDevice() (fault, reason string) {
	switch {
	case v.had.DeviceFault == FaultGone:
		return missing, FaultGone
	case v.had.DeviceFault != "":
		return wrong, v.had.DeviceFault
	case v.inLeft && !v.had.VTEP.IsValid():
		return wrong, notWhole
	case v.inLeft && !sameDevice(v.had, v.left):
		return wrong, fmt.Sprintf("tunnel of %s, port %d instead of %s, port %d", v.had.VTEP, v.had.Port, v.left.VTEP, v.left.Port)
	}
	return "", ""
}

// half is the way of an entry of which only one of two halves is there.
var half = Way{VTEP: netip.IPv4Unspecified()}

func (v *view) findFDB(op Op) (fault, reason string) {
	mac := MACOf(op.MAC)
	had, inHad := v.hadTables.FDB[mac]
	left, inLeft := v.leftTables.FDB[mac]
	hadMTU, leftMTU := v.hadTables.MTU[mac], v.leftTables.MTU[mac]
	// A way is narrow beside the network's MTU: where that was wrong it is on its account.
	isNarrow := v.had.Ways && inHad && inLeft && hadMTU != leftMTU && v.had.MTU == v.left.MTU
	isHalf := inHad && had == half
	switch {
	case inHad == inLeft && had == left && !isNarrow, inLeft && op.Kind == OpDelFDB:
		return "", ""
	case v.isNewDevice && (op.Kind == OpSetFDB && had == Way{op.VTEP.Unmap(), op.Native} && (hadMTU == op.MTU || !v.had.Ways) || v.had.Device == "" && (!inHad || isHalf)):
		return "", "" // it went with the device
	case isHalf:
		return wrong, "one of its two halves was there"
	case !v.inLeft:
		return "", ""
	case !inHad:
		return missing, FaultGone
	case !inLeft:
		return stray, "it led to " + had.String()
	}
	return wrong, fmt.Sprintf("it led to %s instead of %s", wayText(had, hadMTU), wayText(left, leftMTU))
}

func (v *view) findNeigh(op Op) (fault, reason string) {
	had, inHad := v.hadTables.Neigh[op.Addr]
	left, inLeft := v.leftTables.Neigh[op.Addr]
	switch {
	case !v.inLeft, inHad == inLeft && had == left, inLeft && op.Kind == OpDelNeigh:
		return "", ""
	case !inHad && v.wasDown:
		return "", ""
	case !inHad:
		return missing, FaultGone
	case !inLeft:
		return stray, fmt.Sprintf("it was %s", had.HardwareAddr())
	}
	return wrong, fmt.Sprintf("it was %s instead of %s", had.HardwareAddr(), left.HardwareAddr())
}

func (v *view) findPort(op Op) (fault, reason string) {
	had, inHad := v.hadPorts[op.Port.Task]
	left, inLeft := v.leftPorts[op.Port.Task]
	if op.Kind == OpDelPort {
		// A task that goes may take its namespace along.
		if !inLeft && (v.inLeft || had.Fault != "") {
			return stray, cmp.Or(had.Fault, "no task of this node has it")
		}
		return "", ""
	}
	switch {
	case inHad && had.Fault != "":
		return wrong, had.Fault
	case !inLeft || inHad && comparePorts(had, left) == 0:
		return "", ""
	case !inHad:
		return missing, FaultGone
	case !had.Addr.IsValid():
		return wrong, notWhole
	}
	return wrong, fmt.Sprintf("it was %s with %s and %s", had.IfName, had.Addr, had.MAC)
}

func (v *view) findLeg(op Op) (fault, reason string) {
	had, left := v.had.HostLeg, v.left.HostLeg
	switch {
	case op.Kind == OpDelHostLeg && (left != nil || !v.inLeft):
		return "", ""
	case op.Kind == OpDelHostLeg:
		return stray, "this network has no leg on the host"
	case had != nil && had.Fault != "":
		return wrong, had.Fault
	case left == nil || had != nil && equalLegs(*had, *left):
		return "", ""
	case had == nil:
		return missing, FaultGone
	case !had.Addr.IsValid():
		return wrong, notWhole
	}
	return wrong, fmt.Sprintf("it was %s with %s and %s", had.Name, had.Addr, had.MAC)
}

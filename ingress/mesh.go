package ingress

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/weftnet/weft"
)

// EntryNode is a node by which requests enter the ingress network.
type EntryNode struct {
	// MAC of its leg, which all packets have that enter there.
	MAC net.HardwareAddr
	// Addr is its leg's first address: its mark and zone follow from it.
	Addr netip.Addr
}

// EntryTask is a local task with a port on the ingress network. It sends its
// answers back by the node through which the request came.
type EntryTask struct {
	Task  weft.ID
	NetNS string // path of the task's namespace
	Link  string // its port there
	// Addr and Addr6 are the port's addresses with their subnets' lengths;
	// invalid without.
	Addr, Addr6 netip.Prefix
}

// End is a local task that takes what is sent to service addresses. By direct
// return a packet comes in as its client sent it, so that what a server does not
// know of service addresses is done in the task's namespace.
type End struct {
	Task  weft.ID
	NetNS string // path of the task's namespace
	// Addrs are the service's addresses in order, each with the task's own one on
	// that network, of the same family.
	Addrs []EndAddr
	// Direct says that connections come to the task's own addresses, as they are
	// balanced where they are made; those that do not are served all the same.
	Direct bool
}

// EndAddr is a service address and the own address of a task that stands for it.
type EndAddr struct{ VIP, Own netip.Addr }

// Marks in a task's namespace. The upper byte is our own choice (a "W"); it
// tells the marks of entry nodes from whatever a container marks by itself.
const (
	EntryMark     uint32 = 0x57000000
	EntryMarkMask uint32 = 0xff000000
	// EndMark is that of connections to a service address which a server takes at
	// the task's own (a "V").
	EndMark uint32 = 0x56000000
)

// Mark is what connections bear that entered by the node: the lower three bytes
// of its address. It depends on nothing else, so that it stays the same while
// nodes come and go.
func (n EntryNode) Mark() uint32 {
	b := n.Addr.AsSlice()
	return EntryMark | binary.BigEndian.Uint32(b[len(b)-4:])&^EntryMarkMask
}

// Zone is the node's own zone of connection tracking: the lower two bytes of its
// address. In it the same client may use the same port as through another node.
// Two nodes of one zone, in an ingress network wider than 65,536 addresses, share
// that room and nothing else.
func (n EntryNode) Zone() uint16 {
	b := n.Addr.AsSlice()
	return binary.BigEndian.Uint16(b[len(b)-2:])
}

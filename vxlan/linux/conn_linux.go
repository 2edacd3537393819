package linux

import (
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
)

// linkGroup marks every link in a hidden namespace that may be deleted in one
// message (IFLA_GROUP). Our own number; 0 is the default group.
const linkGroup = 0x7766

// conn is an rtnetlink connection into one namespace. The sockets were opened
// inside and stay there whichever thread uses them.
type conn struct {
	*netlink.Handle
	socket
}

// AnswerLimit bounds the wait for the kernel's answer to one request: one that
// does not come must not hold up the data plane for ever.
const AnswerLimit = 30 * time.Second

func dial() (*conn, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	s, err := openSocket()
	if err != nil {
		h.Close()
		return nil, err
	}
	if err := h.SetSocketTimeout(AnswerLimit); err != nil {
		h.Close()
		s.shut()
		return nil, fmt.Errorf("bound the wait of rtnetlink sockets: %w", err)
	}
	return &conn{Handle: h, socket: s}, nil
}

// dialAt opens a connection inside ns.
func dialAt(ns *netns.Handle) (c *conn, err error) {
	err = ns.Do(func() error {
		c, err = dial()
		return err
	})
	return c, err
}

func (c *conn) close() {
	c.Handle.Close()
	c.shut()
}

// portFlags are the IFLA_BRPORT_* switches of a bridge port that matter here.
type portFlags struct {
	learning, flood, mcastFlood, bcastFlood, suppress, hairpin bool
	lock                                                       lock
}

// lock is whether a port takes only frames from hardware addresses that have a static
// entry towards it (IFLA_BRPORT_LOCKED, Linux 5.18).
type lock uint8

const (
	unlocked lock = iota
	locked
	lockless // the kernel knows no such switch
)

// are reports whether the flags are those that are wanted. A lock that the kernel does not
// have is not missed.
func (f portFlags) are(want portFlags) bool {
	if f.lock == lockless {
		f.lock = want.lock
	}
	return f == want
}

// tunnelPort are those of the VXLAN device: nothing unknown goes to other
// hosts, and the bridge answers for who is there.
func tunnelPort() portFlags { return portFlags{suppress: true} }

// localPort are those of a task's port and of the host's leg: requests for
// local addresses reach every local port, and a frame may go back where it came
// from: a balancer may choose the very task that asks for its own service. Nobody sends
// from another hardware address than its own.
func localPort() portFlags {
	return portFlags{flood: true, mcastFlood: true, bcastFlood: true, hairpin: true, lock: locked}
}

func (c *conn) setPortFlags(index int, f portFlags) error {
	req := c.request(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	for _, a := range []struct {
		typ int
		on  bool
	}{
		{nl.IFLA_BRPORT_LEARNING, f.learning}, {nl.IFLA_BRPORT_UNICAST_FLOOD, f.flood},
		{nl.IFLA_BRPORT_MCAST_FLOOD, f.mcastFlood}, {nl.IFLA_BRPORT_BCAST_FLOOD, f.bcastFlood},
		{nl.IFLA_BRPORT_NEIGH_SUPPRESS, f.suppress}, {nl.IFLA_BRPORT_MODE, f.hairpin},
		{nl.IFLA_BRPORT_LOCKED, f.lock == locked}, // older kernels overlook it
	} {
		v := []byte{0}
		if a.on {
			v[0] = 1
		}
		info.AddRtAttr(a.typ, v)
	}
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// allPortFlags returns the switches of every bridge port by link index.
func (c *conn) allPortFlags() (map[int]portFlags, error) {
	req := c.request(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_BRIDGE))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return nil, fmt.Errorf("list bridge ports: %w", err)
	}
	out := make(map[int]portFlags)
	for _, m := range msgs {
		ifi := nl.DeserializeIfInfomsg(m)
		attrs, err := nl.ParseRouteAttr(m[ifi.Len():])
		if err != nil {
			return nil, fmt.Errorf("list bridge ports: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type != unix.IFLA_PROTINFO|unix.NLA_F_NESTED {
				continue
			}
			infos, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return nil, fmt.Errorf("list bridge ports: %w", err)
			}
			f := portFlags{lock: lockless}
			for _, i := range infos {
				on := len(i.Value) > 0 && i.Value[0] != 0
				switch i.Attr.Type {
				case nl.IFLA_BRPORT_LEARNING:
					f.learning = on
				case nl.IFLA_BRPORT_UNICAST_FLOOD:
					f.flood = on
				case nl.IFLA_BRPORT_MCAST_FLOOD:
					f.mcastFlood = on
				case nl.IFLA_BRPORT_BCAST_FLOOD:
					f.bcastFlood = on
				case nl.IFLA_BRPORT_NEIGH_SUPPRESS:
					f.suppress = on
				case nl.IFLA_BRPORT_MODE:
					f.hairpin = on
				case nl.IFLA_BRPORT_LOCKED:
					if f.lock = unlocked; on {
						f.lock = locked
					}
				}
			}
			out[int(ifi.Index)] = f
		}
	}
	return out, nil
}

// delGroup deletes every link of linkGroup in one message: fifty times faster
// than leaving them to the end of the namespace.
func (c *conn) delGroup() error {
	req := c.request(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(linkGroup)))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if gone(err) {
		return nil // no link in the group
	}
	return err
}

// find returns the link, or nil without an error if there is none.
func (c *conn) find(name string) (netlink.Link, error) {
	l, err := c.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up link %s: %w", name, err)
	}
	return l, nil
}

// remove deletes the link if it is there.
func (c *conn) remove(name string) error {
	l, err := c.find(name)
	if err != nil || l == nil {
		return err
	}
	if err := c.LinkDel(l); err != nil && !gone(err) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// gone reports that the object of a removal does not exist any more.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL)
}

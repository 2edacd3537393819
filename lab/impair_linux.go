package lab

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
)

// impairLimit is how many packets a link holds back while they are delayed: more
// than hosts of one machine send in maxDelay, so that only what was asked for is lost.
const impairLimit = 100_000

// maxDelay of a link: longer ones are seconds typed for milliseconds.
const maxDelay = 10 * time.Second

// Impairment is what a host's link does to each packet that the host sends.
type Impairment struct {
	Delay time.Duration // 0 to maxDelay
	Loss  float64       // percent of packets, 0 to 100
}

// validate reports the first field that is out of bounds.
func (i Impairment) validate() error {
	switch {
	case i.Delay < 0 || i.Delay > maxDelay:
		return fmt.Errorf("delay %s: want 0 to %s: %w", i.Delay, maxDelay, weft.ErrInvalid)
	case !(i.Loss >= 0 && i.Loss <= 100):
		return fmt.Errorf("loss %v: want 0 to 100 percent: %w", i.Loss, weft.ErrInvalid)
	}
	return nil
}

// Impair makes the link of a host worse, in the place of what it was told before;
// the zero Impairment makes it whole. A host that is killed and started has a new
// link, which is whole. ErrUnsupported where the kernel has no netem.
func (l *Lab) Impair(name string, i Impairment) error {
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	if err := i.validate(); err != nil {
		return err
	}
	return l.locked(func() error { return impair(h, i) })
}

// impair sets or removes the queue of the host's end: what leaves the host is
// impaired, and what it hears as often as the others' links are.
func impair(h Host, i Impairment) error {
	return withLinks(h.Paths.NetNS, func(nl *netlink.Handle) error {
		link, err := nl.LinkByName(hostLink)
		if err != nil {
			return fmt.Errorf("find link %s of %s: %w", hostLink, h.Name, err)
		}
		at := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
		if i == (Impairment{}) {
			// ENOENT, EINVAL: the kernel's own queue is there, which cannot be removed.
			err := nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: at, QdiscType: "netem"})
			if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.EINVAL) {
				return fmt.Errorf("make the link of %s whole: %w", h.Name, err)
			}
			return nil
		}
		err = nl.QdiscReplace(netlink.NewNetem(at, netlink.NetemQdiscAttrs{
			Latency: uint32(i.Delay / time.Microsecond), Loss: float32(i.Loss), Limit: impairLimit,
		}))
		if errors.Is(err, syscall.ENOENT) {
			return fmt.Errorf("impair the link of %s: this kernel has no netem (module sch_netem): %w", h.Name, weft.ErrUnsupported)
		}
		if err != nil {
			return fmt.Errorf("impair the link of %s: %w", h.Name, err)
		}
		return nil
	})
}

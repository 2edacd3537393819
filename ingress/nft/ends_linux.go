package nft

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// taskEnd is what the engine has made in the namespace of a task that stands for
// service addresses. Owned by Apply.
type taskEnd struct {
	place *place
	want  ingress.End
	seen  time.Time
}

// applyEnds makes the tables of all such tasks. audit says to look at those of
// which nothing has changed, too.
func (e *Engine) applyEnds(ends []ingress.End, audit bool) error {
	now := make(map[string]*taskEnd, len(ends))
	var errs []error
	for _, want := range ends {
		was := e.ends[want.NetNS]
		if !audit && was != nil && reflect.DeepEqual(was.want, want) && time.Since(was.seen) < insideMaxGap {
			now[want.NetNS] = was
			continue
		}
		k, err := e.applyEnd(want, was)
		if errors.Is(err, weft.ErrNotFound) || errors.Is(err, unix.ENOENT) {
			continue // it has ended: nobody leads there
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("service addresses in task %s: %w", want.Task.Short(), err))
			continue
		}
		now[want.NetNS] = k
	}
	e.ends = now
	return errors.Join(errs...)
}

func (e *Engine) applyEnd(want ingress.End, was *taskEnd) (*taskEnd, error) {
	ns, err := netns.Open(want.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	p, err := newPlace(want.NetNS, "task "+want.Task.Short())
	if err != nil {
		return nil, err
	}
	now := &taskEnd{place: p, want: want, seen: time.Now()}
	known := was != nil && was.place.inode == p.inode
	if known {
		now.place = was.place
	}
	return now, ns.Do(func() error {
		conn, err := open()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		if err := e.setSysctls(endsSysctls(e.ip6), now.place.name, known); err != nil {
			return err
		}
		for _, f := range families(e.ip6) {
			if err := e.converge(now.place, conn, f.endsRules(want)); err != nil {
				return err
			}
		}
		return nil
	})
}

// endsSysctls let what answers a marked segment bear its mark: a connection that is
// accepted, and a reset of what nobody knows (ip-sysctl.rst).
func endsSysctls(ip6 bool) [][2]string {
	out := [][2]string{{"net/ipv4/tcp_fwmark_accept", "1"}, {"net/ipv4/fwmark_reflect", "1"}}
	if ip6 {
		out = append(out, [2]string{"net/ipv6/fwmark_reflect", "1"})
	}
	return out
}

// setSysctls makes settings of the calling thread's namespace right; audit says
// that they were once, by this process.
func (e *Engine) setSysctls(wanted [][2]string, place string, audit bool) error {
	for _, kv := range wanted {
		was, err := readSysctl(kv[0])
		if err != nil {
			return err
		}
		if was == kv[1] {
			continue
		}
		if err := writeSysctl(kv[0], kv[1]); err != nil {
			return err
		}
		if audit {
			e.report(weft.Repair{Kind: kindSysctl, Object: kv[0] + " of " + place, Reason: fmt.Sprintf("it was %s instead of %s", was, kv[1])})
		}
	}
	return nil
}

// closeEnds removes the tables that this engine has made.
func (e *Engine) closeEnds() error {
	var errs []error
	for path, k := range e.ends {
		err := netns.Do(path, func() error {
			conn, err := open()
			if err != nil {
				return fmt.Errorf("open nftables: %w", err)
			}
			var errs []error
			for fam := range k.place.left {
				errs = append(errs, removeTable(conn, ruleset{family: fam, name: endsTable}.table()))
			}
			return errors.Join(errs...)
		})
		if err != nil && !errors.Is(err, weft.ErrNotFound) {
			errs = append(errs, fmt.Errorf("remove service addresses from task %s: %w", k.want.Task.Short(), err))
		}
	}
	e.ends = nil
	return errors.Join(errs...)
}

// probeEnds loads a task's tables in the calling thread's namespace.
func (e *Engine) probeEnds() error {
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, f := range families(e.ip6) {
		if err := loads(conn, f.endsRules(endsProbe())); err != nil {
			return err
		}
	}
	return nil
}

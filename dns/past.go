package dns

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft"
)

// Our own choices for names that are no more.
const (
	// pastFor is how long a name of our making stays one after its service is
	// gone: clients ask on for it, and the outside need not hear of it.
	pastFor = 10 * time.Minute
	// maxPast bounds how many are kept. At 100 bytes a name it is 6 MiB.
	maxPast = 1 << 16
	// sweepPast is how often those are forgotten whose time is over.
	sweepPast = 10 * time.Second
)

// past are names that a former Snapshot had: the derived ones, and services and
// aliases with their network behind, and by themselves for those who are on it.
type past struct {
	// mu guards names and swept.
	mu    sync.Mutex
	names map[string]time.Time // until when
	swept time.Time
}

// turn takes over what was in before and is not in now. What both share is not
// looked at.
func (p *past) turn(before, now *Snapshot, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at.Sub(p.swept) >= sweepPast {
		maps.DeleteFunc(p.names, func(_ string, until time.Time) bool { return !at.Before(until) })
		p.swept = at
	}
	for id, old := range before.networks {
		z := now.networks[id]
		for i, s := range old.shards {
			if z != nil && z.suffix == old.suffix && len(z.shards) == len(old.shards) && z.shards[i].sets == s.sets {
				continue
			}
			for name, set := range s.byName {
				if set.derived && !now.hasDerived([]byte(name)) {
					p.addLocked(name, at)
				}
			}
			for name, o := range s.srv {
				gone := z == nil || z.offered([]byte(name)) == nil
				if old.suffix != "" && (gone || z.suffix != old.suffix) {
					p.addLocked(name+old.suffix, at)
				}
				if gone && !o.isPublic {
					p.addLocked(serviceOn(id, name), at)
				}
			}
		}
	}
}

// addLocked makes room where there is none: any other name goes.
func (p *past) addLocked(name string, at time.Time) {
	if len(p.names) >= maxPast {
		for victim := range p.names {
			delete(p.names, victim)
			break
		}
	}
	p.names[name] = at.Add(pastFor)
}

// serviceOn stands for a service, or alias, in the names of the past: no name that is asked
// for has the byte in it.
func serviceOn(network weft.ID, name string) string { return name + "\x00" + string(network) }

// has reports whether name (folded, without port and protocol), in full or without one of
// the domains (each with its dot), was a derived name a short while ago, or ends in the name
// of a service that v's networks had then.
func (p *past) has(v *view, name string, domains []string, at time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.names) == 0 {
		return false
	}
	isPast := func(name string) bool { return at.Before(p.names[name]) }
	if isPast(name) {
		return true
	}
	for _, d := range domains {
		if host, ok := strings.CutSuffix(name, d); ok && isPast(host) {
			return true
		}
	}
	dot := strings.LastIndexByte(name, '.')
	if dot < 0 || v.isReal([]byte(name[dot:])) {
		return false
	}
	return slices.ContainsFunc(v.networks, func(id weft.ID) bool { return isPast(serviceOn(id, name[dot+1:])) })
}

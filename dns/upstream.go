package dns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft"
)

const (
	// resolvCheck is how often the resolver file is looked at, at most.
	resolvCheck = time.Second
	// maxUpstreams bounds the tries of one question (resolv.conf(5): MAXNS).
	maxUpstreams = 3
	// downFor is how long a failed upstream is asked last.
	downFor = 10 * time.Second
	// maxFailed bounds how many failed ones are remembered: tasks may name any.
	maxFailed = 1024
)

// upstream is a nameserver.
type upstream struct {
	addr netip.AddrPort
	// network is the one whose subnet it is in, if it is to be asked from inside
	// the task: the same address on another network is somebody else. "" = it is
	// asked from the host's side.
	network weft.ID
}

func (u upstream) isNear() bool { return u.network != "" }

// nameservers are a task's own; without any it uses the host's. key tells lists
// apart: what one resolver says another may not.
type nameservers struct {
	key  string
	list []upstream
	dial Dial // to near ones
}

func newNameservers(v *View) nameservers {
	n := nameservers{dial: v.Dial}
	for _, a := range v.Nameservers {
		u := upstream{addr: netip.AddrPortFrom(a.Unmap(), 53), network: v.near(a.Unmap())}
		if v.Internal && !u.isNear() || !a.IsValid() || len(n.list) >= maxUpstreams || slices.Contains(n.list, u) {
			continue
		}
		n.list = append(n.list, u)
		n.key += u.addr.String() + "@" + string(u.network) + " "
	}
	return n
}

// near is the network of v that an address is asked on; "" = none.
func (v *View) near(a netip.Addr) weft.ID {
	i := slices.IndexFunc(v.Near, func(n Near) bool { return n.Subnet.Contains(a) })
	if i < 0 || v.Dial == nil {
		return ""
	}
	return v.Near[i].Network
}

// upstreams is the host's list of nameservers, read again when the file has
// changed.
type upstreams struct {
	path    string
	exclude []netip.Addr

	// mu guards all below. It is held while the file is read.
	mu      sync.Mutex
	checked time.Time
	mtime   time.Time
	size    int64
	list    []upstream
	search  []string
	failed  map[upstream]time.Time // until when it is asked last; tasks' own, too
	gen     uint64                 // grows with each new list
}

// current returns the nameservers in the order to ask them, the task's own or
// else the host's, and a number that changes with the list of the host. A file
// that cannot be read keeps the last list, as an editor may be replacing it;
// without any list that is an error.
func (u *upstreams) current(now time.Time, own nameservers) ([]upstream, uint64, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	err := u.checkLocked(now)
	list := own.list
	if len(list) == 0 {
		list = u.list
	}
	if len(list) == 0 {
		return nil, u.gen, errors.Join(err, fmt.Errorf("no usable nameserver in %s", u.path))
	}
	up := make([]upstream, 0, len(list))
	var down []upstream
	for _, a := range list {
		if now.Before(u.failed[a]) {
			down = append(down, a)
		} else {
			up = append(up, a)
		}
	}
	return append(up, down...), u.gen, nil
}

// checkLocked reads the file if that is due.
func (u *upstreams) checkLocked(now time.Time) error {
	if !u.checked.IsZero() && now.Sub(u.checked) < resolvCheck {
		return nil
	}
	u.checked = now
	return u.readLocked()
}

func (u *upstreams) searchDomains(now time.Time) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.checkLocked(now) // the last ones are better than none
	return slices.Clone(u.search)
}

func (u *upstreams) fail(a upstream, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.failed) >= maxFailed {
		maps.DeleteFunc(u.failed, func(_ upstream, until time.Time) bool { return !now.Before(until) })
	}
	if len(u.failed) < maxFailed {
		u.failed[a] = now.Add(downFor)
	}
}

func (u *upstreams) succeed(a upstream) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.failed, a)
}

func (u *upstreams) readLocked() error {
	f, err := os.Open(u.path)
	if err != nil {
		return fmt.Errorf("read nameservers: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read nameservers: %w", err)
	}
	if st.ModTime().Equal(u.mtime) && st.Size() == u.size {
		return nil
	}
	list, search, err := parseResolvConf(f, u.exclude)
	if err != nil {
		return fmt.Errorf("read nameservers of %s: %w", u.path, err)
	}
	u.search = search
	u.mtime, u.size = st.ModTime(), st.Size()
	if !slices.Equal(list, u.list) {
		u.list, u.failed = list, map[upstream]time.Time{}
		u.gen++
	}
	return nil
}

// Nameservers reads the addresses of the nameservers of a resolv.conf(5), at
// most three. A missing file is none.
func Nameservers(path string) ([]netip.Addr, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read nameservers: %w", err)
	}
	defer f.Close()
	list, _, err := parseResolvConf(f, nil)
	if err != nil {
		return nil, fmt.Errorf("read nameservers of %s: %w", path, err)
	}
	out := make([]netip.Addr, len(list))
	for i, a := range list {
		out[i] = a.addr.Addr()
	}
	return out, nil
}

// parseResolvConf returns the nameservers of a resolv.conf(5), at most three,
// without the excluded, and its search domains: those of its last line of them.
// Lines and domains that it does not understand are none of its business.
func parseResolvConf(r io.Reader, exclude []netip.Addr) (list []upstream, search []string, err error) {
	sc := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			a, err := netip.ParseAddr(f[1])
			if err != nil || slices.Contains(exclude, a.Unmap()) {
				continue
			}
			u := upstream{addr: netip.AddrPortFrom(a.Unmap(), 53)}
			if len(list) < maxUpstreams && !slices.Contains(list, u) {
				list = append(list, u)
			}
		case "domain":
			search = domainsOf(f[1:2])
		case "search":
			search = domainsOf(f[1:])
		}
	}
	return list, search, sc.Err()
}

// domainsOf are the words that are names of domains, each once.
func domainsOf(words []string) []string {
	var out []string
	for _, w := range words {
		w = strings.TrimSuffix(w, ".")
		if weft.CheckDomain(w) == nil && !slices.Contains(out, w) {
			out = append(out, w)
		}
	}
	return out
}

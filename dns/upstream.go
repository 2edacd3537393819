package dns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// resolvCheck is how often the resolver file is looked at, at most.
	resolvCheck = time.Second
	// maxUpstreams bounds the tries of one question (resolv.conf(5): MAXNS).
	maxUpstreams = 3
	// downFor is how long a failed upstream is asked last.
	downFor = 10 * time.Second
)

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
	list    []netip.AddrPort
	failed  map[netip.AddrPort]time.Time // until when it is asked last
	gen     uint64                       // grows with each new list
}

// current returns the nameservers in the order to ask them and a number that
// changes with the list. A file that cannot be read keeps the last list, as an
// editor may be replacing it; without any list that is an error.
func (u *upstreams) current(now time.Time) ([]netip.AddrPort, uint64, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var err error
	if u.checked.IsZero() || now.Sub(u.checked) >= resolvCheck {
		err = u.readLocked()
		u.checked = now
	}
	if len(u.list) == 0 {
		return nil, u.gen, errors.Join(err, fmt.Errorf("no usable nameserver in %s", u.path))
	}
	up := make([]netip.AddrPort, 0, len(u.list))
	var down []netip.AddrPort
	for _, a := range u.list {
		if now.Before(u.failed[a]) {
			down = append(down, a)
		} else {
			up = append(up, a)
		}
	}
	return append(up, down...), u.gen, nil
}

func (u *upstreams) fail(a netip.AddrPort, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if slices.Contains(u.list, a) {
		u.failed[a] = now.Add(downFor)
	}
}

func (u *upstreams) succeed(a netip.AddrPort) {
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
	list, err := parseResolvConf(f, u.exclude)
	if err != nil {
		return fmt.Errorf("read nameservers of %s: %w", u.path, err)
	}
	u.mtime, u.size = st.ModTime(), st.Size()
	if !slices.Equal(list, u.list) {
		u.list, u.failed = list, map[netip.AddrPort]time.Time{}
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
	list, err := parseResolvConf(f, nil)
	if err != nil {
		return nil, fmt.Errorf("read nameservers of %s: %w", path, err)
	}
	out := make([]netip.Addr, len(list))
	for i, a := range list {
		out[i] = a.Addr()
	}
	return out, nil
}

// parseResolvConf returns the nameservers of a resolv.conf(5), at most three,
// without the excluded. Lines that it does not understand are none of its
// business.
func parseResolvConf(r io.Reader, exclude []netip.Addr) ([]netip.AddrPort, error) {
	var list []netip.AddrPort
	sc := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(f[1])
		if err != nil || slices.Contains(exclude, a.Unmap()) {
			continue
		}
		ap := netip.AddrPortFrom(a.Unmap(), 53)
		if len(list) < maxUpstreams && !slices.Contains(list, ap) {
			list = append(list, ap)
		}
	}
	return list, sc.Err()
}

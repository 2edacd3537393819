// Package sandboxtest has a sandbox.Maker without a kernel: a map.
package sandboxtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
)

// Maker keeps sandboxes in memory. The zero value is empty and ready. Safe for
// concurrent use.
type Maker struct {
	// guards: all below.
	mu    sync.Mutex
	made  map[weft.ID]sandbox.Sandbox
	specs map[weft.ID]sandbox.Spec
	err   error
}

var _ sandbox.Maker = (*Maker)(nil)

// Fail makes every call fail with err until it is called with nil.
func (m *Maker) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// Spec returns what Make was last called with for a task.
func (m *Maker) Spec(task weft.ID) (sandbox.Spec, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, ok := m.specs[task]
	return s, ok
}

// Make implements sandbox.Maker.
func (m *Maker) Make(ctx context.Context, s sandbox.Spec) (sandbox.Sandbox, error) {
	if err := s.Validate(); err != nil {
		return sandbox.Sandbox{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := cmp.Or(ctx.Err(), m.err); err != nil {
		return sandbox.Sandbox{}, err
	}
	if m.made == nil {
		m.made, m.specs = make(map[weft.ID]sandbox.Sandbox), make(map[weft.ID]sandbox.Spec)
	}
	dir := "/fake/" + string(s.Task)
	sb := sandbox.Sandbox{Task: s.Task, NetNS: dir + "/netns", HostsPath: dir + "/hosts", ResolvConfPath: dir + "/resolv.conf", HostnamePath: dir + "/hostname"}
	if s.Gateway {
		if sb.GatewayAddr = m.made[s.Task].GatewayAddr; !sb.GatewayAddr.IsValid() {
			used := make(map[netip.Prefix]bool)
			for _, other := range m.made {
				used[other.GatewayAddr] = true
			}
			sb.GatewayAddr = netip.MustParsePrefix("172.31.240.2/20")
			for used[sb.GatewayAddr] {
				sb.GatewayAddr = netip.PrefixFrom(sb.GatewayAddr.Addr().Next(), 20)
			}
		}
	}
	if sb.Search, sb.IsSearchKnown = s.Search, true; m.made[s.Task].IsSearchKnown {
		sb.Search = m.made[s.Task].Search
	}
	m.made[s.Task], m.specs[s.Task] = sb, s
	return sb, nil
}

// Destroy implements sandbox.Maker.
func (m *Maker) Destroy(ctx context.Context, task weft.ID) error {
	if !task.Valid() {
		return fmt.Errorf("destroy sandbox of task %q: not a task id: %w", task, weft.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := cmp.Or(ctx.Err(), m.err); err != nil {
		return err
	}
	delete(m.made, task)
	delete(m.specs, task)
	return nil
}

// Keep implements sandbox.Maker: sandboxes that are there take the spec.
func (m *Maker) Keep(ctx context.Context, specs []sandbox.Spec) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	errs := []error{cmp.Or(ctx.Err(), m.err)}
	for _, s := range specs {
		if err := s.Validate(); err != nil {
			errs = append(errs, err)
		} else if _, ok := m.made[s.Task]; ok && errs[0] == nil {
			m.specs[s.Task] = s
		}
	}
	return errors.Join(errs...)
}

// List implements sandbox.Maker, sorted by task.
func (m *Maker) List(ctx context.Context) ([]sandbox.Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := cmp.Or(ctx.Err(), m.err); err != nil {
		return nil, err
	}
	var out []sandbox.Sandbox
	for _, task := range slices.Sorted(maps.Keys(m.made)) {
		out = append(out, m.made[task])
	}
	return out, nil
}

// Gateway implements sandbox.Maker.
func (m *Maker) Gateway(ctx context.Context) (string, netip.Prefix, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return weft.GatewayBridge, netip.MustParsePrefix("172.31.240.0/20"), cmp.Or(ctx.Err(), m.err)
}

// Close implements sandbox.Maker.
func (m *Maker) Close(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Or(ctx.Err(), m.err)
}

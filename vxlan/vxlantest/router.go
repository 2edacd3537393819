package vxlantest

import (
	"context"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Router is a vxlan.Router in memory. The zero value is empty and ready. Safe
// for concurrent use.
type Router struct {
	// guards: all below.
	mu     sync.Mutex
	routes map[weft.ID][]vxlan.Route
	fail   error
}

var _ vxlan.Router = (*Router)(nil)

// ApplyRoutes implements vxlan.Router.
func (r *Router) ApplyRoutes(ctx context.Context, want vxlan.State) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.fail != nil {
		return r.fail
	}
	r.routes = map[weft.ID][]vxlan.Route{}
	for _, n := range want.Networks {
		for _, p := range n.Ports {
			r.routes[p.Task] = append(r.routes[p.Task], vxlan.Routes(n)...)
		}
	}
	return nil
}

// Fail makes every following ApplyRoutes fail with err; nil ends that.
func (r *Router) Fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = err
}

// Routes are those of a task, over all its ports.
func (r *Router) Routes(task weft.ID) []vxlan.Route {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.routes[task]
}

package wire

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// call is one call being served: who asks, and the implementation of S.
type call[S any] struct {
	ctx    context.Context
	impl   S
	caller ca.Identity
}

// controlDesc serves Control, a line a method.
func controlDesc() *grpc.ServiceDesc {
	type c = call[Control]
	return &grpc.ServiceDesc{ServiceName: controlService, HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		unary("Services", func(c c, _ empty) (a servicesAnswer, err error) { a.Services, err = c.impl.Services(c.ctx); return }),
		unary("Service", func(c c, r refRequest) (a serviceAnswer, err error) {
			a.Service, err = c.impl.Service(c.ctx, r.Ref)
			return
		}),
		unary("CreateService", func(c c, r specRequest) (a serviceAnswer, err error) {
			a.Service, err = c.impl.CreateService(c.ctx, r.Spec)
			return
		}),
		unary("UpdateService", func(c c, r updateServiceRequest) (a serviceAnswer, err error) {
			a.Service, err = c.impl.UpdateService(c.ctx, r.ID, r.Index, r.Spec)
			return
		}),
		unary("RollbackService", func(c c, r rollbackServiceRequest) (a serviceAnswer, err error) {
			a.Service, err = c.impl.RollbackService(c.ctx, r.ID, r.Index)
			return
		}),
		unary("RemoveService", func(c c, r idRequest) (a empty, err error) { return a, c.impl.RemoveService(c.ctx, r.ID) }),
		unary("Tasks", func(c c, r tasksRequest) (a tasksAnswer, err error) {
			a.List, err = c.impl.Tasks(c.ctx, r.Filter)
			return
		}),
		unary("Nodes", func(c c, _ empty) (a nodesAnswer, err error) { a.Nodes, err = c.impl.Nodes(c.ctx); return }),
		unary("UpdateNode", func(c c, r updateNodeRequest) (a empty, err error) {
			return a, c.impl.UpdateNode(c.ctx, r.ID, r.Index, r.Spec)
		}),
		unary("RemoveNode", func(c c, r removeNodeRequest) (a empty, err error) { return a, c.impl.RemoveNode(c.ctx, r.ID, r.Force) }),
		unary("Networks", func(c c, _ empty) (a networksAnswer, err error) { a.Networks, err = c.impl.Networks(c.ctx); return }),
		unary("CreateNetwork", func(c c, r createNetworkRequest) (a networkAnswer, err error) {
			a.Network, err = c.impl.CreateNetwork(c.ctx, r.Spec)
			return
		}),
		unary("RemoveNetwork", func(c c, r idRequest) (a empty, err error) { return a, c.impl.RemoveNetwork(c.ctx, r.ID) }),
		unary("Cluster", serveCluster),
		unary("UpdateCluster", func(c c, r updateClusterRequest) (a empty, err error) {
			return a, c.impl.UpdateCluster(c.ctx, r.Index, r.Update)
		}),
	}, Streams: []grpc.StreamDesc{
		stream("TaskLogs", func(c c, r taskLogsRequest, send func(weft.LogRecord) error) error {
			return c.impl.TaskLogs(c.ctx, r.Tasks, r.Options, send)
		}),
	}}
}

// serveCluster keeps what Clusters promises, whatever the implementation
// returns: the authority's key never leaves, tokens go to managers only.
func serveCluster(c call[Control], _ empty) (a clusterAnswer, err error) {
	a.Cluster, err = c.impl.Cluster(c.ctx)
	a.Cluster.CAKey = nil
	if c.caller.Role != weft.RoleManager {
		a.Cluster.Tokens = weft.JoinTokens{}
	}
	return a, err
}

func dispatcherDesc() *grpc.ServiceDesc {
	type c = call[Dispatcher]
	return &grpc.ServiceDesc{ServiceName: dispatcherService, HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		unary("Report", func(c c, r Report) (a empty, err error) { return a, c.impl.Report(c.ctx, c.caller.Node, r) }),
	}, Streams: []grpc.StreamDesc{
		stream("Session", func(c c, r SessionRequest, send func(Assignments) error) error {
			if r.Version != ProtocolVersion {
				return fmt.Errorf("open session of node %s: it speaks protocol version %d, this manager %d; run the same release of weft on all nodes: %w", c.caller.Node, r.Version, ProtocolVersion, weft.ErrUnsupported)
			}
			return c.impl.Session(c.ctx, c.caller.Node, r, send)
		}),
	}}
}

func membershipDesc() *grpc.ServiceDesc {
	type c = call[Membership]
	return &grpc.ServiceDesc{ServiceName: membershipService, HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		unary("Admit", func(c c, r forwardRequest) (AdmitResponse, error) { return c.impl.Admit(c.ctx, r.Request, r.Remote) }),
		unary("Renew", func(c c, r renewRequest) (a renewAnswer, err error) {
			a.Cert, err = c.impl.Renew(c.ctx, c.caller.Node, r.CSR)
			return
		}),
		unary("Depart", func(c c, _ empty) (a empty, err error) { return a, c.impl.Depart(c.ctx, c.caller.Node) }),
	}}
}

func agentDesc() *grpc.ServiceDesc {
	type c = call[Agent]
	return &grpc.ServiceDesc{ServiceName: agentService, HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		unary("Drain", func(c c, r idRequest) (a empty, err error) { return a, c.impl.Drain(c.ctx, c.caller.Node, r.ID) }),
		unary("Arrive", func(c c, r arriveRequest) (a empty, err error) {
			return a, c.impl.Arrive(c.ctx, c.caller.Node, r.ID, r.Networks)
		}),
	}, Streams: []grpc.StreamDesc{
		stream("Logs", func(c c, r logsRequest, send func(weft.LogRecord) error) error {
			return c.impl.Logs(c.ctx, r.Task, r.Options, send)
		}),
	}}
}

// bound is an implementation as registered with gRPC, with what every call on
// it goes through first.
type bound[S any] struct {
	impl  S
	guard *guard
}

// guard admits calls.
type guard struct {
	now     func() time.Time
	check   func(context.Context, ca.Identity) error // nil = the certificate suffices
	serving context.Context                          // ends when the server stops; calls end with it
}

// admit tells who calls method and whether they may.
func (g *guard) admit(ctx context.Context, method string) (ca.Identity, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ca.Identity{}, fmt.Errorf("call %s: no peer: %w", method, weft.ErrForbidden)
	}
	info, ok := p.AuthInfo.(authInfo)
	if !ok {
		return ca.Identity{}, fmt.Errorf("call %s: the peer has no certificate: %w", method, weft.ErrForbidden)
	}
	if g.now().After(info.notAfter) {
		// The connection is older than the certificate's end.
		return ca.Identity{}, fmt.Errorf("call %s: the certificate of node %s has expired: %w", method, info.id.Node, weft.ErrForbidden)
	}
	if err := mayCall(method, info.id); err != nil {
		return ca.Identity{}, err
	}
	if g.check != nil {
		if err := g.check(ctx, info.id); err != nil {
			return ca.Identity{}, err
		}
	}
	return info.id, nil
}

// within is a call's context that also ends when the server stops.
func (g *guard) within(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(g.serving, func() { cancel(errStopping) })
	return ctx, func() { stop(); cancel(nil) }
}

// whyEnded replaces the bare cancellation of a call that ended because the
// server stops: the caller did not cancel, and shall dial another manager.
func whyEnded(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStopping) {
		return errStopping
	}
	return err
}

var errStopping = fmt.Errorf("this node is stopping: %w", weft.ErrUnavailable)

// unary makes one method of S. Every error leaves with its trailer.
func unary[S, Req, Ans any](name string, f func(call[S], Req) (Ans, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		b := srv.(*bound[S])
		method, _ := grpc.Method(ctx)
		ans, err := func() (a Ans, err error) {
			id, err := b.guard.admit(ctx, method)
			if err != nil {
				return a, err
			}
			var r Req
			if err := dec(&r); err != nil {
				return a, fmt.Errorf("read request of %s: %w: %w", method, err, weft.ErrInvalid)
			}
			ctx, cancel := b.guard.within(ctx)
			defer cancel()
			a, err = f(call[S]{ctx: ctx, impl: b.impl, caller: id}, r)
			return a, whyEnded(ctx, err)
		}()
		if err != nil {
			md, err := failure(err)
			_ = grpc.SetTrailer(ctx, md) // fails only outside of a call
			return nil, err
		}
		return &ans, nil
	}}
}

// stream makes one method of S that answers with many messages. send blocks
// while the receiver is slow (HTTP/2 flow control) and fails when it is gone.
func stream[S, Req, Msg any](name string, f func(call[S], Req, func(Msg) error) error) grpc.StreamDesc {
	return grpc.StreamDesc{StreamName: name, ServerStreams: true, Handler: func(srv any, ss grpc.ServerStream) error {
		b, ctx := srv.(*bound[S]), ss.Context()
		method, _ := grpc.Method(ctx)
		err := func() error {
			id, err := b.guard.admit(ctx, method)
			if err != nil {
				return err
			}
			var r Req
			if err := ss.RecvMsg(&r); err != nil {
				return fmt.Errorf("read request of %s: %w: %w", method, err, weft.ErrInvalid)
			}
			ctx, cancel := b.guard.within(ctx)
			defer cancel()
			return whyEnded(ctx, f(call[S]{ctx: ctx, impl: b.impl, caller: id}, r, func(m Msg) error { return ss.SendMsg(&m) }))
		}()
		if err != nil {
			md, err := failure(err)
			ss.SetTrailer(md)
			return err
		}
		return nil
	}}
}

// failure is err as gRPC's status and our trailer.
func failure(err error) (metadata.MD, error) {
	w, code := toWire(err)
	b, encErr := encode(w)
	if encErr != nil {
		return nil, status.Error(code, w.Text)
	}
	return metadata.Pairs(errorTrailer, string(b)), status.Error(code, w.Text)
}

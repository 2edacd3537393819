package wire

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/grpc"

	"github.com/weftnet/weft"
)

var (
	_ Control    = (*Client)(nil)
	_ Dispatcher = (*Client)(nil)
	_ Membership = (*Client)(nil)
)

const (
	control    = "/" + controlService + "/"
	dispatcher = "/" + dispatcherService + "/"
	membership = "/" + membershipService + "/"
	agent      = "/" + agentService + "/"
)

// Services implements Control.
func (c *Client) Services(ctx context.Context) ([]weft.Service, error) {
	a, err := read[servicesAnswer](ctx, c, control+"Services", empty{})
	return a.Services, err
}

// Service implements Control.
func (c *Client) Service(ctx context.Context, ref string) (weft.Service, error) {
	a, err := read[serviceAnswer](ctx, c, control+"Service", refRequest{ref})
	return a.Service, err
}

// CreateService implements Control.
func (c *Client) CreateService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error) {
	a, err := ask[serviceAnswer](ctx, c, control+"CreateService", specRequest{spec})
	return a.Service, err
}

// UpdateService implements Control.
func (c *Client) UpdateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error) {
	a, err := ask[serviceAnswer](ctx, c, control+"UpdateService", updateServiceRequest{id, index, spec})
	return a.Service, err
}

// RollbackService implements Control.
func (c *Client) RollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error) {
	a, err := ask[serviceAnswer](ctx, c, control+"RollbackService", rollbackServiceRequest{id, index})
	return a.Service, err
}

// RemoveService implements Control.
func (c *Client) RemoveService(ctx context.Context, id weft.ID) error {
	_, err := ask[empty](ctx, c, control+"RemoveService", idRequest{id})
	return err
}

// Tasks implements Control.
func (c *Client) Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error) {
	a, err := read[tasksAnswer](ctx, c, control+"Tasks", tasksRequest{f})
	return a.List, err
}

// Nodes implements Control.
func (c *Client) Nodes(ctx context.Context) ([]weft.Node, error) {
	a, err := read[nodesAnswer](ctx, c, control+"Nodes", empty{})
	return a.Nodes, err
}

// UpdateNode implements Control.
func (c *Client) UpdateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error {
	_, err := ask[empty](ctx, c, control+"UpdateNode", updateNodeRequest{id, index, spec})
	return err
}

// RemoveNode implements Control.
func (c *Client) RemoveNode(ctx context.Context, id weft.ID, force bool) error {
	_, err := ask[empty](ctx, c, control+"RemoveNode", removeNodeRequest{id, force})
	return err
}

// Networks implements Control.
func (c *Client) Networks(ctx context.Context) ([]weft.Network, error) {
	a, err := read[networksAnswer](ctx, c, control+"Networks", empty{})
	return a.Networks, err
}

// CreateNetwork implements Control.
func (c *Client) CreateNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error) {
	a, err := ask[networkAnswer](ctx, c, control+"CreateNetwork", createNetworkRequest{spec})
	return a.Network, err
}

// RemoveNetwork implements Control.
func (c *Client) RemoveNetwork(ctx context.Context, id weft.ID) error {
	_, err := ask[empty](ctx, c, control+"RemoveNetwork", idRequest{id})
	return err
}

// Cluster implements Control.
func (c *Client) Cluster(ctx context.Context) (weft.Cluster, error) {
	a, err := read[clusterAnswer](ctx, c, control+"Cluster", empty{})
	return a.Cluster, err
}

// UpdateCluster implements Control.
func (c *Client) UpdateCluster(ctx context.Context, index uint64, u weft.ClusterUpdate) error {
	_, err := ask[empty](ctx, c, control+"UpdateCluster", updateClusterRequest{index, u})
	return err
}

// TaskLogs implements Control. f is called on the caller's goroutine; while it
// works, the sender waits. An error of f ends the stream and is returned as it
// is. Once a record was delivered, a lost connection is weft.ErrUnavailable:
// starting over would deliver it twice.
func (c *Client) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return c.toLeader(ctx, true, func(ctx context.Context, cc *grpc.ClientConn, a *attempt) error {
		return follow(ctx, cc, a, control+"TaskLogs", taskLogsRequest{tasks, o}, f)
	})
}

// follow passes a stream of log records to f.
func follow[Req any](ctx context.Context, cc *grpc.ClientConn, a *attempt, method string, r Req, f func(weft.LogRecord) error) error {
	s, err := openStream(ctx, cc, method, r)
	if err != nil {
		return err
	}
	delivered := false
	err = eachMessage(s, a, func(rec weft.LogRecord) error {
		delivered = true
		return f(rec)
	})
	var own *callerError
	if err != nil && delivered && !errors.As(err, &own) {
		if v, cause := judge(ctx, a, err); v == unknown || v == redirected {
			return &callerError{textError(fmt.Sprintf("read logs: the connection was lost after some lines: %v", cause), weft.ErrUnavailable)}
		}
	}
	return err
}

// Report implements Dispatcher. node must be this node: the leader goes by the
// certificate. A report may arrive twice.
func (c *Client) Report(ctx context.Context, node weft.ID, r Report) error {
	if err := c.mustBeSelf(node); err != nil {
		return err
	}
	_, err := read[empty](ctx, c, dispatcher+"Report", r) // states only grow: repeating does no harm
	return err
}

// Session implements Dispatcher over OpenSession; it returns why the session
// ended, which is never nil.
func (c *Client) Session(ctx context.Context, node weft.ID, r SessionRequest, send func(Assignments) error) error {
	if err := c.mustBeSelf(node); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.OpenSession(ctx, r)
	if err != nil {
		return err
	}
	for {
		a, err := s.Recv()
		if err != nil {
			return err
		}
		if err := send(a); err != nil {
			return err
		}
	}
}

func (c *Client) mustBeSelf(node weft.ID) error {
	if self := c.cfg.Credentials.Identity().Node; node != self {
		return fmt.Errorf("speak for node %s: this is node %s: %w", node, self, weft.ErrForbidden)
	}
	return nil
}

// Session is an open stream of assignments. Recv is for one goroutine.
type Session interface {
	// Recv blocks for the next message. It fails when the context given to
	// OpenSession ends (its error) or the leader is lost or gives up
	// leadership (weft.ErrUnavailable: open a new session).
	Recv() (Assignments, error)
}

type session struct {
	ctx    context.Context
	stream grpc.ClientStream
	first  *Assignments // received by OpenSession; nil once delivered
}

// OpenSession opens this node's session with the leader and returns when its
// first message is there. The session ends with ctx, which the caller must
// cancel at last to free it.
func (c *Client) OpenSession(ctx context.Context, r SessionRequest) (Session, error) {
	s := &session{ctx: ctx}
	err := c.toLeader(ctx, true, func(ctx context.Context, cc *grpc.ClientConn, a *attempt) (err error) {
		if s.stream, err = openStream(ctx, cc, dispatcher+"Session", r); err != nil {
			return err
		}
		s.first = new(Assignments)
		if err = s.stream.RecvMsg(s.first); err != nil {
			a.trailer = s.stream.Trailer()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *session) Recv() (Assignments, error) {
	if s.first != nil {
		a := *s.first
		s.first = nil
		return a, nil
	}
	var m Assignments
	err := s.stream.RecvMsg(&m)
	if err == nil {
		return m, nil
	}
	a := &attempt{trailer: s.stream.Trailer()}
	a.sent.Store(true)
	_, err = judge(s.ctx, a, err)
	return Assignments{}, fmt.Errorf("receive assignments: %w", err)
}

// Admit forwards a joining node's request to the leader; only managers may.
func (c *Client) Admit(ctx context.Context, r AdmitRequest, remote netip.Addr) (AdmitResponse, error) {
	return ask[AdmitResponse](ctx, c, membership+"Admit", forwardRequest{r, remote})
}

// Renew implements Membership for this node. A certificate may be signed twice.
func (c *Client) Renew(ctx context.Context, node weft.ID, csr []byte) ([]byte, error) {
	if err := c.mustBeSelf(node); err != nil {
		return nil, err
	}
	a, err := read[renewAnswer](ctx, c, membership+"Renew", renewRequest{csr})
	return a.Cert, err
}

// Depart implements Membership for this node. Departing twice is departing.
func (c *Client) Depart(ctx context.Context, node weft.ID) error {
	if err := c.mustBeSelf(node); err != nil {
		return err
	}
	_, err := ask[empty](ctx, c, membership+"Depart", empty{})
	return err
}

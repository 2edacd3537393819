package wire

import (
	"context"
	"net/netip"
	"reflect"
	"sync"

	"github.com/weftnet/weft"
)

// recorder implements every interface of the package: it notes each call and
// answers from its fields.
type recorder struct {
	// mu guards: calls.
	mu    sync.Mutex
	calls []recorded

	err      error // answered to every call, after what is streamed
	cluster  weft.Cluster
	service  weft.Service
	tasks    weft.TaskList
	node     weft.Node
	network  weft.Network
	logs     []weft.LogRecord
	sets     []Assignments
	hold     bool // streams stay open until their context ends
	admitted AdmitResponse
	cert     []byte
	onCall   func(ctx context.Context) // runs inside every call
}

type recorded struct {
	Method string
	Args   []any
}

func (r *recorder) note(ctx context.Context, method string, args ...any) error {
	r.mu.Lock()
	r.calls = append(r.calls, recorded{method, args})
	r.mu.Unlock()
	if r.onCall != nil {
		r.onCall(ctx)
	}
	return r.err
}

func (r *recorder) seen() []recorded {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]recorded(nil), r.calls...)
}

func (r *recorder) Services(ctx context.Context) ([]weft.Service, error) {
	return []weft.Service{r.service, r.service}, r.note(ctx, "Services")
}
func (r *recorder) Service(ctx context.Context, ref string) (weft.Service, error) {
	return r.service, r.note(ctx, "Service", ref)
}
func (r *recorder) CreateService(ctx context.Context, s weft.ServiceSpec) (weft.Service, error) {
	return r.service, r.note(ctx, "CreateService", s)
}
func (r *recorder) UpdateService(ctx context.Context, id weft.ID, i uint64, s weft.ServiceSpec) (weft.Service, error) {
	return r.service, r.note(ctx, "UpdateService", id, i, s)
}
func (r *recorder) RollbackService(ctx context.Context, id weft.ID, i uint64) (weft.Service, error) {
	return r.service, r.note(ctx, "RollbackService", id, i)
}
func (r *recorder) RemoveService(ctx context.Context, id weft.ID) error {
	return r.note(ctx, "RemoveService", id)
}
func (r *recorder) Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error) {
	return r.tasks, r.note(ctx, "Tasks", f)
}
func (r *recorder) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return stream1(ctx, r, r.logs, f, r.note(ctx, "TaskLogs", tasks, o))
}
func (r *recorder) Nodes(ctx context.Context) ([]weft.Node, error) {
	return []weft.Node{r.node}, r.note(ctx, "Nodes")
}
func (r *recorder) UpdateNode(ctx context.Context, id weft.ID, i uint64, s weft.NodeSpec) error {
	return r.note(ctx, "UpdateNode", id, i, s)
}
func (r *recorder) RemoveNode(ctx context.Context, id weft.ID, force bool) error {
	return r.note(ctx, "RemoveNode", id, force)
}
func (r *recorder) Networks(ctx context.Context) ([]weft.Network, error) {
	return []weft.Network{r.network}, r.note(ctx, "Networks")
}
func (r *recorder) CreateNetwork(ctx context.Context, s weft.NetworkSpec) (weft.Network, error) {
	return r.network, r.note(ctx, "CreateNetwork", s)
}
func (r *recorder) RemoveNetwork(ctx context.Context, id weft.ID) error {
	return r.note(ctx, "RemoveNetwork", id)
}
func (r *recorder) Cluster(ctx context.Context) (weft.Cluster, error) {
	return r.cluster, r.note(ctx, "Cluster")
}
func (r *recorder) UpdateCluster(ctx context.Context, i uint64, u weft.ClusterUpdate) error {
	return r.note(ctx, "UpdateCluster", i, u)
}
func (r *recorder) Session(ctx context.Context, node weft.ID, q SessionRequest, send func(Assignments) error) error {
	return stream1(ctx, r, r.sets, send, r.note(ctx, "Session", node, q))
}
func (r *recorder) Report(ctx context.Context, node weft.ID, q Report) error {
	return r.note(ctx, "Report", node, q)
}
func (r *recorder) Admit(ctx context.Context, q AdmitRequest, remote netip.Addr) (AdmitResponse, error) {
	return r.admitted, r.note(ctx, "Admit", q, remote)
}
func (r *recorder) Renew(ctx context.Context, node weft.ID, csr []byte) ([]byte, error) {
	return r.cert, r.note(ctx, "Renew", node, csr)
}
func (r *recorder) Depart(ctx context.Context, node weft.ID) error {
	return r.note(ctx, "Depart", node)
}
func (r *recorder) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return stream1(ctx, r, r.logs, f, r.note(ctx, "Logs", task, o))
}

func (r *recorder) Drain(ctx context.Context, owner, task weft.ID) error {
	return r.note(ctx, "Drain", owner, task)
}

func (r *recorder) Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error {
	return r.note(ctx, "Arrive", owner, task, networks)
}

// stream1 sends msgs, then holds the stream when asked to, then answers err.
func stream1[M any](ctx context.Context, r *recorder, msgs []M, send func(M) error, err error) error {
	for _, m := range msgs {
		if err := send(m); err != nil {
			return err
		}
	}
	if r.hold {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

// fill sets every field below v to a value that is not zero and differs from
// its neighbours, so that a field lost on the way shows. n counts.
func fill(v reflect.Value, n *int) {
	*n++
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.AddrFrom4([4]byte{10, 0, byte(*n >> 8), byte(*n)})
		return
	case *netip.AddrPort:
		*x = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(*n >> 8), byte(*n)}), uint16(2377+*n))
		return
	case *netip.Prefix:
		*x = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(*n), 0}), 24)
		return
	}
	if v.Type().String() == "time.Time" {
		v.Set(reflect.ValueOf(testTime(*n)))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.Type().Name() + "-" + string(rune('a'+*n%26)))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Float64:
		v.SetFloat(float64(*n) + 0.5)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n % 200))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(v.Index(i), n)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), n)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 2 {
			k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(k, n)
			fill(e, n)
			v.SetMapIndex(k, e)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	default:
		panic("fill: no value for " + v.Type().String())
	}
}

// filled is a value of T with every field set.
func filled[T any]() T {
	var v T
	n := 0
	fill(reflect.ValueOf(&v).Elem(), &n)
	return v
}

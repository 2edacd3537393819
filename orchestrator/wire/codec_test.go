package wire

import (
	"bytes"
	"errors"
	"flag"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

var update = flag.Bool("update", false, "rewrite golden files")

// sample is one message of the protocol: its name, a full value, and how to
// decode one.
type sample struct {
	name   string
	value  any
	decode func([]byte) (any, error)
}

func sampleOf[T any]() sample {
	v := filled[T]()
	return sample{reflect.TypeFor[T]().Name(), v, func(b []byte) (any, error) {
		var out T
		err := decode(b, &out)
		return out, err
	}}
}

// samples are all messages of the protocol.
func samples() []sample {
	return []sample{
		sampleOf[empty](), sampleOf[refRequest](), sampleOf[idRequest](), sampleOf[specRequest](),
		sampleOf[updateServiceRequest](), sampleOf[rollbackServiceRequest](), sampleOf[arriveRequest](), sampleOf[tasksRequest](), sampleOf[taskLogsRequest](),
		sampleOf[updateNodeRequest](), sampleOf[removeNodeRequest](), sampleOf[createNetworkRequest](),
		sampleOf[updateClusterRequest](), sampleOf[forwardRequest](), sampleOf[renewRequest](), sampleOf[logsRequest](),
		sampleOf[servicesAnswer](), sampleOf[serviceAnswer](), sampleOf[tasksAnswer](), sampleOf[nodesAnswer](),
		sampleOf[networksAnswer](), sampleOf[networkAnswer](), sampleOf[clusterAnswer](), sampleOf[renewAnswer](),
		sampleOf[joinAnswer](), sampleOf[wireError](), sampleOf[SessionRequest](), sampleOf[Assignments](),
		sampleOf[Report](), sampleOf[AdmitRequest](), sampleOf[AdmitResponse](), sampleOf[weft.LogRecord](),
	}
}

// recordings are the folders of golden files, oldest first. A message whose form
// grew has a file in more than one; files of all but the newest folder are never
// written again.
var recordings = []string{"v1", "v1.1", "v1.2", "v1.3", "v1.4-ports", "v1.5-rolling", "v1.6-rollback", "v1.7-names", "v1.8-gossip", "v1.9-firewall"}

// goldens are the recordings of one message, oldest first.
func goldens(t *testing.T, name string) [][]byte {
	t.Helper()
	var out [][]byte
	for _, dir := range recordings {
		b, err := os.ReadFile(filepath.Join("testdata", dir, name+".cbor"))
		if err == nil {
			out = append(out, b)
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return out
}

// record writes the file of a message that is new or has grown.
func record(t *testing.T, name string, b []byte) {
	t.Helper()
	if old := goldens(t, name); len(old) > 0 && bytes.Equal(old[len(old)-1], b) {
		return
	}
	dir := filepath.Join("testdata", recordings[len(recordings)-1])
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name+".cbor"), b, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// TestGolden: what version 1 of the protocol wrote is read for ever, and this
// build writes the same. A change here breaks clusters in the middle of an
// upgrade: fields may be added (into a new folder of recordings, then -update),
// never renamed or removed.
func TestGolden(t *testing.T) {
	for _, s := range samples() {
		b, err := encode(s.value)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if *update {
			record(t, s.name, b)
		}
		all := goldens(t, s.name)
		if len(all) == 0 {
			t.Fatalf("%s has no golden file", s.name)
		}
		newest := all[len(all)-1]
		if !bytes.Equal(b, newest) {
			t.Errorf("%s: the encoding has changed (%d bytes, golden %d)", s.name, len(b), len(newest))
		}
		got, err := s.decode(newest)
		if err != nil || !reflect.DeepEqual(got, s.value) {
			t.Errorf("%s: decoded %+v, want %+v, %v", s.name, got, s.value, err)
		}
		for i, old := range all[:len(all)-1] {
			// What was not there yet is left out when it is empty, so an old
			// message that comes back whole has lost nothing.
			got, err := s.decode(old)
			if err != nil {
				t.Errorf("%s of recording %s: %v", s.name, recordings[i], err)
				continue
			}
			if again, err := encode(got); err != nil || !bytes.Equal(again, old) {
				t.Errorf("%s of recording %s came back as %+v, %v", s.name, recordings[i], got, err)
			}
		}
	}
}

// TestClusterPortTravels: a port is told and kept, and messages from before it
// was told stand for the usual one.
func TestClusterPortTravels(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		port := rapid.Uint16().Draw(t, "port")
		addr := netip.MustParseAddr("10.99.0.2")
		b, err := encode(SessionRequest{Version: ProtocolVersion, Addr: addr, Port: port})
		if err != nil {
			t.Fatal(err)
		}
		var r SessionRequest
		if err := decode(b, &r); err != nil || r.Port != port || r.Addr != addr {
			t.Fatalf("port %d came back as %+v, %v", port, r, err)
		}
		if b, err = encode(nodesAnswer{Nodes: []weft.Node{{Status: weft.NodeStatus{Addr: r.Addr, ClusterPort: r.Port}}}}); err != nil {
			t.Fatal(err)
		}
		var a nodesAnswer
		if err := decode(b, &a); err != nil {
			t.Fatal(err)
		}
		want := netip.AddrPortFrom(addr, port)
		if port == 0 {
			want = netip.AddrPortFrom(addr, weft.ClusterPort)
		}
		if got := a.Nodes[0].ClusterAddr(); got != want {
			t.Fatalf("port %d: dialled at %s", port, got)
		}
	})
	old := goldens(t, "nodesAnswer")[0]
	var a nodesAnswer
	if err := decode(old, &a); err != nil {
		t.Fatal(err)
	}
	for _, n := range a.Nodes {
		n.Manager = nil
		if got := n.ClusterAddr().Port(); got != weft.ClusterPort || n.Status.ClusterPort != 0 {
			t.Errorf("a worker of the first recording is dialled at port %d", got)
		}
	}
}

// TestZeroValues: invalid addresses, zero times and absent lists survive.
func TestZeroValues(t *testing.T) {
	for _, want := range []any{&Assignments{}, &AdmitRequest{}, &SessionRequest{}, &nodesAnswer{Nodes: []weft.Node{{}}}, &serviceAnswer{}, &NodeView{}} {
		b, err := encode(want)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(want).Elem())
		if err := decode(b, got.Interface()); err != nil || !reflect.DeepEqual(got.Interface(), want) {
			t.Errorf("%T came back as %+v, %v", want, got, err)
		}
	}
}

// TestNewerPeer: fields that this build does not know are passed over.
func TestNewerPeer(t *testing.T) {
	b, err := encode(map[string]any{"ID": "x", "Force": true, "Reason": map[string]any{"deep": []int{1}}})
	if err != nil {
		t.Fatal(err)
	}
	var r removeNodeRequest
	if err := decode(b, &r); err != nil || r.ID != "x" || !r.Force {
		t.Errorf("decoded %+v, %v", r, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	nested := append(bytes.Repeat([]byte{0x81}, maxNesting+1), 0x00)
	unknown := append([]byte{0xa1, 0x61, 'x'}, nested...) // {"x": [[[…]]]}
	for name, b := range map[string][]byte{
		"empty":               {},
		"cut":                 {0xa1, 0x62, 'I'},
		"trailing bytes":      {0xa0, 0x00},
		"field twice":         {0xa2, 0x62, 'I', 'D', 0x61, 'a', 0x62, 'I', 'D', 0x61, 'b'},
		"wrong type":          {0xa1, 0x62, 'I', 'D', 0x01},
		"indefinite":          {0xbf, 0xff},
		"tag":                 {0xc0, 0xa0},
		"list for a map":      {0x82, 0x01, 0x02, 0x03},
		"too deep":            unknown,
		"string of 2^62":      {0xa1, 0x62, 'I', 'D', 0x7b, 0x40, 0, 0, 0, 0, 0, 0, 0},
		"list of 2^32":        {0xa1, 0x61, 'x', 0x9a, 0xff, 0xff, 0xff, 0xff},
		"map of 2^63 entries": {0xbb, 0x80, 0, 0, 0, 0, 0, 0, 0},
	} {
		var r idRequest
		if err := decode(b, &r); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: decoded %+v, %v", name, r, err)
		}
	}
}

// TestEncodingIsDeterministic whatever the order of maps.
func TestEncodingIsDeterministic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := specRequest{weft.ServiceSpec{
			Labels:   rapid.MapOf(rapid.String(), rapid.String()).Draw(t, "labels"),
			Replicas: rapid.Uint64().Draw(t, "replicas"),
			Container: weft.ContainerSpec{
				Env: rapid.SliceOf(rapid.String()).Draw(t, "env"),
			},
		}}
		a, err := encode(spec)
		if err != nil {
			t.Fatal(err)
		}
		var back specRequest
		if err := decode(a, &back); err != nil || !reflect.DeepEqual(back, spec) {
			t.Fatalf("%+v came back as %+v, %v", spec, back, err)
		}
		b, err := encode(back)
		if err != nil || !bytes.Equal(a, b) {
			t.Fatalf("two encodings of one value, %v", err)
		}
	})
}

func TestIntegersOutOfRange(t *testing.T) {
	b, err := encode(map[string]any{"Addr": "x", "Version": uint64(math.MaxUint64)})
	if err != nil {
		t.Fatal(err)
	}
	if err := decode(b, &SessionRequest{}); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("a version of 2^64-1: %v", err)
	}
}

// FuzzDecode: no bytes from the network may panic a decoder, and what it
// accepts can be written and read again to the same bytes.
func FuzzDecode(f *testing.F) {
	all := samples()
	for i, s := range all {
		b, err := encode(s.value)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(i), b)
	}
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		s := all[int(kind)%len(all)]
		v, err := s.decode(b)
		if err != nil {
			if !errors.Is(err, weft.ErrInvalid) {
				t.Fatalf("error without sentinel: %v", err)
			}
			return
		}
		once, err := encode(v)
		if err != nil {
			t.Fatalf("%s: what was decoded cannot be encoded: %v", s.name, err)
		}
		w, err := s.decode(once)
		if err != nil {
			t.Fatalf("%s: what was encoded cannot be decoded: %v", s.name, err)
		}
		twice, err := encode(w)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s: the encoding is not stable: %x, %x, %v", s.name, once, twice, err)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	var buf bytes.Buffer
	if err := writeFrame(&buf, filled[AdmitRequest]()); err != nil {
		f.Fatal(err)
	}
	f.Add(buf.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r AdmitRequest
		if err := readFrame(bytes.NewReader(b), maxJoin, &r); err == nil && len(b) < 5 {
			t.Fatalf("%x is read as %+v", b, r)
		}
	})
}

// TestViewIsDialledAtItsPort: the port that a node told, else a manager's own,
// else the usual one.
func TestViewIsDialledAtItsPort(t *testing.T) {
	addr := netip.MustParseAddr("10.99.0.2")
	for _, c := range []struct {
		view NodeView
		want uint16
	}{
		{NodeView{Addr: addr}, weft.ClusterPort},
		{NodeView{Addr: addr, ClusterPort: 4377}, 4377},
		{NodeView{Addr: addr, Manager: netip.AddrPortFrom(addr, 5377)}, 5377},
		{NodeView{Addr: addr, Manager: netip.AddrPortFrom(addr, 5377), ClusterPort: 4377}, 4377},
	} {
		if got := c.view.ClusterAddr(); got != netip.AddrPortFrom(addr, c.want) {
			t.Errorf("%+v is dialled at %s", c.view, got)
		}
	}
}

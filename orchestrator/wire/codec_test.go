package wire

import (
	"bytes"
	"errors"
	"flag"
	"math"
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
		sampleOf[updateServiceRequest](), sampleOf[tasksRequest](), sampleOf[taskLogsRequest](),
		sampleOf[updateNodeRequest](), sampleOf[removeNodeRequest](), sampleOf[createNetworkRequest](),
		sampleOf[updateClusterRequest](), sampleOf[forwardRequest](), sampleOf[renewRequest](), sampleOf[logsRequest](),
		sampleOf[servicesAnswer](), sampleOf[serviceAnswer](), sampleOf[tasksAnswer](), sampleOf[nodesAnswer](),
		sampleOf[networksAnswer](), sampleOf[networkAnswer](), sampleOf[clusterAnswer](), sampleOf[renewAnswer](),
		sampleOf[joinAnswer](), sampleOf[wireError](), sampleOf[SessionRequest](), sampleOf[Assignments](),
		sampleOf[Report](), sampleOf[AdmitRequest](), sampleOf[AdmitResponse](), sampleOf[weft.LogRecord](),
	}
}

// TestGolden: what version 1 of the protocol wrote is read for ever, and this
// build writes the same. A change here breaks clusters in the middle of an
// upgrade: fields may be added (then -update), never renamed or removed.
func TestGolden(t *testing.T) {
	for _, s := range samples() {
		path := filepath.Join("testdata", "v1", s.name+".cbor")
		b, err := encode(s.value)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if *update {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		golden, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, golden) {
			t.Errorf("%s: the encoding has changed (%d bytes, golden %d)", s.name, len(b), len(golden))
		}
		got, err := s.decode(golden)
		if err != nil || !reflect.DeepEqual(got, s.value) {
			t.Errorf("%s: decoded %+v, want %+v, %v", s.name, got, s.value, err)
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

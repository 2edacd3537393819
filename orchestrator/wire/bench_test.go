package wire

import (
	"context"
	"crypto/tls"
	"io"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// BenchmarkCall is a small call over loopback, client and server in one
// process: TLS, HTTP/2, CBOR.
func BenchmarkCall(b *testing.B) {
	c := newTestCluster(b)
	cl := c.client(c.creds(weft.RoleWorker), c.serve(ServerConfig{Control: &quiet{}}).addr)
	id := weft.NewID()
	b.ReportAllocs()
	for b.Loop() {
		if err := cl.RemoveService(b.Context(), id); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCallParallel is the same from many goroutines on one connection.
func BenchmarkCallParallel(b *testing.B) {
	c := newTestCluster(b)
	cl := c.client(c.creds(weft.RoleWorker), c.serve(ServerConfig{Control: &quiet{}}).addr)
	id := weft.NewID()
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := cl.RemoveService(b.Context(), id); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// quiet is a Control that notes nothing.
type quiet struct{ recorder }

func (*quiet) RemoveService(context.Context, weft.ID) error { return nil }

// BenchmarkLogRecord is one record of a stream.
func BenchmarkLogRecord(b *testing.B) {
	c := newTestCluster(b)
	cl := c.client(c.creds(weft.RoleWorker), c.serve(ServerConfig{Control: endless{}}).addr)
	n := 0
	b.SetBytes(100)
	b.ReportAllocs()
	err := cl.TaskLogs(b.Context(), nil, weft.LogOptions{}, func(weft.LogRecord) error {
		if n == 0 {
			b.ResetTimer()
		}
		if n++; n > b.N {
			return io.EOF
		}
		return nil
	})
	if err != io.EOF {
		b.Fatal(err)
	}
}

type endless struct{ Control }

func (endless) TaskLogs(ctx context.Context, _ []weft.ID, _ weft.LogOptions, f func(weft.LogRecord) error) error {
	r := filled[weft.LogRecord]()
	r.Line = make([]byte, 100)
	for {
		if err := f(r); err != nil {
			return err
		}
	}
}

// BenchmarkHandshake is a new connection, both sides.
func BenchmarkHandshake(b *testing.B) {
	c := newTestCluster(b)
	creds := c.creds(weft.RoleManager)
	raft := NewRaft(creds, deadAddr(b))
	srv := c.serve(ServerConfig{Credentials: creds, Raft: raft})
	cfg := creds.ClientConfig(ca.ProtoRaft, ca.Peer{Manager: true})
	for b.Loop() {
		conn, err := tls.Dial("tcp", srv.addr.String(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		in, err := raft.Accept()
		if err != nil {
			b.Fatal(err)
		}
		in.Close()
		conn.Close()
	}
}

// BenchmarkCodec encodes and decodes a service.
func BenchmarkCodec(b *testing.B) {
	v := filled[serviceAnswer]()
	data, err := encode(v)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if _, err := encode(v); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			var out serviceAnswer
			if err := decode(data, &out); err != nil {
				b.Fatal(err)
			}
		}
	})
}

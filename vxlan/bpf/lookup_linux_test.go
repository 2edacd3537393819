package bpf

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// BenchmarkLookup is a task's packet up to the end of its lookups (it is for
// nobody, so that the same packet can be sent again), in a network of 10 and of
// 100,000 endpoints.
func BenchmarkLookup(b *testing.B) {
	netnstest.NeedRoot(b)
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			spec, err := loadOverlay()
			must(b, err)
			coll, err := ebpf.NewCollection(spec)
			must(b, err)
			defer coll.Close()
			mine, nobody := vxlan.MAC{2, 0, 0, 0, 0, 1}, vxlan.MAC{2, 9, 9, 9, 9, 9}
			must(b, coll.Maps[overlayMapPorts].Put(uint32(1), portValue{VNI: testVNI, MAC: mine}))
			keys, values := make([]macKey, n), make([]destValue, n)
			for i := range keys {
				keys[i] = macKey{VNI: testVNI, MAC: vxlan.MAC{2, 1}}
				binary.BigEndian.PutUint32(keys[i].MAC[2:], uint32(i))
			}
			start := time.Now()
			_, err = coll.Maps[overlayMapMacs].BatchUpdate(keys, values, nil)
			must(b, err)
			b.Logf("%d entries written in %v", n, time.Since(start))
			ret, took, err := coll.Programs[overlayProgFromTask].Benchmark(ipv4Frame(mine, nobody, 60), max(b.N, 1000), b.ResetTimer)
			must(b, err)
			if ret != 2 {
				b.Fatalf("the program returned %d, want a drop", ret)
			}
			b.ReportMetric(float64(took.Nanoseconds()), "ns/packet")
		})
	}
}

// BenchmarkHostPacket is a packet of TCP for the host itself at the underlay's
// program: while all networks are encapsulated, and while one is not, with 10,000
// local tasks.
func BenchmarkHostPacket(b *testing.B) {
	netnstest.NeedRoot(b)
	for _, prog := range []string{overlayProgFromUnderlay, overlayProgFromNative} {
		b.Run(prog, func(b *testing.B) {
			spec, err := loadOverlay()
			must(b, err)
			coll, err := ebpf.NewCollection(spec)
			must(b, err)
			defer coll.Close()
			const n = 10_000
			keys, values := make([]addr16, n), make([]nativeValue, n)
			for i := range keys {
				keys[i] = addr16{10: 0xff, 11: 0xff, 12: 10, 13: 9}
				binary.BigEndian.PutUint16(keys[i][14:], uint16(i))
			}
			_, err = coll.Maps[overlayMapNatives].BatchUpdate(keys, values, nil)
			must(b, err)
			frame := ipv4Frame(vxlan.MAC{2, 0, 0, 0, 0, 1}, vxlan.MAC{}, 60)
			frame[23] = 6
			ret, took, err := coll.Programs[prog].Benchmark(frame, max(b.N, 1000), b.ResetTimer)
			must(b, err)
			if int32(ret) != -1 {
				b.Fatalf("the program returned %d, want the next one", int32(ret))
			}
			b.ReportMetric(float64(took.Nanoseconds()), "ns/packet")
		})
	}
}

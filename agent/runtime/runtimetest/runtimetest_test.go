package runtimetest_test

import (
	"strconv"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
)

var _ runtime.Images = (*runtimetest.MemoryImages)(nil)

func TestMemory(t *testing.T) {
	runtimetest.Run(t, runtimetest.Harness{
		New:   func(*testing.T) runtimetest.Target { return runtimetest.NewMemory(weft.NewID()) },
		Image: "any", Sleep: []string{"sleep"}, Stubborn: []string{"stubborn"},
		Exit:  func(code int) []string { return []string{"exit", strconv.Itoa(code)} },
		Print: []string{"print"}, Missing: []string{"missing"}, Echo: []string{"echo"},
	})
}

func TestProcess(t *testing.T) {
	runtimetest.Run(t, runtimetest.Harness{
		New:      func(t *testing.T) runtimetest.Target { return runtimetest.NewProcess(weft.NewID(), t.TempDir()) },
		Image:    "any",
		Sleep:    []string{"sh", "-c", `trap 'kill -KILL $!; exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done`},
		Stubborn: []string{"sh", "-c", `trap '' TERM; echo ready; while :; do sleep 1000; done`},
		Exit:     func(code int) []string { return []string{"sh", "-c", "exit " + strconv.Itoa(code)} },
		Print:    []string{"sh", "-c", "echo out1; echo err1 >&2; echo out2"},
		Missing:  []string{"/no/such/program"}, Echo: []string{"sh", "-c", "cat; exit 5"},
	})
}

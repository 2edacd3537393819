package wg

import (
	"os"
	"testing"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestMain lets the test binary be the child process, too.
func TestMain(m *testing.M) {
	if handled, code := Main(os.Args); handled {
		os.Exit(code)
	}
	if os.Geteuid() == 0 {
		netnstest.MainRoot(m) // no user namespace gives eBPF
	}
	netnstest.Main(m)
}

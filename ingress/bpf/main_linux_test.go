package bpf

import (
	"testing"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainRoot(m) }

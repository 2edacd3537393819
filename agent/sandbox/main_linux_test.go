package sandbox

import (
	"testing"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

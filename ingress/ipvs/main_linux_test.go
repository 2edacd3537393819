package ipvs

import (
	"testing"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainRoot(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

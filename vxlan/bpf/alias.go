package bpf

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// The near ends of ports stand in the host's namespace; their ifalias says whose
// they are. The format outlives the process and carries its version:
//
//	weft:<node> v1 ebpf <vni> port <task id> <if name> <namespace path>
//	weft:<node> v1 ebpf <vni> leg <link name>
//	weft:<node> v1 ebpf <vni> uplink

// owned is what an alias tells: a port without address, the name of the leg, or
// the uplink of an encrypted network.
type owned struct {
	vni      uint32
	port     vxlan.Port
	leg      string
	isUplink bool
}

func portAlias(node weft.ID, vni uint32, p vxlan.Port) string {
	return fmt.Sprintf("%s v1 ebpf %d port %s %s %s", weft.LinkAlias(node), vni, p.Task, p.IfName, p.NetNS)
}

func legAlias(node weft.ID, vni uint32, name string) string {
	return fmt.Sprintf("%s v1 ebpf %d leg %s", weft.LinkAlias(node), vni, name)
}

func uplinkAlias(node weft.ID, vni uint32) string {
	return fmt.Sprintf("%s v1 ebpf %d uplink", weft.LinkAlias(node), vni)
}

func parseAlias(node weft.ID, s string) (owned, bool) {
	f := strings.SplitN(s, " ", 8)
	if len(f) < 5 || f[0] != weft.LinkAlias(node) || f[1] != "v1" || f[2] != "ebpf" {
		return owned{}, false
	}
	vni, err := strconv.ParseUint(f[3], 10, 32)
	if err != nil {
		return owned{}, false
	}
	o := owned{vni: uint32(vni)}
	switch {
	case f[4] == "leg" && len(f) == 6 && f[5] != "":
		o.leg = f[5]
	case f[4] == "port" && len(f) == 8 && f[5] != "" && f[6] != "" && f[7] != "":
		o.port = vxlan.Port{Task: weft.ID(f[5]), IfName: f[6], NetNS: f[7]}
	case f[4] == "uplink" && len(f) == 5:
		o.isUplink = true
	default:
		return owned{}, false
	}
	return o, true
}

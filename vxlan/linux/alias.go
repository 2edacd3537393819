package linux

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Links remember in their ifalias what the kernel has no field for. The format
// outlives the process and carries its version:
//
//	bridge  weft:<node> v1 net <network id> <subnet>,<subnet>…
//	port    weft:<node> v1 port <task id> <if name> <namespace path>
//
// An alias of another version is not understood, so the object is remade.

// maxAlias is IFALIASZ - 1 (linux/if.h).
const maxAlias = 255

func networkAlias(node weft.ID, n vxlan.Network) (string, error) {
	subnets := make([]string, len(n.Subnets))
	for i, p := range n.Subnets {
		subnets[i] = p.String()
	}
	s := strings.TrimSuffix(fmt.Sprintf("%s v1 net %s %s", weft.LinkAlias(node), n.ID, strings.Join(subnets, ",")), " ")
	return s, aliasFits(s)
}

func parseNetworkAlias(node weft.ID, s string) (id weft.ID, subnets []netip.Prefix, ok bool) {
	f := strings.Split(s, " ")
	if len(f) < 4 || len(f) > 5 || f[0] != weft.LinkAlias(node) || f[1] != "v1" || f[2] != "net" || f[3] == "" {
		return "", nil, false
	}
	if len(f) == 5 {
		for _, t := range strings.Split(f[4], ",") {
			p, err := netip.ParsePrefix(t)
			if err != nil {
				return "", nil, false
			}
			subnets = append(subnets, p)
		}
	}
	return weft.ID(f[3]), subnets, true
}

func portAlias(node weft.ID, p vxlan.Port) (string, error) {
	s := fmt.Sprintf("%s v1 port %s %s %s", weft.LinkAlias(node), p.Task, p.IfName, p.NetNS)
	return s, aliasFits(s)
}

func parsePortAlias(node weft.ID, s string) (vxlan.Port, bool) {
	f := strings.SplitN(s, " ", 6)
	if len(f) != 6 || f[0] != weft.LinkAlias(node) || f[1] != "v1" || f[2] != "port" || f[3] == "" || f[4] == "" || f[5] == "" {
		return vxlan.Port{}, false
	}
	return vxlan.Port{Task: weft.ID(f[3]), IfName: f[4], NetNS: f[5]}, true
}

func aliasFits(s string) error {
	if len(s) > maxAlias {
		return fmt.Errorf("link alias of %d bytes, the kernel holds %d: use a shorter --exec-root or fewer subnets: %w", len(s), maxAlias, weft.ErrInvalid)
	}
	return nil
}

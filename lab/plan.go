package lab

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
)

// Our own choices.
const (
	// DefaultName of a lab when none is given.
	DefaultName = "lab"
	// DefaultHosts is what the story of the README needs.
	DefaultHosts = 3
	// DefaultMTU of every link, in bytes, as on plain Ethernet.
	DefaultMTU = 1500
	// MaxHosts leaves the top of the /24 to the switch.
	MaxHosts = 200
	// minMTU is the smallest link MTU of IPv6 (RFC 8200 section 5).
	minMTU = 1280
	// maxMTU of a veth device (ETH_MAX_MTU, linux/if_ether.h).
	maxMTU = 65535

	clientName = "client"
	switchName = "switch"
	hostLink   = "eth0"
	clientPort = "client"
)

// Underlays of a lab.
const (
	// UnderlayIPv4: daemons advertise IPv4; hosts have IPv6 addresses, too.
	UnderlayIPv4 = "ipv4"
	// UnderlayIPv6: hosts have no IPv4 address at all.
	UnderlayIPv6 = "ipv6"
)

// linkGate is the switch as hosts see it over IPv6, on every link.
var linkGate = netip.MustParseAddr("fe80::1")

// ClientAddr is the outside client: it belongs to no cluster and is routed to
// every host (TEST-NET-2, RFC 5737; over IPv6 RFC 3849's range).
var (
	ClientAddr6  = netip.MustParseAddr("2001:db8:64::7")
	ClientAddr   = netip.MustParseAddr("198.51.100.7")
	clientSubnet = netip.MustParsePrefix("198.51.100.0/24")
	clientGate   = netip.MustParseAddr("198.51.100.1")
)

// nameForm is short because the containers' sockets lie below
// /run/weft/lab/NAME/HOST and a socket's path has 108 bytes (unix(7)): a daemon
// refuses a run folder of more than 29.
var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?$`)

// Host is one host of a lab: "h1", "h2", …
type Host struct {
	Index int // from 1
	Name  string
	Addr  netip.Addr // of the underlay: what its daemon advertises
	Addr6 netip.Addr // of IPv6; the same as Addr on an IPv6 underlay
	MAC   net.HardwareAddr
	Paths HostPaths
}

// HostPaths are the files of one host.
type HostPaths struct {
	DataRoot string // survives a power cut
	ExecRoot string // does not: like /run of a real machine
	Socket   string // the daemon's API
	Log      string // what the daemon writes to stdout and stderr
	PIDFile  string
	NetNS    string // namespace file
	Down     string // exists while the host was killed and not started again
}

// plan is every name and address of a lab: a pure function of the
// configuration, so that any process finds the same lab.
type plan struct {
	name    string
	runDir  string // of this lab
	dataDir string
	subnet  netip.Prefix
	subnet6 netip.Prefix
}

func newPlan(name, runBase, dataBase string) (plan, error) {
	if !nameForm.MatchString(name) {
		return plan{}, fmt.Errorf("lab name %q: want 1 to 10 characters of a-z, 0-9 and inner '-': %w", name, weft.ErrInvalid)
	}
	for _, dir := range []string{runBase, dataBase} {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) == "/" {
			return plan{}, fmt.Errorf("lab folder %q: want an absolute path below /: %w", dir, weft.ErrInvalid)
		}
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	// 10.99.1.0/24 to 10.99.254.0/24. Two labs with the same third byte are
	// no clash: their namespaces never meet. It only helps people to tell
	// captures of two labs apart.
	third := byte(h.Sum32()%254) + 1
	return plan{
		name:    name,
		runDir:  filepath.Join(runBase, name),
		dataDir: filepath.Join(dataBase, name),
		subnet:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, third, 0}), 24),
		subnet6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 7: third}), 64),
	}, nil
}

func (p plan) addr(last byte) netip.Addr {
	b := p.subnet.Addr().As4()
	b[3] = last
	return netip.AddrFrom4(b)
}

func (p plan) addr6(last byte) netip.Addr {
	b := p.subnet6.Addr().As16()
	b[15] = last
	return netip.AddrFrom16(b)
}

// gateway is the switch as the hosts see it over IPv4.
func (p plan) gateway() netip.Addr { return p.addr(254) }

func (p plan) host(index int) Host {
	name := "h" + strconv.Itoa(index)
	b := p.subnet.Addr().As4()
	return Host{
		Index: index,
		Name:  name,
		Addr:  p.addr(byte(index)),
		Addr6: p.addr6(byte(index)),
		// Locally administered (IEEE 802, bit 1 of the first byte).
		MAC: net.HardwareAddr{0x02, 'w', 'l', b[2], 0, byte(index)},
		Paths: HostPaths{
			DataRoot: filepath.Join(p.dataDir, name),
			ExecRoot: filepath.Join(p.runDir, name),
			Socket:   filepath.Join(p.runDir, name, "weft.sock"),
			Log:      filepath.Join(p.dataDir, name+".log"),
			PIDFile:  filepath.Join(p.runDir, name+".pid"),
			NetNS:    p.netnsFile(name),
			Down:     filepath.Join(p.runDir, name+".down"),
		},
	}
}

func (p plan) hosts(n int) []Host {
	var hs []Host
	for i := 1; i <= n; i++ {
		hs = append(hs, p.host(i))
	}
	return hs
}

func (p plan) netnsFile(name string) string { return filepath.Join(p.runDir, "netns", name) }
func (p plan) resolvConf() string           { return filepath.Join(p.runDir, "resolv.conf") }
func (p plan) recordFile() string           { return filepath.Join(p.dataDir, "lab.json") }

// portName is the switch's end of a host's link.
func portName(index int) string { return "port" + strconv.Itoa(index) }

// parseHost turns "h2" into 2.
func parseHost(name string, hosts int) (int, error) {
	digits, ok := strings.CutPrefix(name, "h")
	i, err := strconv.Atoi(digits)
	if !ok || err != nil || strconv.Itoa(i) != digits || i < 1 {
		return 0, fmt.Errorf("host %q: want h1 to h%d: %w", name, hosts, weft.ErrInvalid)
	}
	if i > hosts {
		return 0, fmt.Errorf("host %q: this lab has h1 to h%d: %w", name, hosts, weft.ErrNotFound)
	}
	return i, nil
}

// Spec is what `up` is asked for. A zero field means: as the lab already is,
// or the default for a new one.
type Spec struct {
	Hosts    int // 1 to MaxHosts; an existing lab may only grow
	Managers int // 1, 3, 5 or 7, at most Hosts; fixed when the lab is made
	MTU      int // bytes of every link, minMTU to maxMTU; fixed when the lab is made
	// OverlayEngine and ServiceEngine go to the daemons as they are; "" lets
	// each daemon choose by its own probe.
	OverlayEngine string
	ServiceEngine string
	// Underlay is UnderlayIPv4 or UnderlayIPv6; fixed when the lab is made.
	Underlay string
	// EncryptionEngine likewise.
	EncryptionEngine string
}

// recordVersion of lab.json. A reader refuses other versions.
const recordVersion = 1

// record is the lab on disk: what must survive a reboot of the machine.
type record struct {
	Version       int                `json:"version"`
	Hosts         int                `json:"hosts"`
	Managers      int                `json:"managers"`
	MTU           int                `json:"mtu"`
	OverlayEngine string             `json:"overlayEngine,omitempty"`
	ServiceEngine string             `json:"serviceEngine,omitempty"`
	CryptEngine   string             `json:"encryptionEngine,omitempty"`
	Underlay      string             `json:"underlay,omitempty"` // "" = UnderlayIPv4
	Nodes         map[string]weft.ID `json:"nodes,omitempty"`    // host name to node id, once it is a member
	HostMTU       map[string]int     `json:"hostMTU,omitempty"`
	// HostEngines are what Start was told for one host, in place of the lab's.
	HostEngines map[string]HostEngines `json:"hostEngines,omitempty"`
}

// HostEngines are a host's own engines, as words of the daemon's flags. "" leaves
// what the host had, AnyEngine leaves the choice to its daemon.
type HostEngines struct {
	Overlay string `json:"overlay,omitempty"`
	Service string `json:"service,omitempty"`
}

// AnyEngine forces none.
const AnyEngine = "any"

// engines are the engines of a host, as words of the daemon's flags; "" = none
// is forced.
func (r record) engines(host string) (overlay, service string) {
	e := r.HostEngines[host]
	overlay, service = or(e.Overlay, r.OverlayEngine), or(e.Service, r.ServiceEngine)
	if overlay == AnyEngine {
		overlay = ""
	}
	if service == AnyEngine {
		service = ""
	}
	return overlay, service
}

// withEngines notes what a host was told; "" changes nothing.
func (r record) withEngines(host string, e HostEngines) record {
	if e == (HostEngines{}) {
		return r
	}
	old := r.HostEngines[host]
	r.HostEngines = maps.Clone(r.HostEngines)
	if r.HostEngines == nil {
		r.HostEngines = map[string]HostEngines{}
	}
	r.HostEngines[host] = HostEngines{Overlay: or(e.Overlay, old.Overlay), Service: or(e.Service, old.Service)}
	return r
}

func (r record) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

func decodeRecord(b []byte) (record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("decode lab record: %w", err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("lab record has version %d, this weft knows %d: remove the lab with the weft that made it: %w", r.Version, recordVersion, weft.ErrUnsupported)
	}
	if err := r.validate(); err != nil {
		return record{}, err
	}
	return r, nil
}

func (r record) validate() error {
	switch {
	case r.Hosts < 1 || r.Hosts > MaxHosts:
		return fmt.Errorf("hosts %d: want 1 to %d: %w", r.Hosts, MaxHosts, weft.ErrInvalid)
	case !slices.Contains([]int{1, 3, 5, 7}, r.Managers):
		return fmt.Errorf("managers %d: want 1, 3, 5 or 7 (an even number survives no more failures than the odd one below it): %w", r.Managers, weft.ErrInvalid)
	case r.Managers > r.Hosts:
		return fmt.Errorf("managers %d: the lab has only %d hosts: %w", r.Managers, r.Hosts, weft.ErrInvalid)
	case r.MTU < minMTU || r.MTU > maxMTU:
		return fmt.Errorf("mtu %d: want %d to %d bytes: %w", r.MTU, minMTU, maxMTU, weft.ErrInvalid)
	case !slices.Contains([]string{"", UnderlayIPv4, UnderlayIPv6}, r.Underlay):
		return fmt.Errorf("underlay %q: want %s or %s: %w", r.Underlay, UnderlayIPv4, UnderlayIPv6, weft.ErrInvalid)
	}
	return nil
}

// only6 reports whether the lab has no IPv4.
func (r record) only6() bool { return r.Underlay == UnderlayIPv6 }

// hosts are the lab's hosts with the address of its underlay.
func (r record) hosts(p plan) []Host {
	hs := p.hosts(r.Hosts)
	for i := range hs {
		if r.only6() {
			hs[i].Addr = hs[i].Addr6
		}
	}
	return hs
}

// merge applies a Spec to what is there (nil for a new lab). It refuses every
// change that cannot be honoured on a running lab.
func merge(old *record, s Spec) (record, error) {
	if old == nil {
		r := record{
			Version: recordVersion, Hosts: or(s.Hosts, DefaultHosts), Managers: or(s.Managers, 1), MTU: or(s.MTU, DefaultMTU),
			OverlayEngine: s.OverlayEngine, ServiceEngine: s.ServiceEngine, CryptEngine: s.EncryptionEngine, Underlay: s.Underlay,
		}
		return r, r.validate()
	}
	r := *old
	fixed := func(what string, asked, is any) error {
		return fmt.Errorf("%s %v: the lab was made with %v; take it down first: %w", what, asked, is, weft.ErrConflict)
	}
	switch {
	case s.Hosts != 0 && s.Hosts < r.Hosts:
		return record{}, fmt.Errorf("hosts %d: the lab has %d and can only grow; take it down first: %w", s.Hosts, r.Hosts, weft.ErrConflict)
	case s.Managers != 0 && s.Managers != r.Managers:
		return record{}, fixed("managers", s.Managers, r.Managers)
	case s.MTU != 0 && s.MTU != r.MTU:
		return record{}, fixed("mtu", s.MTU, r.MTU)
	case s.OverlayEngine != "" && s.OverlayEngine != r.OverlayEngine:
		return record{}, fixed("overlay-engine", s.OverlayEngine, or(r.OverlayEngine, "the daemon's choice"))
	case s.ServiceEngine != "" && s.ServiceEngine != r.ServiceEngine:
		return record{}, fixed("service-engine", s.ServiceEngine, or(r.ServiceEngine, "the daemon's choice"))
	case s.Underlay != "" && s.Underlay != or(r.Underlay, UnderlayIPv4):
		return record{}, fixed("underlay", s.Underlay, or(r.Underlay, UnderlayIPv4))
	case s.EncryptionEngine != "" && s.EncryptionEngine != r.CryptEngine:
		return record{}, fixed("encryption-engine", s.EncryptionEngine, or(r.CryptEngine, "the daemon's choice"))
	}
	r.Hosts = max(r.Hosts, s.Hosts)
	return r, r.validate()
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

package wg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// The engines, by the names under which they can be forced. None refuses every
// encrypted network.
const (
	EngineKernel = "kernel"
	EngineUser   = "user"
	EngineNone   = "none"
)

// Config of an Engine.
type Config struct {
	Node weft.ID
	// NetNSDir is the folder of namespace files, that of Overlay.
	NetNSDir string
	// RunDir is for the child's sockets and log; it must fit a socket's path
	// (108 bytes, unix(7)). Gone at reboot, as the child is.
	RunDir string
	// KeyFile holds the private keys; it outlives a reboot.
	KeyFile string
	// Port is the UDP port of slot 0, slot 1 has the one after it; 0 is
	// weft.WireGuardPort.
	Port uint16
	// Engine forces one of the engines; "" is the first that can be made.
	Engine string
	// Overlay makes the networks, but for what encrypted ones need behind
	// their uplink. Required.
	Overlay vxlan.Kernel
	// Log gets what was chosen and repaired. Required.
	Log *slog.Logger
}

// Engine is a vxlan.Kernel that can also make encrypted networks. Without
// WireGuard on this host it refuses those by name and makes the others.
type Engine struct {
	cfg     Config
	keys    keys
	driver  driver // nil: no engine
	reason  error  // why there is none
	choices []weft.EngineChoice
}

var _ vxlan.Kernel = (*Engine)(nil)

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Engine, error) {
	switch {
	case cfg.Node == "" || cfg.NetNSDir == "" || cfg.RunDir == "" || cfg.KeyFile == "" || cfg.Overlay == nil || cfg.Log == nil:
		return nil, fmt.Errorf("configure encryption: node, folders, key file, overlay engine and log are needed: %w", weft.ErrInvalid)
	case cfg.Engine != "" && cfg.Engine != EngineKernel && cfg.Engine != EngineUser && cfg.Engine != EngineNone:
		return nil, fmt.Errorf("configure encryption: engine %q is not %s, %s or %s: %w", cfg.Engine, EngineKernel, EngineUser, EngineNone, weft.ErrInvalid)
	}
	if cfg.Port == 0 {
		cfg.Port = weft.WireGuardPort
	}
	if cfg.Port == math.MaxUint16 {
		return nil, fmt.Errorf("configure encryption: port %d has none after it, and two are needed: %w", cfg.Port, weft.ErrInvalid)
	}
	return &Engine{cfg: cfg, keys: keys{path: cfg.KeyFile}, reason: errors.New("no engine was looked for")}, nil
}

// Probe chooses the engine by making a device for real in a scratch namespace,
// the kernel's first. It is called once, before anything else. That a forced
// engine cannot be made is an error that says why; that none can be is not.
func (e *Engine) Probe(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	var reasons []error
	for _, c := range []struct {
		name  string
		probe func(string) error
		make  func() driver
	}{
		{EngineKernel, probeKernel, func() driver { return &kernelDriver{} }},
		{EngineUser, probeUser, func() driver { return newUserDriver(e.cfg.RunDir, exe, e.cfg.Log) }},
	} {
		choice := weft.EngineChoice{Kind: "encryption", Engine: c.name}
		switch {
		case e.driver != nil:
			choice.Reason = "a faster one was found"
		case e.cfg.Engine != "" && e.cfg.Engine != c.name:
			choice.Reason = "--encryption-engine is " + e.cfg.Engine
			reasons = append(reasons, fmt.Errorf("%s: %s", c.name, choice.Reason))
		default:
			if err := c.probe(e.cfg.NetNSDir); err != nil {
				choice.Reason = err.Error()
				reasons = append(reasons, fmt.Errorf("%s: %w", c.name, err))
				break
			}
			e.driver, choice.Chosen, choice.Reason = c.make(), true, "its probe succeeded"
			e.cfg.Log.Info("encryption engine chosen", weft.KeyEngine, c.name)
		}
		e.choices = append(e.choices, choice)
	}
	if e.driver != nil {
		return nil
	}
	e.reason = errors.Join(reasons...)
	if e.cfg.Engine == EngineKernel || e.cfg.Engine == EngineUser {
		return fmt.Errorf("--encryption-engine %s: %w", e.cfg.Engine, e.reason)
	}
	e.cfg.Log.Warn("no encryption engine: encrypted networks are refused on this node", weft.KeyErr, e.reason)
	return nil
}

// Choices are the verdicts of Probe on each engine.
func (e *Engine) Choices() []weft.EngineChoice { return e.choices }

// Keys returns the public halves of this node's keys, made for the epoch if it
// is new; none without an engine. Safe to call while Apply runs.
func (e *Engine) Keys(epoch uint64) ([]weft.NodeKey, error) {
	if e.driver == nil {
		return nil, nil
	}
	ring, err := e.keys.ensure(epoch)
	if err != nil {
		return nil, err
	}
	return ring.public(e.cfg.Port)
}

// Read implements vxlan.Kernel.
func (e *Engine) Read(ctx context.Context) (vxlan.State, error) { return e.cfg.Overlay.Read(ctx) }

// plainOf is the state without its encrypted networks.
func plainOf(st vxlan.State) vxlan.State {
	out := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for vni, n := range st.Networks {
		if !n.Encrypted {
			out.Networks[vni] = n
		}
	}
	return out
}

// Apply implements vxlan.Kernel. The namespace of the devices is there before
// the networks' uplinks lead into it, and what is behind them after.
func (e *Engine) Apply(ctx context.Context, want vxlan.State) error {
	encrypted := encryptedVNIs(want)
	if len(encrypted) == 0 {
		return errors.Join(e.cfg.Overlay.Apply(ctx, want), e.clear(ctx))
	}
	if e.driver == nil {
		err := fmt.Errorf("the network is encrypted and this node has no WireGuard: %w: %w", e.reason, weft.ErrUnsupported)
		return errors.Join(e.cfg.Overlay.Apply(ctx, plainOf(want)), ofEach(encrypted, err))
	}
	err := e.prepare(ctx, want)
	networks := e.cfg.Overlay.Apply(ctx, want)
	if err == nil {
		err = e.lead(ctx, want)
	}
	return errors.Join(networks, ofEach(encrypted, err))
}

func encryptedVNIs(st vxlan.State) []uint32 {
	var out []uint32
	for vni, n := range st.Networks {
		if n.Encrypted {
			out = append(out, vni)
		}
	}
	return out
}

// ofEach says of an error which networks it concerns; nil stays nil.
func ofEach(vnis []uint32, err error) error {
	if err == nil {
		return nil
	}
	var all []error
	for _, vni := range vnis {
		all = append(all, &vxlan.NetworkError{VNI: vni, Err: fmt.Errorf("encrypt network %d: %w", vni, err)})
	}
	return errors.Join(all...)
}

func (e *Engine) path() string {
	return filepath.Join(e.cfg.NetNSDir, weft.CryptNetNS(e.cfg.Node))
}

// prepare makes the namespace with its devices and gives those their keys and
// peers, before they are up or anything leads to them.
func (e *Engine) prepare(ctx context.Context, want vxlan.State) error {
	path, err := netns.Create(e.cfg.NetNSDir, weft.CryptNetNS(e.cfg.Node))
	if err != nil {
		return err
	}
	c, err := openCrypt(path)
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.sysctls(); err != nil {
		return err
	}
	return e.driver.ensure(ctx, path, e.cfg.Port)
}

// lead writes keys, peers and routes.
func (e *Engine) lead(ctx context.Context, want vxlan.State) error {
	ring, err := e.keys.ensure(want.Encryption.Epoch)
	if err != nil {
		return err
	}
	have, err := e.configure(ctx, want, ring)
	if err != nil {
		return err
	}
	c, err := openCrypt(e.path())
	if err != nil {
		return err
	}
	defer c.close()
	return c.apply(derivePaths(want, choose(want, ring, have)))
}

// configure makes both devices as wanted and returns what they hold then.
func (e *Engine) configure(ctx context.Context, want vxlan.State, ring keyring) ([weft.KeySlots]device, error) {
	var have [weft.KeySlots]device
	for slot := range have {
		var err error
		if have[slot], err = e.driver.read(ctx, slot); err != nil {
			return have, err
		}
	}
	for slot, w := range wanted(want, ring, e.cfg.Port, have) {
		h, err := have[slot], error(nil)
		if c := diff(h, w, time.Now()); !c.empty() {
			if err := e.driver.write(ctx, slot, c); err != nil {
				return have, err
			}
			if h, err = e.driver.read(ctx, slot); err != nil {
				return have, err
			}
		}
		have[slot] = h
	}
	return have, nil
}

// clear removes what encrypted networks needed, after the last of them.
func (e *Engine) clear(ctx context.Context) error {
	ns, err := netns.Open(e.path())
	if errors.Is(err, weft.ErrNotFound) {
		return netns.Remove(e.path()) // the rest of a crash
	}
	if err != nil {
		return err
	}
	if err := ns.Close(); err != nil {
		return err
	}
	if e.driver != nil {
		if err := e.driver.remove(ctx); err != nil {
			return err
		}
	}
	return netns.Remove(e.path())
}

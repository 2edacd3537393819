package api

import (
	"context"
	"io"
	"net/http"
	"runtime"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"github.com/weftnet/weft"
)

func (s *Server) systemRoutes(add adder) {
	add("GET", "/_ping", s.ping)
	add("HEAD", "/_ping", s.ping)
	add("GET", "/version", s.version)
	add("GET", "/info", s.info)
}

// ping must answer at once and without the cluster: a client that waits two
// seconds for it goes on with a version we do not serve.
func (s *Server) ping(c *call) error {
	h := c.w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	local := s.cfg.Swarm.Local()
	state := string(local.State)
	if local.State == weft.LocalActive {
		state += "/worker"
		if local.Manager {
			state = "active/manager"
		}
	}
	h.Set("Swarm", state)
	if c.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return c.status(http.StatusOK)
	}
	_, _ = io.WriteString(c.w, "OK") // the client has gone
	return nil
}

func (s *Server) version(c *call) error {
	d := s.cfg.Swarm.Local().Description
	return c.json(system.VersionResponse{
		Platform:   system.PlatformInfo{Name: "weft"},
		Version:    s.cfg.Version,
		APIVersion: maxVersion.String(), MinAPIVersion: minVersion.String(),
		Os: "linux", Arch: runtime.GOARCH, GoVersion: runtime.Version(), KernelVersion: d.Kernel,
		Components: []system.ComponentVersion{{
			Name: "Engine", Version: s.cfg.Version,
			Details: map[string]string{
				"ApiVersion": maxVersion.String(), "MinAPIVersion": minVersion.String(),
				"Os": "linux", "Arch": runtime.GOARCH, "GoVersion": runtime.Version(), "KernelVersion": d.Kernel,
			},
		}},
	})
}

// infoTimeout bounds what info asks of the cluster; without an answer the
// node's own view is shown. Docker's clients call info before most commands.
const infoTimeout = 500 * time.Millisecond

func (s *Server) info(c *call) error {
	local := s.cfg.Swarm.Local()
	d := &local.Description
	out := system.Info{
		ID: string(local.Node), Name: d.Hostname, ServerVersion: s.cfg.Version,
		Driver: "overlayfs", DriverStatus: [][2]string{},
		Plugins:     system.PluginsInfo{Volume: []string{"local"}, Network: []string{weft.DriverOverlay}, Authorization: []string{}, Log: []string{"json-file"}},
		MemoryLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, IPv4Forwarding: true,
		SystemTime: time.Now().Format(time.RFC3339Nano), LoggingDriver: "json-file", CgroupDriver: "cgroupfs",
		KernelVersion: d.Kernel, OSType: "linux", OperatingSystem: "linux", Architecture: d.Arch,
		NCPU: int(d.NanoCPUs / 1e9), MemTotal: d.MemoryBytes, DockerRootDir: local.DataRoot,
		NGoroutines: runtime.NumGoroutine(), Labels: []string{}, SecurityOptions: []string{"name=seccomp,profile=builtin"},
		Runtimes:       map[string]system.RuntimeWithStatus{"runc": {Runtime: system.Runtime{Path: "runc"}}},
		DefaultRuntime: "runc", Isolation: container.IsolationEmpty, CDISpecDirs: []string{}, Warnings: []string{},
	}
	for _, e := range local.Engines {
		verdict := "refused: " + e.Reason
		if e.Chosen {
			verdict = "chosen: " + e.Reason
		}
		out.DriverStatus = append(out.DriverStatus, [2]string{e.Kind + " engine " + e.Engine, verdict})
	}
	if err := s.countLocal(c.Context(), &out); err != nil {
		out.Warnings = append(out.Warnings, "WARNING: "+messageOf(err))
	}
	out.Swarm = s.swarmInfo(c.Context(), &local)
	return c.json(out)
}

// countLocal fills in what this node has.
func (s *Server) countLocal(ctx context.Context, out *system.Info) error {
	cts, err := s.cfg.Containers.Containers(ctx)
	if err != nil {
		return err
	}
	out.Containers = len(cts)
	for i := range cts {
		if cts[i].State.Status == running {
			out.ContainersRunning++
		} else {
			out.ContainersStopped++
		}
	}
	imgs, err := s.cfg.Images.Images(ctx)
	out.Images = len(imgs)
	return err
}

func (s *Server) swarmInfo(ctx context.Context, local *weft.LocalInfo) swarm.Info {
	out := swarm.Info{
		NodeID: string(local.Node), LocalNodeState: swarm.LocalNodeState(local.State),
		ControlAvailable: local.Manager && local.State == weft.LocalActive, Error: local.Error,
		RemoteManagers: []swarm.Peer{},
	}
	if local.Addr.IsValid() {
		out.NodeAddr = local.Addr.String()
	}
	for _, m := range local.Managers {
		out.RemoteManagers = append(out.RemoteManagers, swarm.Peer{Addr: m.String()})
	}
	if !out.ControlAvailable {
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	nodes, err := s.cfg.Nodes.Nodes(ctx)
	if err != nil {
		out.Warnings = append(out.Warnings, messageOf(err))
		return out
	}
	out.Nodes = len(nodes)
	for i := range nodes {
		if m := nodes[i].Manager; m != nil {
			out.Managers++
			for j := range out.RemoteManagers {
				if m.Addr.String() == out.RemoteManagers[j].Addr {
					out.RemoteManagers[j].NodeID = string(nodes[i].ID)
				}
			}
		}
	}
	if cl, err := s.cfg.Swarm.Cluster(ctx); err == nil {
		if info, err := dockerCluster(&cl); err == nil {
			out.Cluster = &info
		}
	} else {
		out.Warnings = append(out.Warnings, messageOf(err))
	}
	return out
}

package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/weftnet/weft"
)

func (s *Server) containerRoutes(add adder) {
	add("GET", "/containers/json", s.containerList)
	add("GET", "/containers/{name}/json", s.containerInspect)
	add("GET", "/containers/{name}/logs", s.containerLogs)
	add("POST", "/containers/{name}/stop", s.containerStop)
	add("POST", "/containers/{name}/kill", s.containerKill)
	add("POST", "/containers/{name}/wait", s.containerWait)
	add("DELETE", "/containers/{name}", s.containerRemove)
	add("POST", "/containers/{name}/exec", s.execCreate)
	add("POST", "/exec/{id}/start", s.execStart)
	add("POST", "/exec/{id}/resize", s.execResize)
	add("GET", "/exec/{id}/json", s.execInspect)
}

const running = "running"

func (s *Server) containerList(c *call) error {
	f, err := c.filters("id", "name", "label", "status", "network", "ancestor", "is-task", "exited", "health")
	if err != nil {
		return err
	}
	if err := f.oneOf("status", "created", "running", "paused", "restarting", "removing", "exited", "dead"); err != nil {
		return err
	}
	if err := f.oneOf("health", "none", "starting", "healthy", "unhealthy"); err != nil {
		return err
	}
	isTask, hasTask, err := f.flag("is-task")
	if err != nil {
		return err
	}
	if c.bool("size") {
		return unsupportedf("size: the sizes of containers are not measured yet")
	}
	limit := -1
	if text := c.query.Get("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			return invalidf("limit: %q is not a number", text)
		}
	}
	all, err := s.cfg.Containers.Containers(c.Context())
	if err != nil {
		return err
	}
	slices.SortStableFunc(all, func(a, b weft.Container) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	// Docker shows ended containers only when something asks for them.
	showAll := c.bool("all") || limit > 0 || f["status"] != nil || f["exited"] != nil
	images, err := s.cfg.Images.Images(c.Context())
	if err != nil {
		return err
	}
	out := []container.Summary{}
	now := time.Now()
	for i := range all {
		ct := &all[i]
		if (!showAll && ct.State.Status != running) || (hasTask && isTask != (ct.Task != "")) || !keepContainer(f, ct) {
			continue
		}
		if limit > 0 && len(out) == limit {
			break
		}
		out = append(out, containerSummary(ct, imageID(images, ct.Image), now))
	}
	return c.json(out)
}

// imageID finds the id of an image by the name that a container was made
// with; "" when the image is gone. The docker command prints nonsense when the
// name stands in place of the id.
func imageID(images []weft.Image, ref string) string {
	for i := range images {
		img := &images[i]
		if slices.ContainsFunc(append(slices.Clone(img.Tags), img.Digests...), func(n string) bool { return sameImage(n, ref) }) {
			return img.ID
		}
	}
	return ""
}

func keepContainer(f filters, ct *weft.Container) bool {
	networks := []string{}
	for name, a := range ct.Networks {
		networks = append(networks, name, string(a.Network))
	}
	_, byNetwork := f["network"]
	exited := f["exited"] == nil || (ct.State.Status != running && f.has("exited", strconv.Itoa(ct.State.ExitCode)))
	return f.prefix("id", ct.ID) && f.matches("name", ct.Name) && f.labels("label", ct.Labels) &&
		f.has("status", string(dockerState(ct.State.Status))) && f.has("health", healthWord(&ct.State.Health)) && exited &&
		(f["ancestor"] == nil || slices.ContainsFunc(f["ancestor"], func(a string) bool { return sameImage(a, ct.Image) })) &&
		(!byNetwork || slices.ContainsFunc(networks, func(n string) bool { return f.has("network", n) }))
}

// dockerState: Docker has no word for a container whose exit nobody saw.
func dockerState(status string) container.ContainerState {
	if status == "lost" {
		return container.StateDead
	}
	return container.ContainerState(status)
}

// statusText is the STATUS column of `docker ps`.
func statusText(st *weft.ContainerState, now time.Time) string {
	switch st.Status {
	case running:
		return "Up " + units.HumanDuration(now.Sub(st.StartedAt)) + healthText(&st.Health)
	case "exited":
		return fmt.Sprintf("Exited (%d) %s ago", st.ExitCode, units.HumanDuration(now.Sub(st.FinishedAt)))
	case "lost":
		return "Dead"
	default:
		return "Created"
	}
}

func containerSummary(ct *weft.Container, imageID string, now time.Time) container.Summary {
	out := container.Summary{
		ID: ct.ID, Names: []string{"/" + ct.Name}, Image: ct.Image, ImageID: imageID,
		Command: strings.Join(ct.Command, " "), Created: ct.Created.Unix(),
		Ports: containerPorts(ct), Labels: orEmpty(ct.Labels),
		State: dockerState(ct.State.Status), Status: statusText(&ct.State, now),
		Health:          &container.HealthSummary{Status: container.HealthStatus(healthWord(&ct.State.Health)), FailingStreak: ct.State.Health.FailingStreak},
		NetworkSettings: &container.NetworkSettingsSummary{Networks: containerNetworks(ct)},
		Mounts:          containerMounts(ct),
	}
	out.HostConfig.NetworkMode = "default"
	return out
}

func containerNetworks(ct *weft.Container) map[string]*network.EndpointSettings {
	out := map[string]*network.EndpointSettings{}
	for name, a := range ct.Networks {
		e := &network.EndpointSettings{NetworkID: string(a.Network), EndpointID: endpointID(ct.Task, a.Network)}
		if a.Addr.IsValid() {
			if v4, v6 := byFamily(a); v4.IsValid() {
				e.IPAddress, e.IPPrefixLen = v4.Addr(), v4.Bits()
				e.GlobalIPv6Address, e.GlobalIPv6PrefixLen = v6.Addr(), max(v6.Bits(), 0)
			} else {
				e.GlobalIPv6Address, e.GlobalIPv6PrefixLen = v6.Addr(), v6.Bits()
			}
			e.MacAddress = network.HardwareAddr(weft.EndpointMAC(ct.Task, a.Addr.Addr()))
		}
		out[name] = e
	}
	return out
}

func containerMounts(ct *weft.Container) []container.MountPoint {
	out := []container.MountPoint{}
	for _, m := range ct.Spec.Mounts {
		p := container.MountPoint{Type: mount.Type(m.Type), Destination: m.Target, RW: !m.ReadOnly}
		switch m.Type {
		case weft.MountVolume:
			p.Name, p.Driver = m.Source, "local"
		case weft.MountBind:
			p.Source, p.Propagation = m.Source, mount.PropagationRPrivate
		}
		out = append(out, p)
	}
	return out
}

func (s *Server) containerInspect(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if c.bool("size") {
		return unsupportedf("size: the sizes of containers are not measured yet")
	}
	images, err := s.cfg.Images.Images(c.Context())
	if err != nil {
		return err
	}
	out := inspectContainer(&ct, s.execs.of(ct.ID))
	out.Image = imageID(images, ct.Image)
	return c.json(out)
}

func inspectContainer(ct *weft.Container, execs []string) container.InspectResponse {
	st := &ct.State
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }
	grace := int(ct.Spec.StopGrace / time.Second)
	out := container.InspectResponse{
		ID: ct.ID, Created: stamp(ct.Created), Args: []string{}, LogPath: ct.LogPath,
		Name: "/" + ct.Name, Driver: "overlayfs", Platform: "linux", ExecIDs: execs,
		State: &container.State{
			Status: dockerState(st.Status), Running: st.Status == running, Dead: st.Status == "lost",
			OOMKilled: st.OOMKilled, Pid: st.PID, ExitCode: st.ExitCode, Error: st.Error,
			StartedAt: stamp(st.StartedAt), FinishedAt: stamp(st.FinishedAt), Health: dockerHealth(&st.Health),
		},
		HostConfig: &container.HostConfig{
			LogConfig: container.LogConfig{Type: "json-file", Config: map[string]string{}}, NetworkMode: "default",
			Resources:      container.Resources{Memory: ct.Limits.MemoryBytes, NanoCPUs: ct.Limits.NanoCPUs},
			ReadonlyRootfs: ct.Spec.ReadOnly, RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
		},
		Mounts: containerMounts(ct),
		Config: &container.Config{
			Hostname: ct.Spec.Hostname, User: ct.Spec.User, Tty: ct.Spec.TTY, Env: ct.Spec.Env, Cmd: ct.Spec.Args,
			Image: ct.Image, WorkingDir: ct.Spec.Dir, Entrypoint: ct.Spec.Entrypoint, Labels: orEmpty(ct.Labels),
			StopSignal: ct.Spec.StopSignal, StopTimeout: &grace, Healthcheck: dockerHealthCheck(ct.Spec.Health),
		},
		NetworkSettings: &container.NetworkSettings{Ports: portMap(ct), Networks: containerNetworks(ct)},
	}
	if len(ct.Command) > 0 {
		out.Path, out.Args = ct.Command[0], ct.Command[1:]
	}
	if out.Config.Env == nil {
		out.Config.Env = []string{}
	}
	return out
}

func (s *Server) containerStop(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if c.query.Get("signal") != "" {
		return unsupportedf("signal: stopping with another signal is not supported yet: use kill --signal")
	}
	grace := ct.Spec.StopGrace
	if text := c.query.Get("t"); text != "" {
		n, err := strconv.Atoi(text)
		switch {
		case err != nil:
			return invalidf("t: %q is not a number of seconds", text)
		case n < 0:
			return unsupportedf("t: waiting for ever (%d) is not supported", n)
		}
		grace = time.Duration(n) * time.Second
	}
	if ct.State.Status != running {
		return c.status(http.StatusNotModified)
	}
	if err := s.cfg.Containers.StopContainer(c.Context(), ct.Task, grace); err != nil {
		return err
	}
	return c.status(http.StatusNoContent)
}

func (s *Server) containerKill(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if ct.State.Status != running {
		return fmt.Errorf("cannot kill container %s: it is not running: %w", c.vars["name"], weft.ErrConflict)
	}
	signal := c.query.Get("signal")
	if signal == "" {
		signal = "SIGKILL"
	}
	if err := s.cfg.Containers.KillContainer(c.Context(), ct.Task, signal); err != nil {
		return err
	}
	return c.status(http.StatusNoContent)
}

// containerWait sends the headers at once: clients ask before the end, and
// some wait for the headers before they go on.
func (s *Server) containerWait(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	switch cond := container.WaitCondition(c.query.Get("condition")); cond {
	case "", container.WaitConditionNotRunning, container.WaitConditionNextExit:
	case container.WaitConditionRemoved:
		return unsupportedf("condition: waiting for the removal of a container is not supported yet")
	default:
		return invalidf("condition: %q must be not-running, next-exit or removed", cond)
	}
	f, err := startStream(c.w, "application/json")
	if err != nil {
		return err
	}
	var answer container.WaitResponse
	code, err := s.cfg.Containers.WaitContainer(c.Context(), ct.Task)
	answer.StatusCode = int64(code)
	if err != nil {
		answer.Error = &container.WaitExitError{Message: messageOf(err)}
		answer.StatusCode = -1
	}
	return json.NewEncoder(f).Encode(answer)
}

func (s *Server) containerRemove(c *call) error {
	ct, err := s.container(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	for _, q := range []string{"v", "link"} {
		if c.bool(q) {
			return unsupportedf("%s: is not supported yet when removing containers", q)
		}
	}
	isForced := c.bool("force")
	if ct.State.Status == running && !isForced {
		return fmt.Errorf("cannot remove container %q: container is running: stop the container before removing or force remove: %w", "/"+ct.Name, weft.ErrConflict)
	}
	if err := s.cfg.Containers.RemoveContainer(c.Context(), ct.Task, isForced); err != nil {
		return err
	}
	return c.status(http.StatusNoContent)
}

package api

import (
	"cmp"
	"context"
	"net/http"
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

func (s *Server) serviceRoutes(add adder) {
	add("GET", "/services", s.inCluster(s.serviceList))
	add("POST", "/services/create", s.inCluster(s.serviceCreate))
	add("GET", "/services/{name}", s.inCluster(s.serviceInspect))
	add("DELETE", "/services/{name}", s.inCluster(s.serviceRemove))
	add("POST", "/services/{name}/update", s.inCluster(s.serviceUpdate))
	add("GET", "/services/{name}/logs", s.inCluster(s.serviceLogs))
	add("GET", "/tasks", s.inCluster(s.taskList))
	add("GET", "/tasks/{name}", s.inCluster(s.taskInspect))
	add("GET", "/tasks/{name}/logs", s.inCluster(s.taskLogs))
}

func (s *Server) serviceList(c *call) error {
	f, err := c.filters("id", "name", "label", "mode", "runtime")
	if err != nil {
		return err
	}
	if err := f.oneOf("mode", "replicated", "global", "replicated-job", "global-job"); err != nil {
		return err
	}
	if err := f.oneOf("runtime", "container", "plugin"); err != nil {
		return err
	}
	all, err := s.cfg.Services.Services(c.Context())
	if err != nil {
		return err
	}
	var status map[weft.ID]*swarm.ServiceStatus
	if c.bool("status") && c.version >= 41 {
		if status, err = s.serviceStatus(c.Context(), all); err != nil {
			return err
		}
	}
	out := []swarm.Service{}
	for i := range all {
		v := &all[i]
		mode := "replicated"
		if v.Spec.Mode == weft.ModeGlobal {
			mode = "global"
		}
		if f.prefix("id", string(v.ID)) && f.prefix("name", v.Spec.Name) && f.labels("label", v.Spec.Labels) &&
			f.has("mode", mode) && f.has("runtime", "container") {
			d := dockerService(v)
			d.ServiceStatus = status[v.ID]
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b swarm.Service) int { return cmp.Compare(a.Spec.Name, b.Spec.Name) })
	return c.json(out)
}

// serviceStatus counts tasks as `service ls` shows them: what should run, and
// what of it does.
func (s *Server) serviceStatus(ctx context.Context, all []weft.Service) (map[weft.ID]*swarm.ServiceStatus, error) {
	list, err := s.cfg.Tasks.Tasks(ctx, weft.TaskFilter{})
	if err != nil {
		return nil, err
	}
	nodes, err := s.cfg.Nodes.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	silent := map[weft.ID]bool{}
	for i := range nodes {
		silent[nodes[i].ID] = nodes[i].Status.State == weft.NodeDown
	}
	out := map[weft.ID]*swarm.ServiceStatus{}
	for i := range all {
		st := &swarm.ServiceStatus{}
		if all[i].Spec.Mode == weft.ModeReplicated {
			st.DesiredTasks = all[i].Spec.Replicas
		}
		out[all[i].ID] = st
		for j := range list.Tasks {
			t := &list.Tasks[j]
			// What a silent node does nobody knows: it counts for nothing.
			if t.Service != all[i].ID || t.Desired > weft.TaskRunning || silent[t.Node] {
				continue
			}
			if all[i].Spec.Mode == weft.ModeGlobal {
				st.DesiredTasks++
			}
			if t.Status.State == weft.TaskRunning {
				st.RunningTasks++
			}
		}
	}
	return out, nil
}

// readService decodes and judges the body of create and update.
func (s *Server) readService(c *call) (weft.ServiceSpec, error) {
	var body struct {
		swarm.ServiceSpec
		// Networks stood here before it moved into the task template (1.25);
		// the field was dropped in 1.44.
		Networks []swarm.NetworkAttachmentConfig
	}
	if c.version >= 44 {
		if err := decode(c, &body.ServiceSpec); err != nil {
			return weft.ServiceSpec{}, err
		}
	} else {
		if err := decode(c, &body); err != nil {
			return weft.ServiceSpec{}, err
		}
		if len(body.TaskTemplate.Networks) == 0 {
			body.TaskTemplate.Networks = body.Networks
		}
	}
	if auth := c.Header.Get("X-Registry-Auth"); auth != "" && auth != "e30" && auth != "e30=" { // {}
		return weft.ServiceSpec{}, unsupportedf("registry credentials for services (--with-registry-auth) are not supported yet: pull or load the image on every node")
	}
	if err := s.rules.service.check(body.ServiceSpec); err != nil {
		return weft.ServiceSpec{}, err
	}
	if err := checkService(&body.ServiceSpec); err != nil {
		return weft.ServiceSpec{}, err
	}
	return serviceSpec(&body.ServiceSpec), nil
}

func (s *Server) serviceCreate(c *call) error {
	spec, err := s.readService(c)
	if err != nil {
		return err
	}
	if spec.Name == "" {
		// Docker invents a name too; ours says that nobody chose it.
		spec.Name = "service-" + weft.NewID().Short()
	}
	v, err := s.cfg.Services.CreateService(c.Context(), spec)
	if err != nil {
		return err
	}
	writeJSON(c.w, http.StatusCreated, swarm.ServiceCreateResponse{ID: string(v.ID), Warnings: warnings(&spec)})
	return nil
}

func (s *Server) serviceUpdate(c *call) error {
	index, err := c.index()
	if err != nil {
		return err
	}
	back, err := c.rollback()
	if err != nil {
		return err
	}
	old, err := s.cfg.Services.Service(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if back {
		return s.serviceRollback(c, &old, index)
	}
	spec, err := s.readService(c)
	if err != nil {
		return err
	}
	if spec.Name != old.Spec.Name {
		return unsupportedf("Name: renaming service %s to %q is not supported", old.Spec.Name, spec.Name)
	}
	if spec.Mode != old.Spec.Mode {
		return unsupportedf("Mode: service %s cannot change between replicated and global", old.Spec.Name)
	}
	if _, err := s.cfg.Services.UpdateService(c.Context(), old.ID, index, spec); err != nil {
		return err
	}
	return c.json(swarm.ServiceUpdateResponse{Warnings: warnings(&spec)})
}

func (s *Server) serviceInspect(c *call) error {
	v, err := s.cfg.Services.Service(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	return c.json(dockerService(&v)) // insertDefaults changes nothing: they are always there
}

func (s *Server) serviceRemove(c *call) error {
	v, err := s.cfg.Services.Service(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if err := s.cfg.Services.RemoveService(c.Context(), v.ID); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

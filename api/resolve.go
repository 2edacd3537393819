package api

import (
	"context"
	"strings"

	"github.com/weftnet/weft"
)

// named is how resolve sees an object.
type named struct{ id, name string }

// resolve finds the object that ref means: a full id, else a name, else the
// unique beginning of an id. kind is for the error.
func resolve(kind, ref string, n int, at func(int) named) (int, error) {
	name, prefix, names, prefixes := -1, -1, 0, 0
	for i := range n {
		o := at(i)
		switch {
		case o.id == ref:
			return i, nil
		case o.name == ref:
			name, names = i, names+1
		case strings.HasPrefix(o.id, ref):
			prefix, prefixes = i, prefixes+1
		}
	}
	switch {
	case names == 1:
		return name, nil
	case names > 1:
		return -1, invalidf("%s %s is ambiguous (%d have this name): use the id", kind, ref, names)
	case prefixes == 1:
		return prefix, nil
	case prefixes > 1:
		return -1, invalidf("%s %s is ambiguous (%d ids begin with it): give more characters", kind, ref, prefixes)
	}
	return -1, notFoundf("%s %s not found", kind, ref)
}

func (s *Server) node(ctx context.Context, ref string) (weft.Node, error) {
	all, err := s.cfg.Nodes.Nodes(ctx)
	if err != nil {
		return weft.Node{}, err
	}
	i, err := resolve("node", ref, len(all), func(i int) named {
		return named{string(all[i].ID), all[i].Description.Hostname}
	})
	if err != nil {
		return weft.Node{}, err
	}
	return all[i], nil
}

func (s *Server) network(ctx context.Context, ref string) (weft.Network, error) {
	all, err := s.cfg.Networks.Networks(ctx)
	if err != nil {
		return weft.Network{}, err
	}
	i, err := resolve("network", ref, len(all), func(i int) named {
		return named{string(all[i].ID), all[i].Spec.Name}
	})
	if err != nil {
		return weft.Network{}, err
	}
	return all[i], nil
}

// container finds a container of this node. Names may begin with a slash, as
// Docker prints them in inspect.
func (s *Server) container(ctx context.Context, ref string) (weft.Container, error) {
	all, err := s.cfg.Containers.Containers(ctx)
	if err != nil {
		return weft.Container{}, err
	}
	i, err := resolve("container", strings.TrimPrefix(ref, "/"), len(all), func(i int) named {
		return named{all[i].ID, all[i].Name}
	})
	if statusOf(err) == 404 {
		return weft.Container{}, notFoundf("No such container: %s (on this node; 'service ps' shows where the tasks of a service run)", ref)
	}
	if err != nil {
		return weft.Container{}, err
	}
	return all[i], nil
}

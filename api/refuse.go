package api

import (
	"fmt"
	"net/http"

	"github.com/weftnet/weft"
)

// refusedRoutes are the parts of the Engine API that weft knows and does not
// serve yet: 501 with one sentence that says so and, where there is one, the
// way that works. Paths that the Engine API does not have are 404.
func refusedRoutes(add adder) {
	const useService = "containers outside services are not supported yet: run it as a service with 'service create --network NETWORK IMAGE', then use exec and logs on its containers"
	for _, r := range []struct{ method, pattern, why string }{
		{"POST", "/containers/create", useService},
		{"POST", "/containers/{name}/start", useService},
		{"POST", "/containers/{name}/restart", "restarting a container is not supported yet: stop it and its service replaces it"},
		{"POST", "/containers/{name}/pause", "pausing containers is not supported yet"},
		{"POST", "/containers/{name}/unpause", "pausing containers is not supported yet"},
		{"POST", "/containers/{name}/rename", "the name of a service's container is fixed"},
		{"POST", "/containers/{name}/update", "changing a container is not supported: change its service with 'service update'"},
		{"POST", "/containers/{name}/resize", "attaching to containers is not supported yet"},
		{"POST", "/containers/{name}/attach", "attaching to containers is not supported yet: use logs -f or exec"},
		{"GET", "/containers/{name}/attach/ws", "attaching to containers is not supported yet: use logs -f or exec"},
		{"GET", "/containers/{name}/stats", "container statistics are not supported yet"},
		{"GET", "/containers/{name}/top", "listing processes is not supported yet: use exec with ps"},
		{"GET", "/containers/{name}/changes", "listing file changes is not supported yet"},
		{"GET", "/containers/{name}/export", "exporting containers is not supported yet"},
		{"GET", "/containers/{name}/archive", "copying files is not supported yet: use exec with tar"},
		{"PUT", "/containers/{name}/archive", "copying files is not supported yet: use exec with tar"},
		{"HEAD", "/containers/{name}/archive", "copying files is not supported yet: use exec with tar"},
		{"GET", "/containers/{name}/checkpoints", "checkpoints are not supported"},
		{"POST", "/containers/{name}/checkpoints", "checkpoints are not supported"},
		{"DELETE", "/containers/{name}/checkpoints/{checkpoint}", "checkpoints are not supported"},
		{"POST", "/containers/prune", "pruning containers is not supported yet: ended containers of services are cleaned up by themselves"},
		{"POST", "/commit", "making images is not supported: build them elsewhere and use 'image load' or a registry"},
		{"POST", "/build", "building images is not supported: build them elsewhere and use 'image load' or a registry"},
		{"POST", "/build/prune", "building images is not supported"},
		{"POST", "/build/cancel", "building images is not supported"},
		{"POST", "/session", "building images is not supported"},
		{"POST", "/grpc", "building images is not supported"},
		{"GET", "/images/search", "searching registries is not supported"},
		{"GET", "/images/get", "saving images is not supported yet"},
		{"GET", "/images/{name...}/get", "saving images is not supported yet"},
		{"GET", "/images/{name...}/history", "the history of images is not supported yet"},
		{"POST", "/images/{name...}/push", "pushing images is not supported yet"},
		{"POST", "/images/prune", "pruning images is not supported yet"},
		{"POST", "/auth", "logging in to registries is not supported yet"},
		{"GET", "/events", "the event stream is not supported yet: poll the object instead"},
		{"GET", "/system/df", "disk usage is not supported yet"},
		{"POST", "/networks/prune", "pruning networks is not supported yet"},
		{"POST", "/networks/{name}/connect", "connecting containers to networks is not supported yet: give the service --network"},
		{"POST", "/networks/{name}/disconnect", "disconnecting containers from networks is not supported yet"},
		{"GET", "/swarm/unlockkey", "locking managers is not supported yet"},
		{"POST", "/swarm/unlock", "locking managers is not supported yet"},
		{"POST", "/secrets/create", "secrets are not supported yet"},
		{"POST", "/configs/create", "configs are not supported yet"},
		{"POST", "/volumes/create", "volumes cannot be made by themselves yet: 'service create --mount type=volume' makes them on the node of the task"},
		{"POST", "/volumes/prune", "pruning volumes is not supported yet"},
		{"GET", "/plugins/privileges", "plugins are not supported"},
		{"POST", "/plugins/pull", "plugins are not supported"},
		{"POST", "/plugins/create", "plugins are not supported"},
		{"POST", "/plugins/{name...}/enable", "plugins are not supported"},
		{"POST", "/plugins/{name...}/disable", "plugins are not supported"},
		{"POST", "/plugins/{name...}/set", "plugins are not supported"},
		{"POST", "/plugins/{name...}/upgrade", "plugins are not supported"},
		{"POST", "/plugins/{name...}/push", "plugins are not supported"},
		{"DELETE", "/plugins/{name...}", "plugins are not supported"},
	} {
		add(r.method, r.pattern, refuse(r.why))
	}
	emptyRoutes(add)
}

func refuse(why string) handler {
	return func(*call) error { return fmt.Errorf("%s: %w", why, weft.ErrUnsupported) }
}

// emptyRoutes are kinds of object of which there are none: nothing can make
// one, so an empty list is the truth, and 404 for a single one lets
// `docker inspect NAME` try the next kind.
func emptyRoutes(add adder) {
	for _, kind := range []string{"secret", "config"} {
		add("GET", "/"+kind+"s", func(c *call) error { return c.json([]struct{}{}) })
		for _, m := range []string{"GET", "DELETE"} {
			add(m, "/"+kind+"s/{name}", noSuch(kind))
		}
		add("POST", "/"+kind+"s/{name}/update", noSuch(kind))
	}
	add("GET", "/plugins", func(c *call) error { return c.json([]struct{}{}) })
	add("GET", "/plugins/{name...}/json", noSuch("plugin"))
	// The volumes of services exist, but only the runtime knows them.
	add("GET", "/volumes", func(c *call) error {
		return c.json(map[string]any{"Volumes": []struct{}{},
			"Warnings": []string{"the volumes of services are not listed yet"}})
	})
	add("GET", "/volumes/{name}", noSuch("volume"))
	add("DELETE", "/volumes/{name}", noSuch("volume"))
}

func noSuch(kind string) handler {
	return func(c *call) error {
		if c.Method == http.MethodGet {
			return notFoundf("get %s: no such %s", c.vars["name"], kind)
		}
		return notFoundf("no such %s: %s", kind, c.vars["name"])
	}
}

package weft

// ClusterUpdate is a change of the cluster object.
type ClusterUpdate struct {
	Spec          ClusterSpec
	RotateWorker  bool // a new worker join token
	RotateManager bool // a new manager join token
	RotateKeys    bool `cbor:",omitempty"` // new keys for encrypted networks, on every node
}

// TaskFilter selects tasks; empty fields select all.
type TaskFilter struct {
	Services []ID
	Nodes    []ID
}

// TaskList is tasks with the spec versions they refer to.
type TaskList struct {
	Tasks []Task
	Specs []SpecVersion
}

package weft

// Attribute keys of the log. Messages are constant; what changes is an
// attribute under one of these keys, so that one search finds an object in the
// logs of every node.
const (
	KeyNode     = "node"
	KeyTask     = "task"
	KeyService  = "service"
	KeyNetwork  = "network"
	KeyVNI      = "vni"
	KeyEndpoint = "endpoint"
	KeyPeer     = "peer"
	KeyEngine   = "engine"
	KeyErr      = "err"
)

package wire

import (
	"net/netip"

	"github.com/weftnet/weft"
)

// Arguments and answers of calls that have no message of their own. Each is a
// map on the wire, so that fields can be added.

type (
	empty                struct{}
	refRequest           struct{ Ref string }
	idRequest            struct{ ID weft.ID }
	specRequest          struct{ Spec weft.ServiceSpec }
	updateServiceRequest struct {
		ID    weft.ID
		Index uint64
		Spec  weft.ServiceSpec
	}
	arriveRequest struct {
		ID       weft.ID
		Networks []weft.ID
	}
	rollbackServiceRequest struct {
		ID    weft.ID
		Index uint64
	}
	tasksRequest    struct{ Filter weft.TaskFilter }
	taskLogsRequest struct {
		Tasks   []weft.ID
		Options weft.LogOptions
	}
	updateNodeRequest struct {
		ID    weft.ID
		Index uint64
		Spec  weft.NodeSpec
	}
	removeNodeRequest struct {
		ID    weft.ID
		Force bool
	}
	createNetworkRequest struct{ Spec weft.NetworkSpec }
	updateClusterRequest struct {
		Index  uint64
		Update weft.ClusterUpdate
	}
	forwardRequest struct {
		Request AdmitRequest
		Remote  netip.Addr
	}
	renewRequest struct{ CSR []byte }
	logsRequest  struct {
		Task    weft.ID
		Options weft.LogOptions
	}

	servicesAnswer struct{ Services []weft.Service }
	serviceAnswer  struct{ Service weft.Service }
	tasksAnswer    struct{ List weft.TaskList }
	nodesAnswer    struct{ Nodes []weft.Node }
	networksAnswer struct{ Networks []weft.Network }
	networkAnswer  struct{ Network weft.Network }
	clusterAnswer  struct{ Cluster weft.Cluster }
	renewAnswer    struct{ Cert []byte }

	// joinAnswer is the one message of the server on weft-join.
	joinAnswer struct {
		Error *wireError
		Admit *AdmitResponse
	}
)

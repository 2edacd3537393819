// Package api serves the Docker Engine API for one node and, through it, for
// the cluster. It is the only place on the server side that knows Docker's
// JSON: requests become values of package weft here and nowhere else, and
// answers are made from them.
//
// It owns routes, decoding, the check that every field is honoured or refused,
// conversion both ways, error texts and status codes, and the byte streams
// (logs, exec, progress). It does not own any state of the cluster: what it
// serves comes through the small interfaces in backend.go, which cmd/weft
// implements by forwarding to the leader or by asking this node. The only
// state kept here is the table of exec processes that clients have created.
//
// cmd/weft opens the socket, calls New and runs Server.Serve, which blocks
// until its context ends. All handlers may run at the same time; each exec
// entry is guarded by the table's mutex.
package api
